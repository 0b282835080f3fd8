"""Loss and condition numbers of Q while models train, and what bf16 costs each form of them afterwards.

    python benchmarks/curves.py WORK [--tokens 614400]

Trains four kinds of benchmarks/pays.py (1M), each at the best of the first three rates, and keeps them in WORK. After
every tenth of a run: held-out loss, on 32,768 tokens, and the median condition number of Q. Then the models, and what
fuse makes of them, are stored in bf16: the error of their logits, computed in fp64. Prints Markdown.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import TrainerCallback

import skipless
from pays import VOCABULARY, recipe_of, text_of
from skipless.errors import InputError
from skipless.inference import load
from skipless.train import corpus, run
from skipless.train.data import Blocks
from skipless.train.log import LINES, callbacks
from skipless.train.texts import read_tokens
from stored import cast, compare, logits

# The best of the first three rates that pays.csv has searched.
KINDS = {"pre-norm with skips": 0.012, "serial MHA": 0.006, "serial MHA without QP": 0.006, "parallel MHA": 0.012}
EVALUATIONS, EVALUATED, LENGTH = 10, 2**15, 256


class Conditions(TrainerCallback):
    """Adds Q's condition number, the median of all layers, to what is logged of an evaluation."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        queries = [layer.self_attn.q_proj for layer in model.model.layers if layer.self_attn.q_proj is not None]
        if "eval_loss" in (logs or {}) and queries:
            logs["condition_q"] = statistics.median(torch.linalg.cond(q.weight.double()).item() for q in queries)


def trained(kind: str, work: Path, tokens: int) -> Path:
    """A model of this kind, trained once; its log has the evaluations."""
    folder = work / kind.replace(" ", "-")
    if not (folder / "config.json").exists():
        recipe = recipe_of("1M", kind, KINDS[kind], 0, tokens, text_of(work))
        data = dataclasses.replace(recipe.data, held_out_tokens=EVALUATED)
        recipe = dataclasses.replace(recipe, data=data, eval_every=max(1, recipe.steps // EVALUATIONS))
        with patch.object(run, "callbacks", lambda *given: [Conditions(), *callbacks(*given)]):
            run.train(recipe, folder, resume=folder.exists())
    return folder


def held_out(work: Path, sequences: int) -> torch.Tensor:
    """Blocks of tokens (sequences, LENGTH) that no kind is trained on."""
    blocks = Blocks.cut(read_tokens(text_of(work) / corpus.HELD_OUT, VOCABULARY), LENGTH).tokens
    return blocks[torch.linspace(0, len(blocks) - 1, sequences).long()].long()


def curve(folder: Path) -> dict[int, dict[str, float]]:
    """Of a run's evaluations: tokens -> what was logged."""
    lines = [json.loads(line) for line in (folder / "log" / LINES).read_text(encoding="utf-8").splitlines()]
    return {line["tokens"]: line for line in lines if "eval_loss" in line}


def in_bf16(folder: Path, tokens: torch.Tensor) -> dict[str, float]:
    """The logits' relative error of each form of a model that is stored in bf16."""
    exact = logits(load(folder, torch.float64), tokens)
    forms = {"original": cast(load(folder, torch.float64), torch.bfloat16)}
    for basis in ("q", "pivoted"):
        with tempfile.TemporaryDirectory() as temporary:
            try:
                skipless.fuse(folder, Path(temporary) / "fused", basis=basis, dtype="bfloat16")
            except InputError:  # nothing in it can be removed
                break
            forms[basis] = load(Path(temporary) / "fused", torch.float64)
    return {form: compare(logits(model, tokens), exact)["logit_error"] for form, model in forms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokens", type=int, default=614_400)
    arguments = parser.parse_args()
    folders = {kind: trained(kind, arguments.work, arguments.tokens) for kind in KINDS}
    curves = {kind: curve(folder) for kind, folder in folders.items()}
    print("| tokens | " + " | ".join(KINDS) + " |\n|---|" + "---|" * len(KINDS))
    for tokens in next(iter(curves.values())):
        cells = []
        for found in curves.values():
            line = found[tokens]
            condition = f", {line['condition_q']:.1f}" if "condition_q" in line else ""
            cells.append(f"{line['eval_loss']:.3f}{condition}")
        print(f"| {tokens:,} | " + " | ".join(cells) + " |")
    print("\n| stored in bf16 | original | fused by q | fused by pivoted columns |\n|---|---|---|---|")
    sequences = held_out(arguments.work, 16)
    for kind, folder in folders.items():
        errors = in_bf16(folder, sequences)
        cells = [f"{errors[form]:.2g}" if form in errors else "" for form in ("original", "q", "pivoted")]
        print(f"| {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

"""What it costs to be skipless, and what leaving out Q and P costs on top: equal tokens, seeds, rates tuned by kind.

    python benchmarks/pays.py pays.csv WORK [--tokens 3000000] [--only SIZE/KIND ...]
    python benchmarks/pays.py pays.csv --table

One row of the CSV a run, appended when it is done; what is there is not run again, and a run that was interrupted goes
on from its checkpoint in WORK. Of each kind, three learning rates are tried with a quarter of the tokens (phase
"search"), and the best trains three seeds (phase "final"). "losses" are those of training: means of each tenth of the
run. The text is the standard library's source. --table prints the final runs as Markdown: mean held-out loss, and the
spread of seeds.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from skipless.errors import InputError
from skipless.inference import load
from skipless.train import corpus, run
from skipless.train.log import LINES
from skipless.train.recipe import Data, Recipe, Tokenizer

SEEDS, RATES = (0, 1, 2), (0.003, 0.006, 0.012)
BATCH, LENGTH, VOCABULARY, HEADS = 8, 256, 2048, 8
EVALUATED = 2**17  # held-out tokens
# Width, FFN and layers: about so many weights in the layers with all heads' keys and values.
SIZES = {"1M": (128, 256, 6), "4M": (256, 512, 6)}
IN_BF16 = ("4M",)  # matrix products
COLUMNS = (
    "size", "kind", "phase", "rate", "seed", "steps", "tokens", "parameters", "layers", "held_out_loss",
    "bits_per_byte", "condition_q", "seconds", "losses",
)  # fmt: skip

WITHOUT = {"stream_basis": "q", "p_removed": True}
SKIPLESS = {"gate_bias": True, "attention_shaping": "value"}
PRE_NORM = {"residual": "both", "norm_type": "rms"}
SAS = {"norm_type": "rms", "attention_shaping": "full", "residual_gains": True, "stream_basis": "v", "p_removed": True}


def kinds(d: int, f: int) -> dict[str, dict[str, Any]]:
    """Fields of config.json that a kind adds to a width. "equal": what Q and P had, spent on the FFN's width."""
    found = {}
    equal = {"intermediate_size": f + 2 * d // 3}
    for block, (heads, number) in itertools.product(("serial", "parallel"), (("MHA", 8), ("GQA", 2), ("MQA", 1))):
        fields = {**SKIPLESS, "block_type": block, "num_key_value_heads": number}
        found[f"{block} {heads}"] = fields
        found[f"{block} {heads} without QP"] = fields | WITHOUT
        found[f"{block} {heads} without QP, equal weights"] = fields | WITHOUT | equal
    found["pre-norm with skips"] = PRE_NORM
    found["pre-norm with skips without QP"] = PRE_NORM | WITHOUT
    found["SAS"] = SAS | {"residual": "ffn"}
    found["SAS-P"] = SAS | {"block_type": "parallel"}
    found["serial MHA unshaped"] = {"gate_bias": True}
    return found


def rows(file: Path) -> list[dict[str, str]]:
    """The runs that are done; of a last line that was cut short, nothing."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        file.write_text(text, encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def append(file: Path, row: dict[str, Any]) -> None:
    new = not rows(file)
    with file.open("w" if new else "a", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
        out.flush()
        os.fsync(out.fileno())


def recipe_of(size: str, kind: str, rate: float, seed: int, tokens: int, text: Path) -> Recipe:
    d, f, layers = SIZES[size]
    model = {
        "vocab_size": VOCABULARY, "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "max_position_embeddings": LENGTH, **kinds(d, f)[kind],
    }  # fmt: skip
    data = Data(
        files=(str(text / corpus.TRAINING),), held_out_files=(str(text / corpus.HELD_OUT),), held_out_tokens=EVALUATED
    )
    return Recipe(
        steps=tokens // (BATCH * LENGTH), batch_size=BATCH, sequence_length=LENGTH, muon_lr=rate, adamw_lr=rate,
        bf16=size in IN_BF16, seed=seed, model=model, data=data, tokenizer=Tokenizer(str(text / corpus.TOKENIZER)),
    )  # fmt: skip


def text_of(work: Path, vocabulary: int = VOCABULARY) -> Path:
    """The standard library as tokens, made once."""
    folder = work / ("text" if vocabulary == VOCABULARY else f"text-{vocabulary}")
    if not corpus.is_made(folder):
        folder.mkdir(parents=True, exist_ok=True)
        recipe = Recipe(1, BATCH, LENGTH, 0.0, 0.0, model={"vocab_size": vocabulary})
        corpus.make(recipe, vocabulary, folder)
    return folder


def trained(recipe: Recipe, out: Path) -> dict[str, Any]:
    """The results of a run, which goes on where it was interrupted. A loss that is not a number is a result, too."""
    start = time.perf_counter()
    saved = out / run.CHECKPOINTS / run.RECIPE
    begun = saved.is_file() and not json.loads(saved.read_text(encoding="utf-8"))["done"]
    if not begun and out.exists():  # before it began, or before its row was written
        shutil.rmtree(out)
    try:
        found = run.train(recipe, out, resume=begun)
    except InputError as error:
        if "expected a number" not in str(error):
            raise
        shutil.rmtree(out)
        return {"held_out_loss": "nan"}
    model = load(out, torch.float32)
    layers = [layer.self_attn.q_proj for layer in model.model.layers]
    losses = tenths(out / run.LOG / LINES, recipe.steps)
    conditions = [torch.linalg.cond(q.weight.double()).item() for q in layers if q is not None]
    shutil.rmtree(out)
    return {
        **found,
        "parameters": model.num_parameters(),
        "layers": sum(weight.numel() for weight in model.model.layers.parameters()),
        "condition_q": f"{statistics.median(conditions):.1f}" if conditions else "",
        "seconds": round(time.perf_counter() - start),
        "losses": " ".join(f"{loss:.4f}" for loss in losses),
    }


def tenths(log: Path, steps: int) -> list[float]:
    """Mean training loss of each tenth of a run. A run too short to log in each has none."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    logged = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    each = [[loss for step, loss in logged if tenth * steps < 10 * step <= (tenth + 1) * steps] for tenth in range(10)]
    return [statistics.mean(losses) for losses in each] if all(each) else []


def jobs(size: str, kind: str, tokens: int, done: list[dict[str, str]]) -> Iterator[tuple[str, float, int, int]]:
    """Phase, rate, seed and tokens of the next runs of a kind; the final ones once the search is done."""
    mine = [row for row in done if (row["size"], row["kind"]) == (size, kind)]
    for rate in RATES:
        if not any(row["phase"] == "search" and float(row["rate"]) == rate for row in mine):
            yield "search", rate, SEEDS[0], tokens // 4
            return
    searched = {float(row["rate"]): float(row["held_out_loss"]) for row in mine if row["phase"] == "search"}
    best = min(searched, key=lambda rate: (searched[rate] != searched[rate], searched[rate]))  # NaN is the worst
    for seed in SEEDS:
        if not any(row["phase"] == "final" and int(row["seed"]) == seed for row in mine):
            yield "final", best, seed, tokens
            return


def table(done: list[dict[str, str]]) -> None:
    print("| weights | kind | weights in the layers | rate | held-out nats a token | spread | bits a byte | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    final = [row for row in done if row["phase"] == "final"]
    for (size, kind), each in itertools.groupby(final, key=lambda row: (row["size"], row["kind"])):
        group = list(each)
        runs = [row for row in group if row["held_out_loss"] != "nan"]
        if not runs:
            print(f"| {size} | {kind} | | | not a number | | | 0 |")
            continue
        losses = [float(row["held_out_loss"]) for row in runs]
        bits = statistics.mean(float(row["bits_per_byte"]) for row in runs)
        spread, lost = max(losses) - min(losses), len(group) - len(runs)
        print(
            f"| {size} | {kind} | {int(runs[0]['layers']):,} | {runs[0]['rate']} | {statistics.mean(losses):.3f} | "
            f"{spread:.3f} | {bits:.3f} | {len(runs)}{f', {lost} not a number' * bool(lost)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("work", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="of a final run")
    parser.add_argument("--only", nargs="+", default=[], help="such as 1M/SAS; default: all")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        table(sorted(rows(arguments.csv), key=lambda row: (row["size"], row["kind"])))
        return
    if arguments.work is None:
        parser.error("expected a folder WORK for the run that is under way")
    text = text_of(arguments.work)
    for size, (d, f, _) in SIZES.items():
        for kind in kinds(d, f):
            if arguments.only and f"{size}/{kind}" not in arguments.only:
                continue
            while job := next(jobs(size, kind, arguments.tokens, rows(arguments.csv)), None):
                phase, rate, seed, tokens = job
                recipe = recipe_of(size, kind, rate, seed, tokens, text)
                name = f"{size}-{kind}-{phase}-{rate}-{seed}".replace(" ", "_")
                print(name, flush=True)
                found = trained(
                    dataclasses.replace(recipe, save_every=max(1, recipe.steps // 10)), arguments.work / name
                )
                row = {"size": size, "kind": kind, "phase": phase, "rate": rate, "seed": seed, "steps": recipe.steps}
                append(arguments.csv, {**row, "tokens": recipe.steps * BATCH * LENGTH, **found})


if __name__ == "__main__":
    main()

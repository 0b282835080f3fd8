"""From a model with skips and norms to one without: fading them, against training without them from the start.

    python benchmarks/fade.py WORK [--before 256000] [--after 256000] [--seeds 0 1]

A pre-norm model with skips trains on the standard library's source (`before` tokens). From it, skips and norms fade
within `after` further tokens; beside it, the same blocks without skips and norms train from scratch on as many tokens
as the fade takes, and on as many as both together; and the pre-norm model goes on. Prints Markdown: held-out nats a
token by seed.
"""

import argparse
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pays import PRE_NORM, SKIPLESS, text_of
from skipless.train import corpus, fade, run
from skipless.train.recipe import Data, Recipe, Schedule, Start, Tokenizer
from skipless.train.trainer import NotANumberError

BATCH, LENGTH, RATE, VOCABULARY = 8, 128, 0.006, 512
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": LENGTH,
}  # fmt: skip
# Of the steps after: from which fraction to which skips and norms fade.
FADES = {
    "skips and norms together": ((0.05, 0.5), (0.05, 0.5)),
    "skips, then norms": ((0.05, 0.3), (0.3, 0.5)),
    "norms, then skips": ((0.3, 0.5), (0.05, 0.3)),
}


def steps(fractions: tuple[float, float] | None, of: int) -> tuple[int, ...]:
    return () if fractions is None else (int(fractions[0] * of), int(fractions[1] * of))


def trained(
    out: Path, text: Path, tokens: int, seed: int, *, rate: float = RATE, batch: int = BATCH, **fields: Any
) -> float:
    """Held-out nats a token of one run, whose model stays in `out`; NaN where it came to no number."""
    data = Data(
        files=(str(text / corpus.TRAINING),), held_out_files=(str(text / corpus.HELD_OUT),), held_out_tokens=2**15
    )
    recipe = Recipe(
        steps=tokens // (batch * LENGTH), batch_size=batch, sequence_length=LENGTH, muon_lr=rate, adamw_lr=rate,
        seed=seed, data=data, tokenizer=Tokenizer(str(text / corpus.TOKENIZER)), eval_every=10**6, save_every=10**6,
        **fields,
    )  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    try:
        return run.train(recipe, out)["held_out_loss"] or float("nan")
    except NotANumberError as error:
        print(f"{out.name}: {error}", flush=True)
        return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--before", type=int, default=256_000)
    parser.add_argument("--after", type=int, default=256_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    text, before, after = text_of(arguments.work, VOCABULARY), arguments.before, arguments.after
    found: dict[str, list[float]] = {}
    for seed in arguments.seeds:
        out = arguments.work / "before"
        start = Start(str(out))

        def row(name: str, tokens: int, seed: int = seed, **fields: Any) -> None:
            loss = trained(arguments.work / "after", text, tokens, seed, **fields)
            found.setdefault(name, []).append(loss)
            print(f"seed {seed}: {name}: {loss:.3f}", flush=True)

        for gate in (False, True):
            pre_norm = SHAPE | PRE_NORM | ({"gate_bias": True, "attention_shaping": "value"} if gate else {})
            kind = "gate bias and value shaping" if gate else "plain"
            loss = trained(out, text, before, seed, model=pre_norm)
            found.setdefault(f"pre-norm, {kind}", []).append(loss)
            print(f"seed {seed}: pre-norm, {kind}: {loss:.3f}", flush=True)
            row(f"it goes on, {kind}", after, start=start)
            for name, (skips, norms) in FADES.items():
                of = after // (BATCH * LENGTH)
                schedule = Schedule(steps(skips, of), steps(norms, of))
                row(f"{name}, {kind}", after, start=start, schedule=schedule)
            if not gate:
                with ExitStack() as stack:
                    for added in ("add_own_values", "add_gate_biases"):
                        stack.enter_context(patch.object(fade, added, lambda model: []))
                    row(f"{name}, {kind}, and neither added", after, start=start, schedule=schedule)
        row("from scratch, as many as the fade", after, model=SHAPE | SKIPLESS)
        row("from scratch, as many as both", before + after, model=SHAPE | SKIPLESS)
    print("| | held-out nats a token, by seed |\n|---|---|")
    for name, losses in found.items():
        print(f"| {name} | {', '.join(f'{loss:.3f}' for loss in losses)} |")


if __name__ == "__main__":
    main()

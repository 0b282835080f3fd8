"""What it costs to be skipless, and what leaving out Q and P costs on top: equal tokens, seeds, rates tuned by kind.

    python benchmarks/pays.py pays.csv WORK [--tokens 614400] [--only SIZE/KIND ...]
    python benchmarks/pays.py pays.csv --table

One row of the CSV a run, appended when it is done; what is there is not run again, and a run that was interrupted goes
on from its checkpoint in WORK. Of each kind, three learning rates are tried with a quarter of the tokens (phase
"search"), and more while the best is the largest or the smallest. Then three seeds train at the best (phase "final"),
until the loss of one is not a number: then at the next best. "losses" are those of training: means of each tenth of the
run. The text is the standard library's source. --table prints the final runs as Markdown, for each kind at one rate
(runs.best); "spread" is the largest less the smallest of the seeds.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import math
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import runs
from skipless.inference import load
from skipless.train import corpus, run
from skipless.train.log import LINES
from skipless.train.recipe import Data, Recipe, Tokenizer
from skipless.train.trainer import NotANumberError

SEEDS, RATES = (0, 1, 2), (0.003, 0.006, 0.012)
LEAST, MOST = 0.00075, 0.048  # however the search goes
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


def model_of(kind: str, d: int, f: int, layers: int) -> dict[str, Any]:
    """Fields of config.json."""
    return {
        "vocab_size": VOCABULARY, "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "max_position_embeddings": LENGTH, **kinds(d, f)[kind],
    }  # fmt: skip


def append(file: Path, row: dict[str, Any]) -> None:
    """Add a line. A last one that was cut short goes."""
    text = file.read_bytes() if file.exists() else b""
    if not text.endswith(b"\n"):
        file.write_bytes(text[: text.rfind(b"\n") + 1])
    with file.open("a", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        if out.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        out.flush()
        os.fsync(out.fileno())


def recipe_of(size: str, kind: str, rate: float, seed: int, tokens: int, text: Path) -> Recipe:
    model = model_of(kind, *SIZES[size])
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
    except NotANumberError:
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


def next_run(size: str, kind: str, done: list[runs.Row]) -> tuple[str, float, int] | None:
    """Phase, rate and seed of the next run of a kind; the final ones once the search is done."""
    searched = [row for row in done if (row["size"], row["kind"], row["phase"]) == (size, kind, "search")]
    tried = dict(zip((float(row["rate"]) for row in searched), runs.losses(searched), strict=True))
    if missing := [rate for rate in RATES if rate not in tried]:
        return "search", missing[0], SEEDS[0]
    ranked = sorted(tried, key=lambda rate: (math.isnan(tried[rate]), tried[rate]))
    beyond = {max(tried): 2.0, min(tried): 0.5}.get(ranked[0])
    if beyond is not None and LEAST <= (rate := float(f"{ranked[0] * beyond:g}")) <= MOST:
        return "search", rate, SEEDS[0]
    final = runs.final(done, size, kind)
    for rate in ranked:
        group = final.get(rate, [])
        if any(map(math.isnan, runs.losses(group))):
            continue
        missing = [seed for seed in SEEDS if all(int(row["seed"]) != seed for row in group)]
        return ("final", rate, missing[0]) if missing else None
    return None


def table(done: list[runs.Row]) -> None:
    print("| weights | kind | weights in the layers | rate | held-out nats a token | spread | bits a byte | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    for (size, kind), group in sorted(runs.best(done).items()):
        ended = runs.ended(group)
        if not ended:
            print(f"| {size} | {kind} | | | not a number | | | 0 |")
            continue
        losses = runs.losses(ended)
        bits = statistics.mean(float(row["bits_per_byte"]) for row in ended)
        spread, lost = max(losses) - min(losses), len(group) - len(ended)
        print(
            f"| {size} | {kind} | {int(ended[0]['layers']):,} | {ended[0]['rate']} | {statistics.mean(losses):.3f} | "
            f"{spread:.3f} | {bits:.3f} | {len(ended)}{f', {lost} not a number' * bool(lost)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("work", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=614_400, help="of a final run")
    parser.add_argument("--only", nargs="+", default=[], help="such as 1M/SAS; default: all")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        table(runs.read(arguments.csv))
        return
    if arguments.work is None:
        parser.error("expected a folder WORK for the run that is under way")
    tokens = {"search": arguments.tokens // 4, "final": arguments.tokens}
    if any(int(row["steps"]) != tokens[row["phase"]] // (BATCH * LENGTH) for row in runs.read(arguments.csv)):
        parser.error(f"--tokens: expected those of the runs in {arguments.csv}, found {arguments.tokens}")
    text = text_of(arguments.work)
    for size, (d, f, _) in SIZES.items():
        for kind in kinds(d, f):
            if arguments.only and f"{size}/{kind}" not in arguments.only:
                continue
            while (found := next_run(size, kind, runs.read(arguments.csv))) is not None:
                phase, rate, seed = found
                recipe = recipe_of(size, kind, rate, seed, tokens[phase], text)
                name = f"{size}-{kind}-{phase}-{rate}-{seed}".replace(" ", "_")
                print(name, flush=True)
                recipe = dataclasses.replace(recipe, save_every=max(1, recipe.steps // 10))
                row = {"size": size, "kind": kind, "phase": phase, "rate": rate, "seed": seed, "steps": recipe.steps}
                row |= {"tokens": recipe.steps * BATCH * LENGTH, **trained(recipe, arguments.work / name)}
                append(arguments.csv, row)


if __name__ == "__main__":
    main()

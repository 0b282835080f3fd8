"""The bundled model: held-out loss, condition numbers, sizes, tokens and speed, original and fused.

    python benchmarks/bundled.py

Prints tables, and on the last line one JSON object. Speeds are ratios of interleaved rounds; the machine is named.
"""

import argparse
import json
import math
import os
import platform
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer

import skipless
from skipless.bundled import BUNDLED
from skipless.checkpoint.reader import CheckpointReader
from skipless.cli import tables
from skipless.cli.demo import PROMPT
from skipless.inference import greedy_config, load
from skipless.serving.bench import Work, bench
from stored import never_seen

GREEDY_TOKENS = 256
console = Console(width=100)


def held_out_loss() -> dict[str, float]:
    """Loss of the bundled model, run in fp32, on the files its recipe holds out of this interpreter's library."""
    blocks = never_seen()
    model = load(BUNDLED, torch.float32)
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in blocks.tokens.split(8)]
    loss = sum(losses) / len(blocks)
    return {
        "held_out_tokens": blocks.tokens.numel(),
        "nats_per_token": loss,
        "bits_per_byte": loss / math.log(2) / blocks.bytes_per_token,
    }


def greedy(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """The prompt's most likely continuation, GREEDY_TOKENS tokens."""
    ids = AutoTokenizer.from_pretrained(BUNDLED)(PROMPT, return_tensors="pt").input_ids
    config = greedy_config(GREEDY_TOKENS)
    return load(folder, dtype).generate(ids, attention_mask=torch.ones_like(ids), generation_config=config).sequences[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds of decoding")
    rounds = parser.parse_args().rounds
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    console.print(f"machine: {machine}")
    result: dict[str, object] = {"machine": machine, **held_out_loss()}
    console.print(f"held out: {result['nats_per_token']:.3f} nats a token, {result['bits_per_byte']:.3f} bits a byte")

    reader = CheckpointReader(BUNDLED)
    layers = range(reader.config["num_hidden_layers"])
    queries = [reader.tensor(f"model.layers.{layer}.self_attn.q_proj.weight").double() for layer in layers]
    result["condition_q"] = [torch.linalg.cond(query).item() for query in queries]
    console.print("condition numbers of Q (2-norm):", ", ".join(f"{value:,.0f}" for value in result["condition_q"]))

    with tempfile.TemporaryDirectory() as folder:
        plan = skipless.fuse(BUNDLED, Path(folder) / "pivoted", dtype="float32")
        skipless.fuse(BUNDLED, Path(folder) / "q", basis="q", dtype="float32")
        result["basis"] = plan.basis
        result["parameters_before"], result["parameters_after"] = plan.parameters
        console.print(f"weights: {plan.parameters[0]:,} -> {plan.parameters[1]:,}")

        same = torch.equal(greedy(BUNDLED, torch.float32), greedy(Path(folder) / "pivoted", torch.float32))
        result["greedy_tokens_equal"] = same
        console.print(f"{GREEDY_TOKENS} greedy tokens in float32: {'the same' if same else 'DIFFERENT'}")

        result["decode"] = {}
        for dtype in ("float32", "bfloat16"):
            folders = {"original": BUNDLED, "pivoted": Path(folder) / "pivoted", "q": Path(folder) / "q"}
            found = bench(
                list(folders.values()), dtype=dtype, work=Work(context=16, tokens=64, prefill=0), rounds=rounds
            )
            console.print(tables.bench_table(found))
            result["decode"][dtype] = {
                "tokens_per_second": [speed.decoding[0].tokens_per_second for speed in found.speeds],
                "bytes_ratio": found.speeds[0].bytes_per_token / found.speeds[1].bytes_per_token,
                "speedups": {
                    name: speed.decoding[0].speedup for name, speed in zip(folders, found.speeds, strict=True)
                },
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

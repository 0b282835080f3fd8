"""A skipless Mistral-7B, made of random weights, fused: time a layer, memory, and what the disk adds.

    python benchmarks/mistral.py                     # 7.1 billion weights: 42 GB of disk, half an hour on 2 cores
    python benchmarks/mistral.py --layers 2          # the same, of 2 layers

The checkpoint is written shard by shard, in bf16. It is fused by q and by pivoted columns, into bf16, each in a process
of its own; before, between and after, one layer is done the notebook way: numpy.linalg.inv of Q and every product in
fp64. The roofline is the FLOPs of the plan over the rates of matrix products, n = 4096, measured meanwhile, in the
cheapest precision that keeps the accuracy. Source and result are taken out of the system's cache before each run. The
last line is one JSON object.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from skipless import fuse
from skipless.algebra.basis import MAX_CONDITION, Basis
from skipless.architecture.config import Architecture
from skipless.checkpoint.reader import CheckpointReader, uncache
from skipless.checkpoint.writer import CheckpointWriter, plan_shards, write_json
from skipless.rewrite import execution
from skipless.rewrite.cost import cost
from skipless.rewrite.fusion import plan_fuse
from skipless.rewrite.machine import measure, peak_memory
from skipless.rewrite.request import Request

SHARD = 10**9
MISTRAL = {
    "model_type": "skipless",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def make(folder: Path, config: Mapping[str, object]) -> None:
    """Random weights of unit gain, a tensor at a time."""
    shapes = Architecture.from_config(config).tensors()
    folder.mkdir()
    write_json(folder / "config.json", config)
    writer = CheckpointWriter(folder, plan_shards({n: (s, torch.bfloat16) for n, s in shapes.items()}, SHARD))
    digests = {}
    for number, (name, shape) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(number)
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        while True:
            for rows in tensor.split(1024):
                rows.copy_(torch.randn(rows.shape, generator=generator).mul_(shape[1] ** -0.5))
            if not name.endswith("q_proj.weight") or condition(tensor) < MAX_CONDITION / 4:
                break  # of 32 random Qs, one or two are too nearly singular to be removed
        digests[name] = writer.write(name, tensor)
    writer.finish(digests)


def condition(matrix: torch.Tensor) -> float:
    """Estimated, 1-norm, of a square matrix."""
    return Basis.of_columns(matrix.double().T, torch.arange(len(matrix))).condition


def uncache_folder(folder: Path) -> None:
    """Take a folder's files out of the system's cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            uncache(file.fileno())


def notebook(folder: Path) -> float:
    """Seconds that one layer takes the notebook way, once its matrices are in fp64."""
    reader = CheckpointReader(folder)

    def read(name: str) -> np.ndarray:
        return reader.tensor(f"model.layers.0.{name}.weight").double().numpy().T

    attention = {name: read(f"self_attn.{name}_proj") for name in "qkvo"}
    gate, up, down = (read(f"mlp.{name}_proj") for name in ("gate", "up", "down"))
    start = time.perf_counter()
    inverse = np.linalg.inv(attention["q"])
    results = [down @ attention["q"], inverse @ attention["k"], inverse @ attention["v"]]
    results += [attention["o"] @ gate, attention["o"] @ up]
    seconds = time.perf_counter() - start
    assert all(np.isfinite(result).all() for result in results)
    return seconds


def child(source: str, destination: str, basis: str, memory: str) -> None:
    """Fuse, and print where the time went."""
    run_task, tensor, write = execution.run_task, CheckpointReader.tensor, CheckpointWriter.write
    spent = {"read": 0.0, "write": 0.0}
    tasks: list[tuple[str, float]] = []

    def timed(name, function):
        def call(*arguments):
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent[name] += time.perf_counter() - start

        return call

    def timed_task(plan, task, read):
        def tensors(begun, done):
            working = time.perf_counter() - begun
            while True:
                begun, reading = time.perf_counter(), spent["read"]
                found = next(done.tensors, None)
                working += time.perf_counter() - begun - (spent["read"] - reading)
                if found is None:
                    break
                yield found
            kind = "+".join(dict.fromkeys(seam.kind for seam in task.seams)) or "copy"
            first = kind == "stream" and task.seams[0].layer == 0
            tasks.append(("embedding" if first else kind, working))

        begun, reading = time.perf_counter(), spent["read"]
        done = run_task(plan, task, read)
        begun += spent["read"] - reading
        return dataclasses.replace(done, tensors=tensors(begun, done))

    execution.run_task = timed_task
    CheckpointReader.tensor = timed("read", tensor)
    CheckpointWriter.write = timed("write", write)
    stamps = []
    start = time.perf_counter()
    fuse(
        source,
        destination,
        basis=basis,
        max_shard_size=SHARD,
        max_memory=int(memory),
        progress=lambda plan, task: stamps.append(time.perf_counter()),
    )
    seconds = time.perf_counter() - start
    peak = peak_memory()
    result = {
        "seconds": seconds,
        "tasks_seconds": stamps[-1] - stamps[0],
        "check_seconds": start + seconds - stamps[-1],
    }
    print(json.dumps({**result, "peak": peak, "spent": spent, "tasks": tasks}))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints [default: a temporary folder]")
    parser.add_argument("--max-memory", type=float, default=3.0, help="GB")
    arguments = parser.parse_args()
    limit = int(arguments.max_memory * 1e9)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source = Path(name) / "source"
        start = time.perf_counter()
        make(source, {**MISTRAL, "num_hidden_layers": arguments.layers})
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        print(f"made {size / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s", flush=True)
        result = {"layers": arguments.layers, "bytes": size, "torch": torch.__version__, "limit": limit, "runs": {}}
        notebooks, rates = [notebook(source)], [measure(lambda most: 0, torch.device("cpu"), 4096).flops]
        for basis in ("q", "pivoted"):
            destination = Path(name) / basis
            plan = plan_fuse(source, destination, Request(basis), SHARD).plan
            uncache_folder(source)
            command = [sys.executable, __file__, "--child", str(source), str(destination), basis, str(limit)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            run = json.loads(done.stdout)
            notebooks.append(notebook(source))
            rates.append(measure(lambda most: 0, torch.device("cpu"), 4096).flops)
            for path in destination.iterdir():
                path.unlink()
            rate = {name: statistics.median(each[name] for each in rates[-2:]) for name in rates[0]}
            roofline = {"stream": 0.0, "p": 0.0, "embedding": 0.0}
            for task in plan.tasks:
                kind = "+".join(dict.fromkeys(seam.kind for seam in task.seams))
                kind = "embedding" if kind == "stream" and task.seams[0].layer == 0 else kind
                if kind in roofline:
                    roofline[kind] += sum(flops / rate[name] for name, flops in cost(plan, task).flops.items())
            spent: dict[str, float] = {}
            for kind, seconds in run.pop("tasks"):
                spent[kind] = spent.get(kind, 0.0) + seconds
            layers = arguments.layers
            counts = {"stream": max(layers - 1, 1), "p": layers}
            layer = sum(spent[kind] / counts[kind] for kind in counts if kind in spent)
            best = sum(roofline[kind] / counts[kind] for kind in counts)
            arithmetic = sum(spent.values())
            run |= {"rates": rate, "arithmetic": arithmetic, "layer": layer, "layer_roofline": best}
            run |= {"roofline": sum(roofline.values()), "times": spent, "rooflines": roofline}
            run["notebook"] = statistics.median(notebooks[-2:])
            run["over_roofline"], run["over_notebook"] = layer / best, run["notebook"] / layer
            d, f, e = (MISTRAL[name] for name in ("hidden_size", "intermediate_size", "num_key_value_heads"))
            products = 2 * d**3 + 6 * d**2 * f + 4 * d**2 * e * MISTRAL["head_dim"]
            run["at_most"] = run["notebook"] / (products / rate["bfloat16"])
            run["disk_adds"] = run["tasks_seconds"] / arithmetic - 1
            result["runs"][basis] = run
            print(f"{basis}: {run['seconds']:.0f} s, of which {arithmetic:.0f} s of arithmetic", end="")
            print(f" and {run['check_seconds']:.0f} s to read it again; peak {run['peak'] / 1e9:.2f} GB")
            print(f"  reading {run['spent']['read']:.0f} s, writing (beside it) {run['spent']['write']:.0f} s:", end="")
            print(f" the tasks take {run['disk_adds']:.1%} longer than their arithmetic")
            print(f"  a layer: {layer:.1f} s; roofline {best:.1f} s: {run['over_roofline']:.2f}x", end="")
            print(f"; notebook {run['notebook']:.1f} s: {run['over_notebook']:.1f}x as fast")
            print(
                f"  (the notebook's FLOPs at the rate of bf16, were they all, would be {run['at_most']:.1f}x as fast)"
            )
            print(f"  GFLOP/s: {', '.join(f'{name} {value / 1e9:.0f}' for name, value in rate.items())}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

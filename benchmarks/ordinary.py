"""An ordinary model of 7 billion weights, folded in its own layout, or stored as a skipless one: seconds and memory.

    python benchmarks/ordinary.py                              # Mistral-7B's shapes, in bf16: 29 GB of disk
    python benchmarks/ordinary.py --layout skipless
    python benchmarks/ordinary.py --model gemma-7b --layers 2  # of any model that `skipless count --list` names

A checkpoint of random weights in the family's own layout is folded in a process of its own, its files out of the
system's cache. The estimate of the plan stands beside what was measured. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mistral import SHARD, uncache_folder
from skipless import fuse
from skipless.checkpoint import family
from skipless.checkpoint.writer import CheckpointWriter, plan_shards, write_json
from skipless.reports.counting import table
from skipless.rewrite.fusion import plan_fuse
from skipless.rewrite.machine import peak_memory
from skipless.rewrite.request import Request


def make(folder: Path, name: str, layers: int | None) -> None:
    """Random weights of unit gain, gains and biases random, too, a tensor at a time."""
    config = {field: value for field, value in table()["models"][name].items() if field != "parameters"}
    if layers is not None:
        (field,) = {"num_hidden_layers", "n_layer", "n_layers"} & config.keys()
        config[field] = layers
    found = family.find(config)
    shapes = family.Layout(found, found.architecture(config), found.prefixes[0], {}).shapes
    folder.mkdir()
    write_json(folder / "config.json", {**config, "dtype": "bfloat16"})
    writer = CheckpointWriter(folder, plan_shards({n: (s, torch.bfloat16) for n, s in shapes.items()}, SHARD))
    generator, digests = torch.Generator().manual_seed(0), {}
    for tensor, shape in shapes.items():
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        values = torch.randn(shape, generator=generator) * scale
        if len(shape) == 1 and tensor.endswith("weight"):
            values += 1 - found.gain_offset
        digests[tensor] = writer.write(tensor, values.bfloat16())
    writer.finish({tensor: digest for tensor, digest in digests.items() if digest is not None})


def child(source: str, destination: str, layout: str) -> None:
    """Fold, and print what was expected, and what it took."""
    expected = plan_fuse(source, destination, Request(layout=layout), SHARD).estimate()
    uncache_folder(Path(source))
    start = time.perf_counter()
    plan = fuse(source, destination, layout=layout, max_shard_size=SHARD)
    before, after = plan.parameters
    moved = plan.neutral or before - after
    measured = {"seconds": time.perf_counter() - start, "peak": peak_memory(), "moved": moved}
    print(json.dumps({**measured, "expected": {"seconds": expected.seconds, "peak": expected.memory}}))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mistral-7b", choices=sorted(table()["models"]), metavar="NAME")
    parser.add_argument("--layers", type=int, help="as many as the model has, unless said")
    parser.add_argument("--layout", default="family", choices=("family", "skipless"))
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints [default: a temporary folder]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source, destination = Path(name) / "source", Path(name) / "folded"
        make(source, arguments.model, arguments.layers)
        size = sum(path.stat().st_size for path in source.iterdir())
        print(f"{arguments.model}: {size / 1e9:.1f} GB", flush=True)
        options = [sys.executable, __file__, "--child", str(source), str(destination), arguments.layout]
        run = json.loads(subprocess.run(options, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])
        expected, verb = run["expected"], "folded" if arguments.layout == "family" else "left out"
        print(
            f"{verb} {run['moved']:,} numbers in {run['seconds']:.0f} s (expected {expected['seconds']:.0f}), peak "
            f"{run['peak'] / 1e9:.2f} GB (expected at most {expected['peak'] / 1e9:.2f})"
        )
    print(
        json.dumps(
            {"model": arguments.model, "layers": arguments.layers, "layout": arguments.layout, "bytes": size, **run}
        )
    )


if __name__ == "__main__":
    main()

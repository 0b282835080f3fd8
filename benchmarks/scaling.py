"""What a fuse of Llama-3.1-405B's shapes costs, by the plan's own numbers, on one machine and on many.

    python benchmarks/scaling.py             # the stated machines: see --help

The checkpoint is config.json and headers in front of as much emptiness as there would be data (bf16, no skips, no
norms); the plan and its costs need no more. Times are a model's, not measured: a machine does one task after the other
at the rate of its matrix products; tasks go, the largest first, to the machine that is free first; sources are read and
results are written through one shared disk; one machine, the driver, receives what the others give, hashes and writes
it, one tensor behind the other, and at the end reads everything again and hashes it. What overlaps counts once.
For two kinds of machine: this one, whose products, disk and SHA-256 are measured, and the one that the options state.
The last line is one JSON object.
"""

import argparse
import hashlib
import heapq
import json
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from skipless.architecture.config import Architecture
from skipless.checkpoint.headers import INDEX
from skipless.checkpoint.reader import CheckpointReader, uncache
from skipless.checkpoint.writer import CheckpointWriter, plan_shards, write_json
from skipless.rewrite.cost import Cost, cost, least
from skipless.rewrite.machine import PRECISIONS, READ, measure
from skipless.rewrite.planning import Plan, make_plan
from skipless.rewrite.request import Request

CONFIG = {
    "model_type": "skipless",
    "hidden_size": 16384,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "intermediate_size": 53248,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "ffn_type": "glu",
    "residual": "none",
    "norm_type": "none",
    "position_type": "rope",
    "dtype": "bfloat16",
}
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
BASES = ("q", "pivoted")
# Of the least possible time: where more machines are said not to help.
ENOUGH = 1.05


@dataclass(frozen=True)
class Machine:
    """FLOP/s by precision; bytes/s of the shared disk, into the driver, and hashed by SHA-256."""

    name: str
    flops: Mapping[str, float]
    disk: float
    network: float
    hashing: float

    def seconds(self, task: Cost) -> float:
        """The arithmetic of a task."""
        return sum(flops / self.flops[precision] for precision, flops in task.flops.items())

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {self.flops[name] / 1e9:,.0f}" for name in PRECISIONS)
        others = f"disk {self.disk / 1e9:.2g}, network {self.network / 1e9:.2g}, SHA-256 {self.hashing / 1e9:.2g} GB/s"
        return f"{self.name}: {rates} GFLOP/s; {others}"


@dataclass(frozen=True)
class Times:
    """Seconds that `machines` machines need: for the arithmetic; what goes on meanwhile; and the check at the end.

    largest: for the largest task alone.
    """

    machines: int
    arithmetic: float
    largest: float
    disk: float
    driver: float
    check: float

    @property
    def bound(self) -> str:
        """What takes longest, before the check."""
        if self.arithmetic >= max(self.disk, self.driver):
            return "largest task" if self.arithmetic == self.largest else "arithmetic"
        return "disk" if self.disk > self.driver else "driver"

    @property
    def total(self) -> float:
        """From the beginning to the end."""
        return max(self.arithmetic, self.disk, self.driver) + self.check


def times(machine: Machine, plan: Plan, costs: Iterable[Cost], count: int) -> Times:
    """By the model that is described above."""
    read, written = plan.bytes
    seconds = [machine.seconds(task) for task in costs]
    received = written / machine.network if count > 1 else 0.0
    return Times(
        count,
        arithmetic=makespan(seconds, count),
        largest=max(seconds),
        disk=(read + written) / machine.disk,
        driver=max(received, written * (1 / machine.disk + 1 / machine.hashing)),
        check=written * (1 / machine.disk + 1 / machine.hashing),
    )


def machines_enough(machine: Machine, plan: Plan, costs: list[Cost]) -> Times:
    """With the fewest machines that come near the least possible."""
    least = times(machine, plan, costs, len(costs)).total
    every = (times(machine, plan, costs, count) for count in range(1, len(costs) + 1))
    return next(row for row in every if row.total <= ENOUGH * least)


def makespan(seconds: Iterable[float], count: int) -> float:
    """When the last of `count` machines is done, if each takes the largest task that is left."""
    free = [0.0] * count
    for task in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + task)
    return max(free)


def write_headers(folder: Path, config: Mapping[str, object]) -> None:
    """A model folder whose shards hold headers and, on disk, nothing else."""
    shapes = Architecture.from_config(config).tensors()
    tensors = plan_shards({name: (shape, torch.bfloat16) for name, shape in shapes.items()}, 5 * 10**9)
    CheckpointWriter(folder, tensors)
    total = sum(info.bytes for info in tensors.values())
    weight_map = {name: info.shard for name, info in tensors.items()}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", config)


def this_machine(folder: Path, network: float) -> Machine:
    """What is measured here."""
    file = folder / "data"
    data = os.urandom(READ)
    with file.open("wb") as stream:
        stream.write(data)
        os.fsync(stream.fileno())

    def read(most: int) -> int:
        with file.open("rb", buffering=0) as stream:
            uncache(stream.fileno(), most)
            return len(stream.read(most))

    rates = measure(read, torch.device("cpu"))
    start = time.perf_counter()
    hashlib.sha256(data).digest()
    hashing = READ / (time.perf_counter() - start)
    name = f"this machine ({platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__})"
    return Machine(name, rates.flops, rates.disk, network, hashing)


def kinds(plan: Plan, costs: Iterable[Cost]) -> dict[str, dict[str, float]]:
    """Number, FLOPs, bytes and memory of the tasks of each kind."""
    found: dict[str, Counter[str]] = {}
    for task, spent in zip(plan.tasks, costs, strict=True):
        kind = " + ".join(dict.fromkeys(seam.kind for seam in task.seams)) or "copy"
        row = found.setdefault(kind, Counter())
        row.update({"tasks": 1, **spent.flops})
        row["read"] += sum(plan.inputs[name].bytes for name in task.reads)
        row["written"] += sum(plan.outputs[name].bytes for name in task.writes)
        row["memory"] = max(row["memory"], spent.memory)
    return {kind: dict(row) for kind, row in found.items()}


def kind_lines(rows: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """One line for each kind, and one for all."""
    together: Counter[str] = Counter()
    for row in rows.values():
        together.update({name: value for name, value in row.items() if name != "memory"})
    together["memory"] = int(max(row["memory"] for row in rows.values()))
    columns = "".join(f"{name:>10}" for name in PRECISIONS)
    yield f"{'task':12}{'count':>7}{columns}{'read, GB':>12}{'written, GB':>13}{'memory, GB':>12}"
    for kind, row in {**rows, "all": together}.items():
        flops = "".join(f"{row[name]:10.2g}" if row.get(name) else f"{'-':>10}" for name in PRECISIONS)
        sizes = f"{row['read'] / 1e9:12,.1f}{row['written'] / 1e9:13,.1f}{row['memory'] / 1e9:12,.1f}"
        yield f"{kind:12}{row['tasks']:7.0f}{flops}{sizes}"


def time_lines(rows: Iterable[Times]) -> Iterator[str]:
    """One line for each number of machines, in hours."""
    names = ("arithmetic", "disk", "driver", "check", "total")
    yield f"{'machines':>8}{''.join(f'{name:>12}' for name in names)}   bound by"
    for row in rows:
        hours = "".join(f"{getattr(row, name) / 3600:12,.2f}" for name in names)
        yield f"{row.machines:8}{hours}   {row.bound}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gflops-bf16", type=float, default=4000, help="of the stated machine (%(default)s)")
    parser.add_argument("--gflops-fp32", type=float, default=3000, help="(%(default)s)")
    parser.add_argument("--gflops-fp64", type=float, default=1500, help="(%(default)s)")
    parser.add_argument("--disk", type=float, default=2.0, help="GB/s of the stated shared disk (%(default)s)")
    parser.add_argument("--network", type=float, default=1.25, help="GB/s into the driver, of both (%(default)s)")
    parser.add_argument("--hash", type=float, default=1.5, help="GB/s of SHA-256 of the stated machine (%(default)s)")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    arguments = parser.parse_args()
    config = {**CONFIG, "num_hidden_layers": arguments.layers}
    rates = (arguments.gflops_fp64, arguments.gflops_fp32, arguments.gflops_bf16)
    stated = Machine(
        "a machine as stated",
        {name: 1e9 * rate for name, rate in zip(PRECISIONS, rates, strict=True)},
        *(1e9 * rate for rate in (arguments.disk, arguments.network, arguments.hash)),
    )
    result: dict[str, object] = {"config": config}
    with tempfile.TemporaryDirectory() as temporary:
        machines = {"here": this_machine(Path(temporary), 1e9 * arguments.network), "stated": stated}
        folder = Path(temporary) / "model"
        folder.mkdir()
        write_headers(folder, config)
        for basis in BASES:
            start = time.perf_counter()
            plan = make_plan(CheckpointReader(folder), Request(basis=basis))
            took = time.perf_counter() - start
            costs = [cost(plan, task) for task in plan.tasks]
            before, after = plan.parameters
            print(f"\nbasis {basis}: {before:,} weights before, {after:,} after; planned in {took:.1f} s\n")
            rows = kinds(plan, costs)
            print("\n".join(kind_lines(rows)))
            smaller = least(plan)
            memory = max(cost(smaller, task).memory for task in smaller.tasks)
            print(f"where that does not fit, by rows: {memory / 1e9:.1f} GB")
            found: dict[str, object] = {"weights": plan.parameters, "bytes": plan.bytes, "kinds": rows}
            found["memory_by_rows"] = memory
            for name, machine in machines.items():
                table = [times(machine, plan, costs, count) for count in COUNTS]
                enough = machines_enough(machine, plan, costs)
                print(f"\n{machine}\nhours:\n")
                print("\n".join(time_lines(table)))
                print(
                    f"the largest task takes {enough.largest / 60:,.1f} minutes; {enough.machines} machines take "
                    f"{enough.total / 3600:,.2f} hours, at most {ENOUGH - 1:.0%} more than any number would"
                )
                found[name] = {
                    "rates": {**machine.flops, "disk": machine.disk, "network": machine.network}
                    | {"sha256": machine.hashing},
                    "enough": enough.machines,
                    "times": [{**vars(row), "total": row.total, "bound": row.bound} for row in table],
                }
            result[basis] = found
    print(json.dumps(result))


if __name__ == "__main__":
    main()

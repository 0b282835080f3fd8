"""What a task costs, from shapes and dtypes alone: FLOPs, step by step as execution.py takes them, and memory; and what
a plan costs on this machine: bytes, time, and the memory that it must stay below.

Each removal counts its own (removals/), terms of third order alone.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from skipless.algebra.linalg import block_rows
from skipless.algebra.tolerances import dtype_name
from skipless.checkpoint.reader import TensorInfo
from skipless.errors import InputError
from skipless.removals import removal
from skipless.rewrite.execution import COPIED, setting
from skipless.rewrite.machine import Rates
from skipless.rewrite.planning import Plan, Task, in_turn

# Beside what is counted: Python's own, vectors, and the buffers of BLAS.
OVERHEAD = 96 * 2**20


@dataclass(frozen=True)
class Cost:
    """FLOPs by precision, and the bytes that a task holds at most, beside what the process held before."""

    flops: Mapping[str, float]
    memory: int

    @property
    def total(self) -> float:
        """FLOPs in any precision."""
        return sum(self.flops.values())


def cost(plan: Plan, task: Task) -> Cost:
    """FLOPs and memory of a task."""
    flops: dict[str, float] = {}
    for dtype, count in steps(plan, task).values():
        flops[dtype] = flops.get(dtype, 0.0) + count
    return Cost(flops, _memory(plan, task))


def needed(plan: Plan, tasks: Iterable[Task]) -> int:
    """Bytes that running tasks adds to the process: those of the largest task, and of what waits to be written."""
    return max((cost(plan, task).memory for task in tasks), default=0) + waiting(plan)


def least(plan: Plan) -> Plan:
    """The plan with each task by rows for which that saves memory."""
    every = plan.by_rows(plan.tasks)
    pairs = zip(plan.tasks, every.tasks, strict=True)
    return plan.by_rows([task for task, other in pairs if cost(every, other).memory < cost(plan, task).memory])


def waiting(plan: Plan) -> int:
    """Bytes of the largest piece that a task hands out. One piece may wait to be written."""
    return max(_piece(plan, task, name) for task in plan.tasks for name in task.writes)


def _piece(plan: Plan, task: Task, name: str) -> int:
    """Bytes of the pieces in which a task hands out a tensor."""
    info = plan.outputs[name]
    if not task.seams:
        return _copied(plan.renamed[name]) * info.dtype.itemsize // plan.renamed[name].dtype.itemsize
    if task.by_rows and setting(plan, task).is_table(name.rpartition(".")[0]):
        return min(info.bytes, block_rows(info.shape[1]) * info.row_bytes)
    return info.bytes


def _copied(info: TensorInfo) -> int:
    """Bytes of the pieces in which a tensor is copied."""
    return min(info.bytes, max(COPIED, info.row_bytes))


def steps(plan: Plan, task: Task) -> dict[str, tuple[str, float]]:
    """The task's steps in their order: name -> precision, FLOPs."""
    flops_of: dict[str, tuple[str, float]] = {}
    for number, (seam, earlier, later) in enumerate(in_turn(task.seams)):
        for name, dtype, count in removal(seam).steps(seam, setting(plan, task, earlier, later)):
            key = f"{seam.kind} seam: {name}" if len(task.seams) == 1 else f"{seam.kind} seam {number}: {name}"
            kind, before = flops_of.get(key, (dtype_name(dtype), 0.0))
            flops_of[key] = (kind, before + count)
    return flops_of


def _memory(plan: Plan, task: Task) -> int:
    """Bytes at most: of the largest of the seams, with what is read for it and what earlier ones have left."""
    if not task.seams:
        (name,) = task.writes
        return OVERHEAD + _copied(plan.renamed[name]) + _piece(plan, task, name)
    inputs, _ = plan.canonical
    largest, left = 0.0, dict[str, float]()
    for seam, earlier, later in in_turn(task.seams):
        own = [name for name in seam.modules if name in plan.modules[0]]
        read = sum(inputs[f"{name}.weight"].bytes for name in own if name not in left)
        held = read + sum(left.values()) + sum(inputs[name].bytes for name in seam.mixed)
        needed = removal(seam).memory(seam, setting(plan, task, earlier, later))
        if len(task.seams) > 1:  # what it gives, as it is handed out
            needed += sum(8.0 * inputs[f"{name}.weight"].weights for name in own if name not in later)
        largest = max(largest, held + needed)
        left = {name: size for name, size in left.items() if name not in own}
        left |= {name: 8.0 * inputs[f"{name}.weight"].weights for name in later if name in own}
    return OVERHEAD + int(largest)


@dataclass(frozen=True)
class Estimate:
    """The cost of every task, and all of them together.

    costs: one a task. rates: this machine's. memory: bytes that the process will hold at most, with all that it held
    before. Seconds are those of the arithmetic, of the disk, which reads and writes meanwhile, and, at the end, of
    checking what was written.
    """

    plan: Plan
    costs: tuple[Cost, ...]
    rates: Rates
    memory: int

    @property
    def flops(self) -> Mapping[str, float]:
        """FLOPs by precision."""
        total: Counter[str] = Counter()
        for each in self.costs:
            total.update(each.flops)
        return total

    def seconds_of(self, task_cost: Cost) -> float:
        """Seconds of a task's arithmetic."""
        return sum(flops / self.rates.flops[name] for name, flops in task_cost.flops.items())

    @property
    def arithmetic(self) -> float:
        """Seconds of all arithmetic."""
        return sum(map(self.seconds_of, self.costs))

    @property
    def disk(self) -> float:
        """Seconds of reading and writing every tensor once."""
        return sum(self.plan.bytes) / self.rates.disk

    @property
    def check(self) -> float:
        """Seconds of reading the result again, and then both source and result to compare them."""
        return (sum(self.plan.bytes) + self.plan.bytes[1]) / self.rates.disk

    @property
    def seconds(self) -> float:
        """Seconds in all."""
        return max(self.arithmetic, self.disk) + self.check

    def to_json(self) -> dict[str, object]:
        """Everything, task by task, for --json."""
        tasks = [
            {
                "seams": [f"{seam.kind} {seam.layer}" for seam in task.seams],
                "reads": {name: self.plan.inputs[name].bytes for name in task.reads},
                "writes": {name: self.plan.outputs[name].bytes for name in task.writes},
                "flops": dict(each.flops),
                "memory": each.memory,
                "by_rows": task.by_rows,
            }
            for task, each in zip(self.plan.tasks, self.costs, strict=True)
        ]
        seconds = {"arithmetic": self.arithmetic, "disk": self.disk, "check": self.check, "all": self.seconds}
        rates = {**self.rates.flops, "disk": self.rates.disk}
        return {"flops": dict(self.flops), "memory": self.memory, "seconds": seconds, "rates": rates} | {
            "shards": self.plan.shards,
            "tasks": tasks,
        }


def estimate(plan: Plan, rates: Rates, held: int) -> Estimate:
    """What a plan costs where the process already holds `held` bytes."""
    return Estimate(plan, tuple(cost(plan, task) for task in plan.tasks), rates, held + needed(plan, plan.tasks))


def within_memory(plan: Plan, held: int, limit: int) -> Plan:
    """The plan, with its largest tasks by rows until all fit in `limit` bytes beside the `held` that are taken already.

    Raises InputError if no such plan fits.
    """
    smaller: dict[int, list[Task]] = {}
    for task, other in zip(plan.tasks, least(plan).tasks, strict=True):
        if other.by_rows:
            smaller.setdefault(cost(plan, task).memory, []).append(task)
    while (memory := held + needed(plan, plan.tasks)) > limit and smaller:
        plan = plan.by_rows(smaller.pop(max(smaller)))
    if memory > limit:
        largest = max(plan.tasks, key=lambda task: cost(plan, task).memory)
        raise InputError(
            f"{largest.writes[0]}: expected at most {limit / 1e9:.1f} GB of memory, found that computing it takes "
            f"{memory / 1e9:.1f} GB; use --max-memory, or a machine that has more"
        )
    return plan

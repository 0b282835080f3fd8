"""Estimate a plan's FLOPs, bytes, memory and time from shapes and this machine's measured rates."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from skipless.errors import InputError
from skipless.rewrite.cost import Cost, cost, least, needed
from skipless.rewrite.machine import Rates
from skipless.rewrite.planning import Plan, Task


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

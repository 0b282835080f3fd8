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
    """The cost of every task, and what they come to.

    costs: by task; rates: this machine's; memory: bytes that the process will hold at most, all it held before
    included. Seconds: of the arithmetic; of the disk, which reads and writes meanwhile; of reading what was written
    again, at the end.
    """

    plan: Plan
    costs: tuple[Cost, ...]
    rates: Rates
    memory: int

    @property
    def flops(self) -> Mapping[str, float]:
        """FLOPs by precision."""
        total: Counter[str] = Counter()
        for found in self.costs:
            total.update(found.flops)
        return total

    def seconds_of(self, found: Cost) -> float:
        """Seconds of a task's arithmetic."""
        return sum(flops / self.rates.flops[name] for name, flops in found.flops.items())

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
                "flops": dict(found.flops),
                "memory": found.memory,
                "by_rows": task.by_rows,
            }
            for task, found in zip(self.plan.tasks, self.costs, strict=True)
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
    """The plan, with as many of its largest tasks by rows as it takes for a process that holds `held` bytes already to
    stay within `limit`. Raises InputError if that is not enough.
    """
    smaller: dict[int, list[Task]] = {}
    for task, other in zip(plan.tasks, least(plan).tasks, strict=True):
        if other.by_rows:
            smaller.setdefault(cost(plan, task).memory, []).append(task)
    while (found := held + needed(plan, plan.tasks)) > limit and smaller:
        plan = plan.by_rows(smaller.pop(max(smaller)))
    if found > limit:
        largest = max(plan.tasks, key=lambda task: cost(plan, task).memory)
        raise InputError(
            f"{largest.writes[0]}: expected at most {limit / 1e9:.1f} GB of memory, found that computing it takes "
            f"{found / 1e9:.1f} GB; use --max-memory, or a machine that has more"
        )
    return plan

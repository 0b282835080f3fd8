"""Who carries out a plan's tasks: this process, one after the other, or Ray's workers."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from skipless.checkpoint.reader import CheckpointReader
from skipless.closing import Done, run_task
from skipless.planning import Plan

# Carries out the tasks of these numbers, and hands out what each gives, in any order.
Engine = Callable[[Plan, CheckpointReader, Sequence[int]], Iterator[tuple[int, Done]]]


def run_local(plan: Plan, reader: CheckpointReader, todo: Sequence[int]) -> Iterator[tuple[int, Done]]:
    """One task after the other in this process, while what the next one reads is fetched from the disk."""
    with ThreadPoolExecutor(1, "reading") as ahead:
        for number, following in zip(todo, [*todo[1:], None], strict=True):
            if following is not None:
                ahead.submit(reader.warm, plan.tasks[following].reads)
            yield number, run_task(plan, plan.tasks[number], reader.tensor)


ENGINES: dict[str, Engine] = {"local": run_local}

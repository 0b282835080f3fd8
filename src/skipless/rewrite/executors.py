"""Who carries out a plan's tasks: this process, one after the other, or Ray's workers (cluster.py)."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from threading import Event

from skipless.checkpoint.reader import CheckpointReader
from skipless.errors import InputError
from skipless.rewrite.cost import needed
from skipless.rewrite.execution import Results, run_digested
from skipless.rewrite.machine import freed_memory_kept, resident_memory
from skipless.rewrite.planning import Plan

# Carries out the tasks of these numbers.
Executor = Callable[[Plan, CheckpointReader, Sequence[int]], Results]


def run_local(plan: Plan, reader: CheckpointReader, todo: Sequence[int]) -> Results:
    """One task after the other in this process, while what the next one reads is fetched from the disk."""
    ahead, stopped = ThreadPoolExecutor(1, "reading"), Event()
    most = needed(plan, [plan.tasks[number] for number in todo])
    try:
        with freed_memory_kept(resident_memory() + most):
            for number, following in zip(todo, [*todo[1:], None], strict=False):
                if following is not None:
                    ahead.submit(reader.warm, plan.tasks[following].reads, stopped.is_set)
                done = run_digested(plan, plan.tasks[number], reader)
                with closing(done.tensors):  # left to the garbage collector, it would join its thread from any other
                    yield number, done
    finally:
        stopped.set()
        ahead.shutdown(cancel_futures=True)


def run_ray(plan: Plan, reader: CheckpointReader, todo: Sequence[int], address: str | None = None) -> Results:
    """Many tasks at a time, on the machines of the Ray cluster at `address` (None: on this one). See cluster.run."""
    from skipless.rewrite import cluster

    yield from cluster.run(plan, reader, todo, address)


EXECUTORS: dict[str, Executor] = {"local": run_local, "ray": run_ray}


def choose_executor(name: str, address: str | None = None) -> Executor:
    """The executor of that name. Raises InputError if it does not exist or cannot run here."""
    if name not in EXECUTORS:
        raise InputError(f"engine: expected one of {', '.join(EXECUTORS)}, found {name!r}")
    if name != "ray":
        if address is not None:
            raise InputError(f"address: expected none with engine {name}, found {address!r}; use --engine ray")
        return EXECUTORS[name]
    if find_spec("ray") is None:
        raise InputError("engine: expected Ray for 'ray', found none installed; pip install 'skipless[ray]'")
    return partial(run_ray, address=address)

"""Who carries out a plan's tasks: this process, one after the other, or Ray's workers (cluster.py)."""

import dataclasses
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from threading import Event

import numpy
import scipy
import torch

from skipless import __version__
from skipless.checkpoint.digests import Digests
from skipless.checkpoint.reader import CheckpointReader
from skipless.closing import Done, run_task
from skipless.cost import needed
from skipless.errors import InputError
from skipless.machine import freed_memory_kept, resident_memory
from skipless.planning import Plan, Task

# What each task gives, in any order; closed before its end, it stops what it has begun.
Results = Generator[tuple[int, Done], None, None]
# Carries out the tasks of these numbers.
Engine = Callable[[Plan, CheckpointReader, Sequence[int]], Results]


def run_digested(plan: Plan, task: Task, reader: CheckpointReader) -> Done:
    """Carry out one task, as closing.run_task does, and take the SHA-256 of what it reads."""
    digests = Digests(reader, overwritten=task.by_rows)
    done = run_task(plan, task, digests.tensor)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        with digests:
            yield from done.tensors
            done.sources.update(digests.finish())

    return dataclasses.replace(done, tensors=tensors())


def run_local(plan: Plan, reader: CheckpointReader, todo: Sequence[int]) -> Results:
    """One task after the other in this process, while what the next one reads is fetched from the disk."""
    ahead, stopped = ThreadPoolExecutor(1, "reading"), Event()
    most = needed(plan, [plan.tasks[number] for number in todo])
    try:
        with freed_memory_kept(resident_memory() + most):
            for number, following in zip(todo, [*todo[1:], None], strict=False):
                if following is not None:
                    ahead.submit(reader.warm, plan.tasks[following].reads, stopped.is_set)
                yield number, run_digested(plan, plan.tasks[number], reader)
    finally:
        stopped.set()
        ahead.shutdown(cancel_futures=True)


def run_ray(plan: Plan, reader: CheckpointReader, todo: Sequence[int], address: str | None = None) -> Results:
    """Many tasks at a time, on the machines of the Ray cluster at `address` (None: on this one). See cluster.run."""
    from skipless import cluster

    yield from cluster.run(plan, reader, todo, address)


ENGINES: dict[str, Engine] = {"local": run_local, "ray": run_ray}


def choose_engine(name: str, address: str | None = None) -> Engine:
    """The engine of that name. Raises InputError if there is none, or if it cannot run here."""
    if name not in ENGINES:
        raise InputError(f"engine: expected one of {', '.join(ENGINES)}, found {name!r}")
    if name != "ray":
        if address is not None:
            raise InputError(f"address: expected none with engine {name}, found {address!r}; use --engine ray")
        return ENGINES[name]
    if find_spec("ray") is None:
        raise InputError("engine: expected Ray for 'ray', found none installed; pip install 'skipless[ray]'")
    return partial(run_ray, address=address)


def environment() -> dict[str, object]:
    """What must be the same for a task to give the same, bit for bit: versions, the CPU's kind, and threads."""
    return {
        "skipless": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "blas_threads": blas_threads(),
    }


def blas_threads() -> int:
    """On how many threads numpy's and scipy's OpenBLAS computes: what it is told when it is loaded, or all cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = (os.environ.get(name, "") for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"))
    return min(cores, next((int(value) for value in told if value.isdecimal() and int(value)), cores))

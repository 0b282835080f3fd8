"""What this machine is: on what of it a task's bits depend, its speed, measured in about a second, and its memory."""

import ctypes
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Event, Thread

import numpy
import psutil
import scipy
import torch

from skipless.algebra.linalg import multiply
from skipless.version import __version__

# Side of the matrices that are multiplied, and how often.
SIZE, ROUNDS = 1536, 3
# Bytes read to time the disk.
READ = 2**27
PRECISIONS = ("float64", "float32", "bfloat16")
# Parameters of glibc's mallopt: how much may be free at the heap's end before it is given back (-1: anything), and how
# many blocks may lie outside the heap, each given back as it is freed. OWN: glibc's, the first as large blocks make it.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
OWN = {M_TRIM_THRESHOLD: 2**26, M_MMAP_MAX: 65536}
KEPT = {M_TRIM_THRESHOLD: -1, M_MMAP_MAX: 0}
# Seconds between looks at how much memory the process holds.
INTERVAL = 0.05


def environment() -> dict[str, object]:
    """What a task's bits depend on: versions, the CPU's kind, and threads."""
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
    """The threads of numpy's and scipy's OpenBLAS: as set when it is loaded, or all cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = (os.environ.get(name, "") for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"))
    return min(cores, next((int(value) for value in told if value.isdecimal() and int(value)), cores))


@dataclass(frozen=True)
class Rates:
    """FLOP/s of matrix products by precision, and bytes/s read from a disk."""

    flops: Mapping[str, float]
    disk: float


def measure(read: Callable[[int], int], device: torch.device, size: int = SIZE) -> Rates:
    """Time products of (size, size) matrices on `device`, and `read`.

    read: reads at most that many bytes from the disk, and returns how many it has read.
    """
    flops = {}
    for name in PRECISIONS:
        left = torch.randn(size, size, device=device).to(getattr(torch, name))
        flops[name] = 2 * size**3 / _seconds(lambda left=left: multiply(left, left).ravel()[0].item())  # type: ignore[misc]
    start = time.perf_counter()
    count = read(READ)
    return Rates(flops, max(count, 1) / (time.perf_counter() - start))


def _seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)


def available_memory() -> int:
    """Bytes that can be used without swapping: the system's figure, or what the control group (v2) has left."""
    bounds, group = [psutil.virtual_memory().available], Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError, KeyError):  # there is none, or its limit is "max"
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = int(used["active_file"]) + int(used["inactive_file"])  # given back when it is needed
        limit, current = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        bounds.append(limit - current + cache)
    return max(0, min(bounds))


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes.

    Linux's getrusage would say that of the process that started this one, if that is more.
    """
    status = Path("/proc/self/status")
    if not status.exists():  # macOS, where it counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def resident_memory() -> int:
    """The resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


@contextmanager
def freed_memory_kept(limit: int) -> Iterator[None]:
    """Let the memory of one large tensor be used for the next: given back, the system would have to clear it each time.

    What is free is given back at the end, and when the process holds more than `limit` bytes. Where malloc is not
    glibc's, nothing is different.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    ended = Event()

    def watch() -> None:
        while not ended.wait(INTERVAL):
            if resident_memory() > limit:
                libc.malloc_trim(0)

    for parameter, value in KEPT.items():
        libc.mallopt(parameter, value)
    watching = Thread(target=watch, name="watching memory", daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()
        for parameter, value in OWN.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)

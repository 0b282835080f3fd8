"""What this machine does a second, and how much memory it has. Measured, in about a second."""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch

from skipless.products import multiply

# Side of the matrices that are multiplied, and how often.
SIZE, ROUNDS = 1536, 3
# Bytes read to time the disk.
READ = 2**27
PRECISIONS = ("float64", "float32", "bfloat16")


@dataclass(frozen=True)
class Rates:
    """FLOP/s of matrix products by precision, and bytes/s read from a disk."""

    flops: Mapping[str, float]
    disk: float


def measure(file: Path, device: torch.device, size: int = SIZE) -> Rates:
    """Time products of matrices of `size` rows and columns on `device`, and reading the first READ bytes of `file`,
    past the system's cache if it lets us.
    """
    flops = {}
    for name in PRECISIONS:
        left = torch.randn(size, size, device=device).to(getattr(torch, name))
        flops[name] = 2 * size**3 / _seconds(lambda left=left: multiply(left, left).ravel()[0].item())  # type: ignore[misc]
    return Rates(flops, _read_rate(file))


def _seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)


def _read_rate(file: Path) -> float:
    with file.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, READ, os.POSIX_FADV_DONTNEED)
        block, count = bytearray(2**23), 0
        start = time.perf_counter()
        while count < READ and (got := stream.readinto(block)):
            count += got
        return max(count, 1) / (time.perf_counter() - start)


def available_memory() -> int:
    """Bytes that can be used without swapping: what the system says, or the limit of our control group (v2)."""
    found = [psutil.virtual_memory().available]
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    with suppress(OSError, ValueError):  # there is none, or it says "max"
        found.append(int(limit.read_text()) - int(used.read_text()))
    return max(0, min(found))


def resident_memory() -> int:
    """Bytes that this process holds."""
    return int(psutil.Process().memory_info().rss)

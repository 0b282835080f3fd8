"""The environment that a task's bits depend on."""

import os

import numpy
import scipy
import torch

from skipless.version import __version__


def environment() -> dict[str, object]:
    """Versions, the CPU's kind, and threads."""
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

"""Underflow of tensors that are only cast: numbers below their new dtype's smallest become zero.

Rounding leaves each number off by the dtype's relative error. A tensor that is off by more holds numbers that are too
small for it, and rewriting does not come into it; larger ones than it can hold, which become infinity, are refused
where they are written (execution.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from skipless.algebra.linalg import block_rows, slices
from skipless.algebra.rounding import rounding_error
from skipless.algebra.tolerances import dtype_name
from skipless.checkpoint.opening import Read
from skipless.checkpoint.reader import TensorInfo

# What casting a tensor costs at most, in rounding errors of the dtype. One that loses more loses small numbers.
CAST = 3.0


@dataclass(frozen=True)
class Underflow:
    """A tensor that a dtype is too coarse for. zeros: part of its numbers that become zero; error: relative."""

    name: str
    dtype: str
    zeros: float
    error: float

    def __str__(self) -> str:
        return (
            f"{self.name}: expected numbers that {self.dtype} can hold, found {self.zeros:.2%} so small that they "
            f"become zero, a relative error of {self.error:.1e}; use --dtype float32 or bfloat16"
        )


def underflows(
    before: Mapping[str, TensorInfo], after: Mapping[str, torch.dtype], read: Read, vectors: bool = False
) -> Iterator[Underflow]:
    """The tensors that lose small numbers when they are cast to these dtypes.

    vectors: look at biases and gains alone, not at matrices. What they lose may be little beside what they are added
    to, or all of it.
    """
    for name, dtype in after.items():
        info = before[name]
        if info.is_index:
            continue
        finer = torch.finfo(info.dtype).smallest_normal >= torch.finfo(dtype).smallest_normal
        if finer or vectors != (len(info.shape) < 2):
            continue
        rows = slices(info.shape[0], block_rows(info.weights // max(1, info.shape[0])))
        total, lost, zeros = 0.0, 0.0, 0
        for part in (read(name, each) for each in rows):
            exact, cast = part.double(), part.to(dtype).double()
            total += exact.square().sum().item()
            lost += (cast - exact)[cast.isfinite()].square().sum().item()
            zeros += int(((cast == 0) & (exact != 0)).sum())
        error = (lost / total) ** 0.5 if total else 0.0
        if error > CAST * rounding_error(dtype):
            yield Underflow(name, dtype_name(dtype), zeros / info.weights, error)

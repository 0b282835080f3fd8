"""A matrix of which only some rows are in memory at a time, for those that do not fit whole."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

# Which rows: consecutive ones, from start to stop, or those of these numbers.
Which = slice | Tensor


@dataclass(frozen=True)
class Rows:
    """A matrix (n, d) whose rows are made when they are asked for, each time anew.

    It stands in for a Tensor of which only rows are taken; `make` gives them. origin: the matrix in memory, if there is
    one, from whose rows they are made, row by row.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    make: Callable[[Which], Tensor]
    origin: Tensor | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: Which) -> Tensor:
        return self.make(which)

    def map(self, function: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype) -> Any:
        """The matrix (n, width) that `function` makes of some rows at a time, each row by itself."""
        return Rows((len(self), width), dtype, self.device, lambda which: function(self.make(which)), self.origin)


# What may be either; to a type checker, a Tensor.
if TYPE_CHECKING:
    Matrix = Tensor
else:
    Matrix = Tensor | Rows

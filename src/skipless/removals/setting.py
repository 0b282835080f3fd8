"""What a removal is told of the checkpoint that it works on, and what it gives."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skipless.algebra.affine import Affine
from skipless.algebra.forecast import Forecast, Outcome, Way
from skipless.architecture.config import Architecture, Module
from skipless.architecture.seams import Seam
from skipless.checkpoint.reader import TensorInfo

# What remains of a seam's modules, the order of inputs or outputs that goes with them, and what closing it has cost.
Closed = tuple[dict[str, Affine], Tensor | None, Outcome]
# A step's name, the precision of its arithmetic, its FLOPs.
Step = tuple[str, torch.dtype, float]


@dataclass(frozen=True)
class Setting:
    """How the tensors of a task are stored before and after, for one of its seams.

    basis: by which streams are closed. inputs, outputs: tensor name -> what is stored. modules: the source's, by name.
    earlier, later: modules that another seam of the task has rewritten, and modules that one will, which stay in fp64
    till then. by_rows: whether what a stream's writers become is computed anew for each use.
    """

    architecture: Architecture
    basis: str
    inputs: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]
    modules: Mapping[str, Module]
    earlier: frozenset[str] = frozenset()
    later: frozenset[str] = frozenset()
    by_rows: bool = False

    def info(self, name: str) -> TensorInfo:
        """What is stored of a module's weight before."""
        return self.inputs[f"{name}.weight"]

    def size(self, name: str) -> int:
        """How many weights a module has before."""
        return self.info(name).weights

    def stored(self, name: str) -> torch.dtype:
        """The dtype of what becomes of a module, in the result."""
        return self.outputs[f"{name}.weight"].dtype

    def kept(self, name: str) -> torch.dtype:
        """The same; fp64 if a later seam is yet to rewrite it."""
        return torch.float64 if name in self.later else self.stored(name)

    def is_table(self, name: str) -> bool:
        """Whether a module is a table, of which one row is looked up."""
        return name in self.modules and self.modules[name].table


def whole(seam: Seam, setting: Setting) -> float:
    """Bytes of all that a seam reads, in fp64, and of what is made of it."""
    return sum((24.0 * setting.size(name) for name in seam.modules if name in setting.modules), 0.0)


def nothing_lost(
    seam: Seam,
    affines: Mapping[str, Affine],
    dtypes: Sequence[str],
    ways: Iterable[str] | None = None,
    rest_dtype: str | None = None,
    later: frozenset[str] = frozenset(),
) -> Forecast:
    """The forecast where nothing is solved for: nothing is lost but by one rounding, as in the original."""
    nothing: dict[str, dict[str, float]] = {dtype: {} for dtype in dtypes}
    return Forecast(seam, nothing, {way: Way(None, None, nothing) for way in seam.identities})


def no_steps(seam: Seam, setting: Setting) -> Iterator[Step]:
    """No steps of third order: every number is touched once."""
    return iter(())

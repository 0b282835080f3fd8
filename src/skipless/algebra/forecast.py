"""What storing a model in some dtype will cost, before doing it, or has cost: relative errors of q, k, v and M.

Inputs are taken as white, rounding errors as independent with a relative size that the dtype sets. Every error then is
a sum of squares, of G = E[x^T x], of the pivots of the metrics that rounding.py rounds under, and of R; where those
would take longer than the rounding itself, it is the mean of a sample.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from skipless.algebra.affine import Affine
from skipless.algebra.linalg import blocks, max_abs, product, squares
from skipless.algebra.rounding import rounding_error, subnormal_power
from skipless.algebra.rows import Matrix
from skipless.algebra.tolerances import tolerance
from skipless.architecture.seams import Seam
from skipless.dtypes import DTYPE_NAMES

# Sampled errors: those of q, k or v, a sum over at least as many, are then right to a few per cent.
PROBES = 512


@dataclass(frozen=True)
class Way:
    """A way to close a seam.

    condition: estimated condition number, 1-norm, of the columns that become the identity; largest: max |R|, rows and
    columns scaled by what errors count there (both None where nothing is solved for, as in a P-M seam).
    errors: dtype -> letter of what is read -> the expected relative error when stored in that dtype; infinite if the
    way cannot be gone, or if the dtype cannot hold the numbers. Letters: q, k, v, m, and logits of a tied head.
    """

    condition: float | None
    largest: float | None
    errors: Mapping[str, Mapping[str, float]]

    @property
    def usable(self) -> bool:
        """Whether it can be gone at all, in exact enough arithmetic."""
        return self.largest != math.inf

    def worst(self, dtype: str) -> float:
        """The largest of the errors in a dtype."""
        return max(self.errors[dtype].values())


@dataclass(frozen=True)
class Outcome:
    """A seam that has been closed by `way` and stored in `dtype`.

    errors, original: as in Way and Forecast, of that dtype; empty where nothing is solved for. problem: why that loses
    too much, or None.
    """

    kind: str
    layer: int
    way: str
    dtype: str
    errors: Mapping[str, float]
    original: Mapping[str, float]
    problem: str | None = None

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "Outcome":
        """What dataclasses.asdict gave. Raises ValueError for anything else."""
        if {field.name for field in dataclasses.fields(cls)} != fields.keys():
            raise ValueError("other fields")
        words = (fields[name] for name in ("kind", "way", "problem") if fields[name] is not None)
        if not all(isinstance(word, str) and word.isprintable() for word in words):
            raise ValueError("no words")
        if type(fields["layer"]) is not int or fields["dtype"] not in DTYPE_NAMES:
            raise ValueError("no layer, or no dtype")
        if not all(map(_are_errors, (fields["errors"], fields["original"]))):
            raise ValueError("no errors")
        return cls(**fields)


def _are_errors(value: object) -> bool:
    """Whether a JSON value is the errors of q, k, v and so on."""
    return isinstance(value, dict) and all(type(error) in (int, float) and error >= 0 for error in value.values())


@dataclass(frozen=True)
class Forecast:
    """What closing a seam will cost, by way and dtype, and `original`: what rounding it unclosed costs by dtype alone.

    The original's weights are taken to use all their bits (a bf16 checkpoint would lose nothing in bf16), and none to
    be too small for the dtype: such numbers, where closing the seam makes them, count as loss.
    left: by way, the modules that a later seam closes again, as this one leaves them.
    """

    seam: Seam
    original: Mapping[str, Mapping[str, float]]
    ways: Mapping[str, Way]
    left: Mapping[str, Mapping[str, Affine]] = field(default_factory=dict, repr=False)

    def outcome(self, way: str, dtype: str) -> Outcome:
        """What has become of the seam, closed by `way` and stored in `dtype`."""
        errors, problem = self.ways[way].errors[dtype], self.problem(way, dtype)
        return Outcome(self.seam.kind, self.seam.layer, way, dtype, errors, self.original[dtype], problem)

    def problem(self, way: str, dtype: str) -> str | None:
        """Why closing the seam by `way` is not safe in `dtype`, or None: the error would exceed the tolerance."""
        errors, own = self.ways[way].errors[dtype], self.original[dtype]
        limits = {name: tolerance(getattr(torch, dtype), own[name]) for name in errors}
        beyond = [name for name in errors if errors[name] > limits[name] or math.isinf(errors[name])]
        if not beyond:
            return None
        name = max(beyond, key=errors.__getitem__)
        if not self.ways[way].usable:
            return (
                f"layer {self.seam.layer} cannot be rewritten by {way}: the condition number is "
                f"{self.ways[way].condition:.1e}"
            )
        if math.isinf(errors[name]):
            return f"layer {self.seam.layer} by {way}: there are numbers larger than {dtype} can hold"
        return (
            f"layer {self.seam.layer} by {way} in {dtype}: the relative error of {name} is {errors[name]:.1e}, above "
            f"{limits[name]:.1e} (the original's: {own[name]:.1e})"
        )


def precision_of(dtype: str) -> tuple[float, float]:
    """A dtype's relative rounding error, and the square below which it is an absolute one."""
    kind = getattr(torch, dtype)
    return rounding_error(kind), subnormal_power(kind)


def reach(left: Float[Matrix, "n d"], right: Float[Tensor, "d m"]) -> float:
    """Max |A B|, or a bound of it where that is below the largest number of every dtype."""
    power = max(squares(left[rows], 1).max() for rows in blocks(left))
    bound = (power * squares(right, 0).max()).sqrt()
    if bound <= torch.finfo(torch.float16).max:
        return bound.item()
    return max(max_abs(product(left[rows], right, torch.float64)) for rows in blocks(left))


def mean_square(outputs: Float[Tensor, "n r"]) -> float:
    """The sum of a row's squares, on average over the rows."""
    return outputs.square().sum(1).mean().item()


def relative(square: float, total: float) -> float:
    """sqrt(square / total): an error relative to what it is an error of; 0 where that is 0 (all weights are)."""
    return (square / total) ** 0.5 if total > 0 else 0.0


def letter(name: str) -> str:
    """The paper's letter for a module: q for model.layers.0.self_attn.q_proj, p for o_proj, m for the FFN's readers."""
    letters = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "p", "lm_head": "logits"}
    return letters.get(name.rpartition(".")[2], "m")

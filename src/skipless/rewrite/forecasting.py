"""What seams cost that are closed one after the other on the same modules, and what all of a model's cost together."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from skipless.algebra.affine import Affine
from skipless.algebra.forecast import Forecast
from skipless.algebra.rounding import rounding_error
from skipless.algebra.tolerances import tolerance
from skipless.architecture.config import Architecture
from skipless.architecture.seams import Seam
from skipless.removals import forecast
from skipless.rewrite.planning import in_turn

# On the way through a layer each number goes through O of the layer before, V, P and M, and in the end through the last
# O and the head. Of each kind of seam: what it gives there, and the matrices that it stores anew.
ON_THE_WAY = {"stream": ("v", "OV"), "values": ("p", "VP"), "p": ("m", "PM"), "head": ("logits", "OH")}


def forecast_group(
    group: Sequence[Seam],
    basis: str,
    read: Callable[[Seam], Mapping[str, Affine]],
    dtypes: Sequence[str],
    rest_dtype: str | None = None,
) -> dict[Seam, Forecast]:
    """The forecasts of seams that share modules and are closed one after the other, stream seams by `basis`.

    read: gives a seam's modules as they are in the source.
    """
    forecasts: dict[Seam, Forecast] = {}
    left: dict[str, Affine] = {}
    for seam, _, later in in_turn(group):
        way = seam.way(basis)
        affines = {**read(seam), **{name: left[name] for name in seam.modules if name in left}}
        foretold = forecast(seam, affines, dtypes, [way], rest_dtype, later)
        left = {name: affine for name, affine in left.items() if name not in seam.modules} | dict(
            foretold.left.get(way, {})
        )
        forecasts[seam] = dataclasses.replace(foretold, left={})
    return forecasts


@dataclass(frozen=True)
class Together:
    """What a model loses, stored in `dtype`, on the way through its layers and the head, relative to what there is.

    before, after: by layer and head, as the model was, and once its seams are closed.
    """

    dtype: str
    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def original(self) -> float:
        """Of all layers, as the model was."""
        return math.hypot(*self.before)

    @property
    def fused(self) -> float:
        """Of all layers, once the seams are closed."""
        return math.hypot(*self.after)

    @property
    def multiple(self) -> float:
        """How many times what the original loses."""
        return self.fused / self.original if self.original else 1.0

    @property
    def problem(self) -> str | None:
        """Why that is not safe, or None."""
        limit = tolerance(getattr(torch, self.dtype), self.original)
        if self.fused <= limit:
            return None
        return (
            f"all together, in {self.dtype}: the relative error through all layers is {self.fused:.1e}, above "
            f"{limit:.1e} (the original's: {self.original:.1e})"
        )


def together(
    source: Architecture, alone: Mapping[Seam, Forecast], asked: Mapping[Seam, Forecast], basis: str, dtype: str
) -> Together:
    """All seams that are closed. alone: of the open seams, what each would cost alone; asked: of those that are closed.

    Errors of different matrices are independent, and each layer gives on what comes in, relative to what it is.
    """
    layers = source.num_hidden_layers
    usual = rounding_error(getattr(torch, dtype)) ** 2
    own = [dict.fromkeys("OVPM" if layer < layers else "OH", usual) for layer in range(layers + 1)]
    for seam, foretold in alone.items():
        if dtype in foretold.original and seam.kind in ("stream", "p", "head"):
            square = _on_the_way(seam, foretold.original[dtype]) ** 2
            own[seam.layer] |= dict.fromkeys(ON_THE_WAY[seam.kind][1], square / 2)
    fused, rewritten = [0.0] * len(own), [set[str]() for _ in own]
    for seam, foretold in asked.items():
        if seam.kind in ON_THE_WAY:
            fused[seam.layer] += _on_the_way(seam, foretold.ways[seam.way(basis)].errors[dtype]) ** 2
            rewritten[seam.layer].update(ON_THE_WAY[seam.kind][1])
    for layer, squares in enumerate(own):
        fused[layer] += sum(square for name, square in squares.items() if name not in rewritten[layer])
    before = (math.sqrt(sum(squares.values())) for squares in own)
    return Together(dtype, tuple(before), tuple(map(math.sqrt, fused)))


def _on_the_way(seam: Seam, errors: Mapping[str, float]) -> float:
    """The error of what a seam gives on the way through its layer."""
    name, _ = ON_THE_WAY[seam.kind]
    return errors[name] if name in errors else max(errors.values())

"""What storing a model in some dtype will cost, before doing it: expected relative errors of q, k, v and M.

Inputs are taken as white, rounding errors as independent with a relative size that the dtype sets. Every error then is
a sum of squares, of G = E[x^T x], of the pivots of the metrics that rounding.py rounds under, and of R; where those
would take longer than the rounding itself, it is the mean of a sample.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from skipless.basis import Basis, candidate
from skipless.eliminate import Affine, Stream, close_stream
from skipless.rounding import (
    HALF,
    Rest,
    factorize,
    gram,
    joint_metric,
    moment,
    noise_weights,
    repaired_metric,
    rounding_error,
    shrink,
)
from skipless.seams import Seam
from skipless.tolerances import tolerance

# Sampled errors: those of q, k or v, a sum over at least as many, are then right to a few per cent.
PROBES = 512


@dataclass(frozen=True)
class Way:
    """A way to close a seam.

    condition: estimated condition number, 1-norm, of the columns that become the identity; largest: max|R| of the rest,
    rows and columns scaled by what errors count there (both None in a P-M seam, where nothing is solved for).
    errors: dtype -> q, k, v or m -> expected relative error as stored in it; infinite if the way cannot be gone.
    """

    condition: float | None
    largest: float | None
    errors: Mapping[str, Mapping[str, float]]

    def worst(self, dtype: str) -> float:
        """The largest of the errors in a dtype."""
        return max(self.errors[dtype].values())


@dataclass(frozen=True)
class Forecast:
    """What closing a seam will cost, by way and dtype, and `original`: what storing it unclosed costs by dtype alone.

    The original's weights are taken to use all their bits: a bf16 checkpoint would lose nothing in bf16.
    """

    seam: Seam
    original: Mapping[str, Mapping[str, float]]
    ways: Mapping[str, Way]

    def problem(self, way: str, dtype: str) -> str | None:
        """Why closing the seam by `way` is not safe in `dtype`, or None: the error would exceed the tolerance."""
        found, own = self.ways[way].errors[dtype], self.original[dtype]
        limits = {name: tolerance(getattr(torch, dtype), own[name]) for name in found}
        beyond = [name for name in found if found[name] > limits[name]]
        if not beyond:
            return None
        name = max(beyond, key=found.__getitem__)
        if math.isinf(found[name]):
            return (
                f"layer {self.seam.layer} cannot be rewritten by {way}: the condition number is "
                f"{self.ways[way].condition:.1e}"
            )
        return (
            f"layer {self.seam.layer} by {way} in {dtype}: {name} is expected to be off by {found[name]:.1e}, which is "
            f"more than {limits[name]:.1e} (the original: {own[name]:.1e})"
        )


def forecast(
    seam: Seam, affines: Mapping[str, Affine], dtypes: Sequence[str], ways: Iterable[str] | None = None
) -> Forecast:
    """What closing a seam by each of `ways` (None: all there are) will cost in each dtype.

    affines: every module of seam.modules in fp64.
    """
    if seam.kind == "stream":
        stream = OpenStream(seam, affines)
        return stream.forecast(dtypes, {way: stream.basis(way) for way in ways or seam.identities})
    (writer,) = (affines[name].weight for name in seam.writers)
    own, merged = _merged(writer, [affines[name].weight for name in seam.readers])
    original, errors = (
        {dtype: {"m": unit * rounding_error(getattr(torch, dtype))} for dtype in dtypes} for unit in (own, merged)
    )
    return Forecast(seam, original, {way: Way(None, None, errors) for way in seam.identities})


class OpenStream:
    """A stream seam's tensors before it is closed, and what each way to close it would do to q, k and v.

    affines: every module of seam.modules in fp64; ways are the names in seam.identities. weights, dual_weights: what a
    squared error counts in each column of the readers and of the duals' transposed weights.
    """

    def __init__(self, seam: Seam, affines: Mapping[str, Affine]):
        self.seam, self.affines = seam, affines
        self.readers = {name: affines[name].weight for name in seam.readers}
        writers = [affines[name].weight for name in seam.writers]
        duals = [affines[name].weight.T for name in seam.duals]
        parts = noise_weights(writers, [*self.readers.values(), *duals])
        self.weights = torch.cat(parts[: len(self.readers)])
        self.dual_weights = torch.cat([*parts[len(self.readers) :], self.weights[:0]])
        self._writers = writers

    @cached_property
    def moment(self) -> Float[Tensor, "d d"]:
        """G = E[x^T x] of the original stream."""
        return moment(self._writers)

    @cached_property
    def powers(self) -> dict[str, Tensor]:
        """Mean squares of q, k and v, summed over their columns."""
        return {name: (self.moment @ reader * reader).sum() for name, reader in self.readers.items()}

    def basis(self, way: str) -> Basis:
        """The basis of a way, usable or not."""
        return candidate(self.seam, way, self.readers, self.weights)

    def close(self, basis: Basis) -> Stream:
        """The seam closed exactly."""
        return close_stream(self.seam, self.affines, basis)

    def forecast(self, dtypes: Sequence[str], bases: Mapping[str, Basis]) -> Forecast:
        """What closing it in each of these bases will cost in each dtype."""
        original = {dtype: self._original(getattr(torch, dtype)) for dtype in dtypes}
        return Forecast(self.seam, original, {way: self._way(basis, dtypes) for way, basis in bases.items()})

    def _original(self, dtype: torch.dtype) -> dict[str, float]:
        """Relative errors of q, k, v when the original's weights are rounded to `dtype`."""
        power, unit = self.moment.diagonal(), rounding_error(dtype)
        return {
            letter(name): unit * _relative(2 * (power @ reader**2).sum(), self.powers[name])
            for name, reader in self.readers.items()
        }

    def _way(self, basis: Basis, dtypes: Sequence[str]) -> Way:
        """What the seam closed in a basis, usable or not, loses."""
        if not basis.usable:
            lost = {letter(name): math.inf for name in self.readers}
            return Way(basis.condition, math.inf, dict.fromkeys(dtypes, lost))
        stream = close_stream(dataclasses.replace(self.seam, writers=()), self.affines, basis)
        chosen = torch.cat(list(self.readers.values()), 1)[:, basis.columns]
        metric = chosen.T @ self.moment @ chosen
        rest = Rest(stream.rest.weight, self.weights[stream.others], metric.dtype)
        largest = rest.largest(self.weights[stream.kept])
        return Way(
            basis.condition, largest, {dtype: self._fused(stream, metric, getattr(torch, dtype)) for dtype in dtypes}
        )

    def _fused(self, stream: Stream, metric: Tensor, dtype: torch.dtype) -> dict[str, float]:
        """Relative errors of q, k, v; metric: E[x^T x] of the closed seam's stream."""
        rest = stream.rest.weight
        if dtype in HALF:
            passed, others = self._shaped(stream, metric, dtype)
        else:
            unit = rounding_error(dtype) ** 2
            passed, others = unit * metric.diagonal(), 2 * unit * metric.diagonal() @ rest**2
        columns = torch.cat([stream.kept, stream.others])
        squares = torch.empty_like(self.weights)
        squares[columns] = torch.cat([passed, others])
        parts = squares.split([reader.shape[1] for reader in self.readers.values()])
        return {
            letter(name): _relative(part.sum(), self.powers[name])
            for name, part in zip(self.readers, parts, strict=True)
        }

    def _shaped(self, stream: Stream, metric: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Squared errors of the passed and the rest columns after rounding.round_seam, as means over PROBES samples.

        The stream's error, in rows rounded under M, and the rest's, U, in columns rounded under N and shrunk, are
        independent. Re-solving X spreads U: with T = W_r R^T M^-1, U T goes to the passed columns, U (1 - T R) stays.
        """
        exact, dual_weights = stream.rest.weight, self.dual_weights
        passed_weights, rest_weights = self.weights[stream.kept], self.weights[stream.others]
        rest = shrink(Rest(exact, rest_weights, dtype), metric, passed_weights).matrix
        generator = torch.Generator().manual_seed(0)

        def noise(sizes: Tensor) -> Tensor:
            drawn = torch.randn(PROBES, len(sizes), generator=generator, dtype=sizes.dtype, device="cpu")
            return drawn.to(sizes.device) * sizes

        power, unit = metric.diagonal(), rounding_error(dtype)
        joint = joint_metric(rest, passed_weights, rest_weights)
        if stream.duals:
            duals = torch.cat([dual.weight.T for dual in stream.duals.values()], 1)
            joint = joint + joint_metric(duals, torch.zeros_like(passed_weights), dual_weights)
        under = factorize(joint, power)
        written = under.feedback(noise(unit * power.sqrt()))
        down = factorize(metric, (rest**2).mean(1))
        along = factorize(repaired_metric(rest, passed_weights, rest_weights), (rest**2).mean(0))
        read = along.feedback(noise(unit * (down.pivots @ rest[down.order] ** 2).sqrt()))
        streams = torch.empty_like(written)
        streams[:, down.order] = noise(down.pivots.sqrt()) @ down.upper.T  # with E[x^T x] = metric
        read = read + streams @ (rest - exact)
        moved = under.solve(rest @ (read * rest_weights).T).T
        return ((written + moved) ** 2).mean(0), ((read + (written - moved) @ rest) ** 2).mean(0)


def _relative(square: Tensor, total: Tensor) -> float:
    """An error as part of what it is an error of; of nothing (all weights are 0), nothing."""
    return (square / total).sqrt().item() if total > 0 else 0.0


def _merged(writer: Tensor, readers: Sequence[Tensor]) -> tuple[float, float]:
    """Relative errors of x P M, for white x, when P (D, d) and every M (d, f) are rounded, and when M* = P M is.

    In units of the dtype's rounding error.
    """
    total = (gram(writer) * sum(gram(reader.T) for reader in readers)).sum()
    own = 2 * ((writer**2).sum(0) @ torch.stack([(reader**2).sum(1) for reader in readers]).sum(0))
    return _relative(own, total), 1.0


def letter(name: str) -> str:
    """The paper's name of a projection, in lower case: q of model.layers.0.self_attn.q_proj, p of o_proj."""
    return {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "p"}[name.rpartition(".")[2]]

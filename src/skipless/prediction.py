"""What storing a model in some dtype will cost, before doing it: expected relative errors of q, k, v and M.

Inputs are taken as white, rounding errors as independent with a relative size that the dtype sets. Then every error is
a sum of squares: of G = E[x^T x], of the pivots of the metrics that rounding.py rounds under, and of R.
"""

import math
from collections.abc import Mapping, Sequence
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


class StreamAudit:
    """A stream seam's tensors, and what each way to close it would do to q, k and v.

    affines: every module of seam.modules in fp64; ways are the names in seam.identities.
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

    def basis(self, way: str) -> Basis:
        """The basis of a way, usable or not."""
        return candidate(self.seam, way, self.readers, self.weights)

    def close(self, basis: Basis) -> Stream:
        """The seam closed exactly."""
        return close_stream(self.seam, self.affines, basis)

    def original(self, dtype: torch.dtype) -> dict[str, float]:
        """Relative errors of q, k, v when the original's weights, using all their bits, are rounded to `dtype`."""
        power = self.moment.diagonal()
        errors = {}
        for name, reader in self.readers.items():
            total = _powers(self.moment, reader).sum()
            errors[letter(name)] = _relative(2 * (power @ reader**2).sum(), total, dtype)
        return errors

    def fused(self, basis: Basis, dtypes: Sequence[torch.dtype]) -> list[dict[str, float]]:
        """For each dtype, relative errors of q, k, v once the seam is closed by `basis` and stored in it."""
        if not basis.usable:
            return [{letter(name): math.inf for name in self.readers} for _ in dtypes]
        stream = self.close(basis)
        chosen = torch.cat(list(self.readers.values()), 1)[:, basis.columns]
        metric = chosen.T @ self.moment @ chosen
        return [self._fused(stream, metric, dtype) for dtype in dtypes]

    def _fused(self, stream: Stream, metric: Tensor, dtype: torch.dtype) -> dict[str, float]:
        """Relative errors of q, k, v; metric: E[x^T x] of the closed seam's stream."""
        rest = stream.rest.weight
        if dtype in HALF:
            passed, others = self._shaped(stream, metric, dtype)
        else:
            unit = rounding_error(dtype) ** 2
            passed, others = unit * metric.diagonal(), 2 * unit * metric.diagonal() @ rest**2
        columns = torch.cat([stream.kept, stream.others])
        squares, totals = torch.empty_like(self.weights), torch.empty_like(self.weights)
        squares[columns] = torch.cat([passed, others])
        totals[columns] = torch.cat([metric.diagonal(), _powers(metric, rest)])
        sizes = [reader.shape[1] for reader in self.readers.values()]
        return {
            letter(name): (square.sum() / total.sum()).sqrt().item()
            for name, square, total in zip(self.readers, squares.split(sizes), totals.split(sizes), strict=True)
        }

    def _shaped(self, stream: Stream, metric: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Squared errors of the passed and the rest columns after rounding.round_seam.

        Three errors add up. That of the stream, in rows rounded under M = L D L^T, is Z L^-1, Z independent. Those of
        the rest, rounded (Z' Ln^-1) and shrunk, are spread by re-solving X: with T = W_r R^T M^-1, an error U of X R
        leaves U (1 - T R) in the rest columns and U T in the passed ones.
        """
        exact, passed_weights, rest_weights = (
            stream.rest.weight,
            self.weights[stream.kept],
            self.weights[stream.others],
        )
        rest = shrink(Rest(exact, rest_weights, dtype), metric).matrix
        power, unit = metric.diagonal(), rounding_error(dtype) ** 2
        joint = joint_metric(rest, passed_weights, rest_weights)
        if stream.duals:
            duals = torch.cat([dual.weight.T for dual in stream.duals.values()], 1)
            joint = joint + joint_metric(duals, torch.zeros_like(passed_weights), self.dual_weights)
        under = factorize(joint, power)
        rows = torch.empty_like(joint)
        rows[:, under.order] = power[under.order].sqrt()[:, None] * _inverse(under.upper)
        passed, others = unit * (rows**2).sum(0), unit * ((rows @ rest) ** 2).sum(0)
        if rest.shape[1]:
            down = factorize(metric, (rest**2).mean(1))
            along = factorize(repaired_metric(rest, passed_weights, rest_weights), (rest**2).mean(0))
            sizes = (down.pivots @ rest[down.order] ** 2)[along.order].sqrt()
            left = torch.empty(rest.shape[1], rest.shape[1], dtype=rest.dtype, device=rest.device)
            left[:, along.order] = sizes[:, None] * _inverse(along.upper)
            moved = under.solve(rest * rest_weights).T
            spread, shrunk = left @ moved, rest - exact
            passed = passed + unit * (spread**2).sum(0) + _powers(metric, shrunk @ moved)
            others = others + unit * ((left - spread @ rest) ** 2).sum(0)
            others = others + _powers(metric, shrunk - shrunk @ moved @ rest)
        return passed, others


def _powers(metric: Tensor, matrix: Tensor) -> Tensor:
    """Mean squares of the columns of x A, for E[x^T x] = metric."""
    return (metric @ matrix * matrix).sum(0)


def merged_errors(writer: Tensor, readers: Sequence[Tensor]) -> tuple[float, float]:
    """Relative errors of x P M, for white x, when P (D, d) and every M (d, f) are rounded, and when M* = P M is.

    In units of the dtype's rounding error.
    """
    total = (gram(writer) * sum(gram(reader.T) for reader in readers)).sum()
    own = 2 * ((writer**2).sum(0) @ torch.stack([(reader**2).sum(1) for reader in readers]).sum(0))
    return (own / total).sqrt().item(), 1.0


def _inverse(upper: Tensor) -> Tensor:
    eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True, unitriangular=True)


def _relative(square: Tensor, total: Tensor, dtype: torch.dtype) -> float:
    return rounding_error(dtype) * (square / total).sqrt().item()


def letter(name: str) -> str:
    """The paper's name of a reader: q of model.layers.0.self_attn.q_proj."""
    return name.rpartition(".")[2].removesuffix("_proj")

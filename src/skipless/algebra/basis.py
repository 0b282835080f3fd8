"""Which columns of a seam's readers become the identity, and how well the rest can be solved with them.

A = [Q|K|V] below is (d, m), S its d chosen columns; solves go through an LU factorization in fp64, never an inverse.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from skipless.algebra.linalg import LU, max_abs, solve_triangular
from skipless.architecture.seams import Seam

# A solve in fp64 loses about eps * condition. Beyond this, the rewritten model could not reach 1e-9 even in fp64.
MAX_CONDITION = 1e-9 / np.finfo(np.float64).eps
# With pivoted columns |R| stays small whatever S's condition number is, so S need only be of full rank in fp64. Nothing
# bounds S^-1 O^T, which a tied table's transpose reads: where there are such duals, MAX_CONDITION holds.
MAX_CONDITION_PIVOTED = 1e-3 / np.finfo(np.float64).eps
# Columns are swapped until no entry of R is larger than this (a maximum-volume submatrix has max|R| <= 1; identities).
MAX_REST = 1.05
# The relative error that R may have while columns are looked for.
MAX_ERROR = 0.05
# Columns swapped at once, so that a round costs a matrix product and not as many rank-1 updates.
SWAPS = 64


@dataclass(frozen=True)
class Basis:
    """The columns of A that become the identity, and S, LU-factorized in fp64.

    condition: LAPACK's estimate (gecon) of S's condition number in the 1-norm, or inf. limit: the largest with which a
    model rewritten in the basis still equals the original to 1e-9 in fp64.
    """

    columns: Int[Tensor, "d"]
    factors: LU
    condition: float
    limit: float = MAX_CONDITION

    @classmethod
    def of_columns(
        cls, matrix: Float[Tensor, "d m"], columns: Int[Tensor, "d"], limit: float = MAX_CONDITION
    ) -> "Basis":
        """Factorize S, these columns of A = `matrix`."""
        chosen = matrix.T[columns].to(torch.float64).T  # a copy, column by column, that can be overwritten
        norm = torch.linalg.matrix_norm(chosen, 1).item()
        factors = LU.of(chosen)
        return cls(columns, factors, factors.condition(norm), limit)

    @property
    def usable(self) -> bool:
        """Whether a model rewritten in this basis can equal the original to 1e-9 in fp64."""
        return bool(self.condition <= self.limit)

    def solve(self, right: Float[Tensor, "d r"]) -> Float[Tensor, "d r"]:
        """S^-1 right, in fp64."""
        return self.factors.solve(right.to(torch.float64))


def pivot(
    matrix: Float[Tensor, "d m"], weights: Float[Tensor, "m"] | None = None, dtype: torch.dtype = torch.float64
) -> Int[Tensor, "d"]:
    """The d columns S of A (m >= d) for which no entry of R = S^-1 A exceeds MAX_REST; the columns in any order.

    LU of A^T with partial pivoting picks d rows; then the largest entry of R names a column of S and one of the rest to
    swap, each swap multiplying |det S| by it, until none is larger (maximum-volume submatrix; Goreinov et al., "How to
    find a good submatrix", 2010). A matrix of lower rank has no such columns: any are returned.
    weights: squares of what columns are scaled by. dtype: the precision of R. In fp32, R and so the bound are off by up
    to 1e-7 * condition number; what fp32 cannot factorize is factorized in fp64.
    """
    d, m = matrix.shape
    scaled = matrix.T.to(dtype, copy=True)
    if weights is not None:
        scaled *= weights.sqrt().to(dtype)[:, None]
    lu = LU.of(scaled.T.contiguous().T)
    del scaled
    order = torch.tensor(lu.order(), device=matrix.device)
    chosen, others = order[:d].clone(), order[d:].clone()
    pivots = lu.factors.diagonal()
    if dtype != torch.float64 and not (math.isfinite(max_abs(lu.factors)) and (pivots != 0).all()):
        return pivot(matrix, weights)
    if m == d or not (pivots != 0).all():
        return chosen
    # R^T (m - d, d): R^T L = lu[d:], transposed
    rest = solve_triangular(lu.factors[:d].T.contiguous(), lu.factors[d:].T, upper=True, unit=True).T.contiguous()
    del lu, pivots
    while True:
        new, out = _swaps(rest)
        if not len(new):
            return chosen
        block = rest[new][:, out]
        rows = torch.linalg.solve(block, rest[new])
        columns = torch.linalg.solve(block, rest[:, out], left=False)
        gone = rest[new].index_add(1, out, -torch.eye(len(out), dtype=rest.dtype, device=rest.device))
        rest.addmm_(columns, gone, alpha=-1)
        rest[new] = -rows
        rest[new[:, None], out] = torch.linalg.inv(block)
        chosen[out], others[new] = others[new], chosen[out]


def _swaps(rest: Float[Tensor, "r d"]) -> tuple[Int[Tensor, "k"], Int[Tensor, "k"]]:
    """Swaps (row of R^T, column of R^T) to make at once, each enlarging |det S| by more than MAX_REST after the others.

    The largest entries of at most SWAPS rows, in different columns; one after the other is taken while its pivot, after
    eliminating those taken, is still large enough.
    """
    values = torch.maximum(rest.amax(1), -rest.amin(1))
    largest = values.argsort(descending=True, stable=True)[: 2 * SWAPS].tolist()
    new: list[int] = []
    out: list[int] = []
    for row in largest:
        column = int(rest[row].abs().argmax())
        if values[row] > MAX_REST and column not in out and len(new) < SWAPS:
            new.append(row)
            out.append(column)
    block = rest[new][:, out]
    taken = []
    for k in range(len(new)):
        if block[k, k].abs() > MAX_REST:
            taken.append(k)
            block -= torch.outer(block[:, k], block[k]) / block[k, k]
    rows, columns = torch.tensor([new, out], dtype=torch.int64, device=rest.device)
    return rows[taken], columns[taken]


def candidate(
    seam: Seam,
    way: str,
    readers: Mapping[str, Float[Tensor, "d _"]],
    weights: Float[Tensor, "m"],
    dtype: torch.dtype = torch.float64,
) -> Basis:
    """The basis of `way`, usable or not; arguments as for choose."""
    joined = join([readers[name] for name in seam.readers])
    gone = seam.identities[way]
    if gone == seam.readers:
        limit = MAX_CONDITION if seam.duals else MAX_CONDITION_PIVOTED
        basis = Basis.of_columns(joined, pivot(joined, weights, dtype).sort().values, limit)
        if dtype == torch.float64 or basis.condition * torch.finfo(dtype).eps <= MAX_ERROR:
            return basis
        return Basis.of_columns(joined, pivot(joined, weights).sort().values, limit)
    start = sum(readers[name].shape[1] for name in seam.readers[: seam.readers.index(gone[0])])
    return Basis.of_columns(joined, torch.arange(start, start + seam.width, device=joined.device))


def join(readers: Sequence[Float[Tensor, "d _"]]) -> Float[Tensor, "d m"]:
    """[Q|K|V], column by column, as linear layers store them."""
    return torch.cat([reader.T for reader in readers]).T

"""Products, factorizations and solves of large matrices, each by the fastest routine at hand.

On the CPU, fp32 and fp64 go to numpy's and scipy's BLAS and LAPACK, which are never slower there than torch's and up to
twice as fast, through views of the same memory; bf16, and everything on another device, to torch. LAPACK wants columns
in a row: a matrix whose transpose is contiguous is factorized without a copy.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from skipless.algebra.rows import Matrix, Rows

# Rows of a matrix that are worked on together: at most ROWS of them, with at most BLOCK numbers.
ROWS, BLOCK = 4096, 2**24
# Numbers that are brought to another precision while they are in the CPU's caches.
CACHED = 2**19
HALF = (torch.bfloat16, torch.float16)


def _numpy(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64) for tensor in tensors)


def precision(left: torch.dtype, right: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The precision in which to compute a product that will be stored in `dtype`.

    bf16 times bf16 is summed up in fp32, in which such products are exact, and rounded once. With more bits, fp32 loses
    1e-7, where storing in half precision loses 1e-3. All else is fp64.
    """
    if left == right == dtype == torch.bfloat16:
        return dtype
    exact = torch.float64 in (left, right)
    return torch.float32 if dtype in HALF and not exact else torch.float64


def multiply(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Left @ right, both of one dtype."""
    if not _numpy(left, right):
        return torch.matmul(left, right) if out is None else out.copy_(torch.matmul(left, right))
    with np.errstate(over="ignore", invalid="ignore"):
        if out is None:
            return torch.from_numpy(np.matmul(left.numpy(), right.numpy()))
        np.matmul(left.numpy(), right.numpy(), out=out.numpy())
        return out


def product(left: Matrix, right: Tensor, dtype: torch.dtype, within: torch.dtype | None = None) -> Tensor:
    """Left (n, d) @ right (d, m) in `dtype`, computed in `within` (None: precision()), some rows at a time.

    Where left's transpose is contiguous, so is the product's. The product of Rows is Rows.
    """
    within = precision(left.dtype, right.dtype, dtype) if within is None else within
    (n, _), m = left.shape, right.shape[1]
    right = right.to(within)
    if isinstance(left, Rows):
        return left.map(lambda rows: product(rows, right, dtype, within), m, dtype)
    if _turned(left):
        result = torch.empty(m, n, dtype=dtype, device=left.device)
        for rows in blocks(left):
            _into(result[:, rows], right.T, left.T[:, rows].to(within))
        return result.T
    result = torch.empty(n, m, dtype=dtype, device=left.device)
    for rows in blocks(left):
        _into(result[rows], left[rows].to(within), right)
    return result


def _into(result: Tensor, left: Tensor, right: Tensor) -> None:
    if result.dtype == left.dtype:
        multiply(left, right, out=result)
    else:
        result.copy_(multiply(left, right))


def slices(n: int, size: int) -> Iterator[slice]:
    """0 to n, `size` at a time."""
    return (slice(start, min(n, start + size)) for start in range(0, n, size))


def blocks(matrix: Tensor | Rows) -> Iterator[slice]:
    """The rows of a matrix that are worked on together."""
    n, d = matrix.shape
    return slices(n, block_rows(d))


def block_rows(d: int) -> int:
    """How many rows of d numbers are worked on together."""
    return max(1, min(ROWS, BLOCK // max(1, d)))


def gram(matrix: Matrix, dtype: torch.dtype | None = None) -> Tensor:
    """X^T X of X (n, d) in fp32 or fp64 (None: X's own)."""
    dtype = matrix.dtype if dtype is None else dtype
    total = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=dtype, device=matrix.device)
    if not _numpy(total) or not total.numel():
        for rows in blocks(matrix):
            block = matrix[rows].to(dtype)
            total = torch.addmm(total, block.T, block)
        return total
    sums = total.numpy().T
    (syrk,) = scipy.linalg.blas.get_blas_funcs(("syrk",), (sums,))
    for rows in blocks(matrix):
        block = matrix[rows].to(dtype)
        turned = _turned(block)
        sums = syrk(1, (block if turned else block.T).numpy(), 1, sums, trans=turned, overwrite_c=1)
    return _mirrored(torch.from_numpy(sums.T))


def _mirrored(lower: Tensor) -> Tensor:
    """A symmetric matrix, in the place of its lower triangle."""
    for rows in slices(len(lower), 512):
        block = lower[rows, rows]
        block.copy_(block.tril() + block.tril(-1).T)
        lower[rows, rows.stop :] = lower[rows.stop :, rows].T
    return lower


def max_abs(matrix: Tensor) -> float:
    """Max |X| of a matrix that is not empty, or NaN if there is one."""
    low, high = torch.aminmax(matrix.T if _turned(matrix) else matrix)
    return max(-low.item(), high.item())


def _turned(matrix: Tensor) -> bool:
    """Whether the transpose is contiguous, row by row, and the matrix is not."""
    return matrix.stride(0) == 1 and matrix.stride(1) != 1


def squares(matrix: Tensor, dim: int) -> Tensor:
    """Sums of squares along a dimension, in fp64."""
    turned = _turned(matrix)
    rows, along = (matrix.T, 1 - dim) if turned else (matrix, dim)
    size = max(1, CACHED // max(1, rows.shape[1]))
    parts = [rows[part].to(torch.float64, copy=True).square_().sum(along) for part in slices(len(rows), size)]
    if along == 1:
        return torch.cat([rows.new_zeros(0, dtype=torch.float64), *parts])
    return sum(parts, rows.new_zeros(rows.shape[1], dtype=torch.float64))


def cholesky(matrix: Tensor) -> Tensor | None:
    """L of H = L L^T, in the place of H; None if H is not positive definite."""
    if not _numpy(matrix):
        root, failed = torch.linalg.cholesky_ex(matrix)
        return None if failed else root
    (potrf,) = scipy.linalg.lapack.get_lapack_funcs(("potrf",), (matrix.numpy(),))
    factor, failed = potrf(matrix.contiguous().numpy().T, lower=0, clean=1, overwrite_a=1)
    root = torch.from_numpy(factor.T)
    return None if failed or not torch.isfinite(root.diagonal()).all() else root


def inverse(root: Tensor) -> Tensor:
    """(L L^T)^-1, in the place of L."""
    if not _numpy(root) or not root.numel():
        return torch.cholesky_inverse(root)
    (potri,) = scipy.linalg.lapack.get_lapack_funcs(("potri",), (root.numpy(),))
    return _mirrored(torch.from_numpy(potri(root.contiguous().numpy().T, lower=0, overwrite_c=1)[0].T))


def solve_triangular(factor: Tensor, right: Tensor, *, upper: bool, unit: bool = False) -> Tensor:
    """The X of `factor` X = right (n, r), of a triangular factor."""
    if not _numpy(factor, right) or not right.numel():
        return torch.linalg.solve_triangular(factor, right, upper=upper, unitriangular=unit)
    (trsm,) = scipy.linalg.blas.get_blas_funcs(("trsm",), (right.numpy(),))
    turned = np.array(right.numpy().T, order="F", copy=True)  # X^T factor^T = right^T, whose columns are in a row
    matrix = factor.numpy()
    if matrix.flags.c_contiguous:
        solved = trsm(1, matrix.T, turned, side=1, lower=upper, diag=unit, overwrite_b=1)
    else:
        solved = trsm(1, matrix, turned, side=1, lower=not upper, trans_a=1, diag=unit, overwrite_b=1)
    return torch.from_numpy(solved.T)


@dataclass(frozen=True)
class LU:
    """A matrix, LU-factorized with partial pivoting."""

    factors: Tensor
    pivots: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> "LU":
        """Factorize a matrix (m, n), m >= n, in its place if its transpose is contiguous, on the CPU."""
        if not _numpy(matrix):
            return cls(*torch.linalg.lu_factor_ex(matrix)[:2])
        (getrf,) = scipy.linalg.lapack.get_lapack_funcs(("getrf",), (matrix.numpy(),))
        factors, pivots, _ = getrf(matrix.numpy(), overwrite_a=1)
        return cls(torch.from_numpy(factors), torch.from_numpy(pivots + 1))

    def order(self) -> list[int]:
        """The places of the rows after pivoting."""
        places = list(range(len(self.factors)))
        for row, other in enumerate(self.pivots.tolist()):
            places[row], places[other - 1] = places[other - 1], places[row]
        return places

    def solve(self, right: Tensor) -> Tensor:
        """The X of `matrix` X = right (n, r); its transpose is contiguous."""
        if not _numpy(self.factors, right) or not right.numel():
            return torch.linalg.lu_solve(self.factors, self.pivots.to(torch.int32), right)
        (getrs,) = scipy.linalg.lapack.get_lapack_funcs(("getrs",), (right.numpy(),))
        turned = np.array(right.numpy(), order="F", copy=True)
        solved, _ = getrs(self.factors.numpy(), self.pivots.numpy() - 1, turned, overwrite_b=1)
        return torch.from_numpy(solved)

    def condition(self, norm: float) -> float:
        """LAPACK's estimate (gecon) of the condition number of a matrix with this 1-norm, or inf."""
        reciprocal, _ = scipy.linalg.lapack.dgecon(self.factors.cpu().numpy(), norm)
        return 1 / reciprocal if reciprocal > 0 else float("inf")

"""Condition number and rank of a matrix of any size, from its extreme singular values alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.linalg
from jaxtyping import Float
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

# Up to this many singular values, all of them cost less than a search for two.
SMALL = 768
# Relative accuracy of a squared singular value that is searched for.
ACCURACY = 1e-4


@dataclass(frozen=True)
class Spectrum:
    """condition: largest over smallest of the min(n, m) singular values, or inf. rank: how many exceed rounding."""

    shape: tuple[int, int]
    condition: float
    rank: int


def spectrum(matrix: Float[Tensor, "n m"]) -> Spectrum:
    """Condition number in the 2-norm, and rank as numpy.linalg.matrix_rank counts it in fp64, of a matrix."""
    rows, columns = matrix.shape
    size = min(rows, columns)
    matrix = matrix.double()
    largest = matrix.abs().max()
    scaled = (matrix / largest if largest > 0 else matrix).cpu().numpy()  # squares neither over- nor underflow
    square = scaled if rows >= columns else scaled.T
    if rows != columns:
        square = scipy.linalg.qr(square, mode="r")[0][:size]  # the same singular values
    threshold = max(rows, columns) * np.finfo(np.float64).eps
    if size > SMALL:
        condition = _condition(square)
        if condition * threshold < 1:
            return Spectrum((rows, columns), condition, size)
    values = scipy.linalg.svdvals(square)
    condition = float(values[0] / values[-1]) if values[-1] > 0 else float("inf")
    return Spectrum((rows, columns), condition, int((values > threshold * values[0]).sum()))


def _condition(square: np.ndarray) -> float:
    """Lanczos iterations on A^T A, and by an LU factorization on its inverse."""
    lu, pivots, singular = scipy.linalg.lapack.dgetrf(square)
    if singular:
        return float("inf")

    def largest(product: LinearOperator) -> float:
        start = np.random.default_rng(0).standard_normal(len(square))
        (value,) = eigsh(product, 1, which="LA", tol=ACCURACY, v0=start, return_eigenvectors=False)
        return float(value) ** 0.5

    def operator(apply: Callable[[np.ndarray], np.ndarray]) -> LinearOperator:
        return LinearOperator(square.shape, matvec=apply, dtype=np.float64)

    solve = partial(scipy.linalg.lu_solve, (lu, pivots), check_finite=False)
    try:
        norm = largest(operator(lambda x: square.T @ (square @ x)))
        return norm * largest(operator(lambda x: solve(solve(x, trans=1))))
    except ArpackError:  # the inverse overflows
        return float("inf")

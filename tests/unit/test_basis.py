"""Pivoting ends, and its columns are what it says, whatever the matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipless.algebra.basis import MAX_REST, pivot

KINDS = ["Gaussian", "low rank", "equal columns", "equal rows", "signs", "zero", "graded", "identity", "Vandermonde"]


def matrix_of(kind, d, m, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(d, m, generator=generator, dtype=torch.float64)
    if kind == "low rank":
        rank = max(1, d // 2)
        matrix = matrix[:, :rank] @ matrix[:rank]
    elif kind == "equal columns":
        matrix = matrix[:, torch.arange(m) % max(1, m // 2)]
    elif kind == "equal rows":
        matrix = matrix[torch.arange(d) % max(1, d // 2)]
    elif kind == "signs":
        matrix = matrix.sign()
    elif kind == "zero":
        matrix = torch.zeros_like(matrix)
    elif kind == "graded":
        matrix = torch.logspace(0, -60, d, dtype=torch.float64)[:, None] * matrix
    elif kind == "identity":
        matrix = torch.eye(d, m, dtype=torch.float64)
    elif kind == "Vandermonde":
        matrix = torch.linspace(-1, 1, m, dtype=torch.float64) ** torch.arange(d, dtype=torch.float64)[:, None]
    return matrix


@pytest.mark.parametrize("kind", KINDS)
@given(d=st.integers(1, 40), more=st.integers(0, 60), seed=st.integers(0, 999), scale=st.sampled_from([1e-60, 1, 1e60]))
def test_no_entry_of_the_rest_is_large(kind, d, more, seed, scale):
    matrix = scale * matrix_of(kind, d, d + more, seed)
    columns = pivot(matrix)
    assert len(columns) == d == len(columns.unique())
    chosen = matrix[:, columns]
    scaled = torch.linalg.cond(chosen / chosen.abs().amax(1, keepdim=True).clamp(min=1e-300))
    if scaled < 1e10:
        rest = torch.linalg.solve(
            chosen / chosen.abs().amax(1, keepdim=True), matrix / chosen.abs().amax(1, keepdim=True)
        )
        assert rest.abs().max() <= MAX_REST * (1 + 1e-4)


def test_lu_alone_would_leave_larger_ones():
    matrix = matrix_of("Gaussian", 60, 120, 0)
    _, pivots, _ = torch.linalg.lu_factor_ex(matrix.T)
    order = list(range(120))
    for row, other in enumerate(pivots.tolist()):
        order[row], order[other - 1] = order[other - 1], order[row]
    first = torch.linalg.solve(matrix[:, order[:60]], matrix).abs().max()
    assert first > 1.4 > MAX_REST >= torch.linalg.solve(matrix[:, pivot(matrix)], matrix).abs().max() - 1e-9

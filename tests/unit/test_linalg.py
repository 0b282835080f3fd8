"""Products in every precision and layout are what torch's in fp64 are; what is returned shares no memory it may not."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipless.algebra import linalg
from skipless.algebra.linalg import (
    LU,
    ROWS,
    cholesky,
    gram,
    inverse,
    max_abs,
    multiply,
    precision,
    product,
    solve_triangular,
    squares,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(*shape, seed=0, turned=False):
    generator = torch.Generator().manual_seed(seed)
    if turned:
        return torch.randn(*reversed(shape), generator=generator, dtype=torch.float64).T
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@given(
    n=st.integers(1, 20),
    d=st.integers(1, 9),
    m=st.integers(1, 9),
    turned=st.tuples(st.booleans(), st.booleans()),
    kinds=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    rows=st.sampled_from([3, 4096]),
)
def test_a_product_is_rounded_once(n, d, m, turned, kinds, rows):
    left, right = draw(n, d, turned=turned[0]).to(kinds[0]), draw(d, m, seed=1, turned=turned[1]).to(kinds[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linalg, "ROWS", rows)
        found = product(left, right, kinds[2])
    exact = left.double() @ right.double()
    eps = max(torch.finfo(kinds[2]).eps, torch.finfo(precision(*kinds)).eps)
    assert found.dtype == kinds[2]
    assert (found.double() - exact).abs().max() <= (d + 1) * eps * (left.double().abs() @ right.double().abs()).max()
    assert (found.T if left.stride(0) == 1 and left.stride(1) != 1 else found).is_contiguous()


def test_only_what_half_precision_hides_is_computed_in_less_than_fp64():
    assert precision(torch.bfloat16, torch.bfloat16, torch.bfloat16) == torch.bfloat16
    assert precision(torch.float16, torch.float16, torch.float16) == torch.float32
    assert precision(torch.float32, torch.bfloat16, torch.bfloat16) == torch.float32
    assert precision(torch.float64, torch.bfloat16, torch.bfloat16) == torch.float64
    assert precision(torch.bfloat16, torch.bfloat16, torch.float32) == torch.float64
    assert precision(torch.float32, torch.float32, torch.float32) == torch.float64


def test_sums_of_bf16_products_are_in_fp32():
    """1 + 2^-9 + ... + 2^-9: in bf16 every addition would be lost."""
    left = torch.full((1, 513), 2.0**-9).bfloat16()
    left[0, 0] = 1
    assert product(left, torch.ones(513, 1).bfloat16(), torch.bfloat16).item() == 2


@pytest.mark.parametrize("turned", [False, True])
def test_gram_of_many_rows_and_columns(turned):
    """In more than one block, in its columns, too."""
    matrix = draw(ROWS + 5, 600, turned=turned)
    torch.testing.assert_close(gram(matrix), matrix.T @ matrix, rtol=1e-12, atol=1e-10)
    assert gram(matrix[:, :0]).shape == (0, 0)
    assert not gram(matrix[:0]).any()


def test_the_largest_magnitude():
    matrix = draw(3, 4)
    matrix[1, 2] = -9
    assert max_abs(matrix) == max_abs(matrix.T) == 9
    matrix[0, 0] = float("nan")
    assert math.isnan(max_abs(matrix))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
def test_factorizations_and_solves(dtype, turned):
    matrix, right = draw(12, 12, turned=turned).to(dtype), draw(12, 3, turned=turned).to(dtype)
    close = {"rtol": 1e4 * torch.finfo(dtype).eps, "atol": 1e4 * torch.finfo(dtype).eps}
    kept = matrix.clone()
    metric = gram(matrix)
    torch.testing.assert_close(metric, kept.T @ kept, **close)
    root = cholesky(metric.clone())
    assert torch.equal(root, root.tril())
    torch.testing.assert_close(root @ root.T, metric, **close)
    torch.testing.assert_close(inverse(root.clone()) @ metric, torch.eye(12, dtype=dtype), **close)
    before = right.clone()
    for factor, upper in ((root, False), (root.T, True), (root.T.contiguous(), True), (root.T.contiguous().T, False)):
        torch.testing.assert_close(factor @ solve_triangular(factor, right, upper=upper), right, **close)
        unit = factor / factor.diagonal()
        torch.testing.assert_close(unit @ solve_triangular(unit, right, upper=upper, unit=True), right, **close)
    torch.testing.assert_close(kept @ LU.of(matrix.clone()).solve(right), right, **close)
    assert torch.equal(right, before)
    assert torch.equal(matrix, kept)
    assert cholesky(-metric) is None
    assert cholesky(torch.full_like(metric, float("nan"))) is None


@given(n=st.integers(0, 200), d=st.integers(1, 9), turned=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_squares_are_summed_in_fp64(n, d, turned, dtype):
    matrix = draw(n, d, turned=turned).to(dtype)
    for dim in (0, 1):
        torch.testing.assert_close(squares(matrix, dim), (matrix.double() ** 2).sum(dim))
    assert squares(torch.full((3, 2), 1e-30).bfloat16(), 0).min() > 0  # in fp32 they would be 0
    out = torch.empty(d, d, dtype=torch.float64)
    assert multiply(matrix.double().T, matrix.double(), out=out) is out

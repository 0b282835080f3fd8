import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipless.algebra import spectrum as room
from skipless.algebra.spectrum import spectrum


def with_values(values, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))[0]
    return left * torch.as_tensor(values, dtype=torch.float64) @ right.T


@pytest.fixture(params=[768, 3], ids=["all singular values", "the extreme ones"])
def _both_ways(request, monkeypatch):
    monkeypatch.setattr(room, "SMALL", request.param)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("exponent", [0, 3, 6, 9])
@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (40, 25), (25, 40)])
def test_the_condition_number_is_numpys(exponent, rows, columns):
    matrix = with_values(np.logspace(0, -exponent, min(rows, columns)), rows, columns)
    found = spectrum(matrix)
    assert found.shape == (rows, columns)
    assert found.rank == min(rows, columns) == np.linalg.matrix_rank(matrix.numpy())
    assert found.condition == pytest.approx(np.linalg.cond(matrix.numpy()), rel=1e-3)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (40, 25), (25, 40)])
def test_the_rank_is_numpys(rows, columns):
    matrix = with_values([3, 2, 1, 1, 1e-3], rows, columns)
    found = spectrum(matrix)
    assert found.rank == np.linalg.matrix_rank(matrix.numpy()) == 5
    assert found.condition > 1e12


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("matrix", [torch.zeros(5, 5), torch.ones(6, 4), torch.eye(7)[:, [0, 1, 1, 3, 4, 5, 6]]])
def test_exactly_singular(matrix):
    found = spectrum(matrix.double())
    assert found.rank == np.linalg.matrix_rank(matrix.numpy())
    assert found.condition > 1e15


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("scale", [1e-170, 1e-60, 1e60, 1e160])
def test_scales(scale):
    matrix = with_values(np.logspace(0, -3, 20), 20, 20)
    assert spectrum(scale * matrix).condition == pytest.approx(1e3, rel=1e-3)
    matrix = scale * torch.eye(20, dtype=torch.float64)
    matrix[3, 3] = 1e-200
    assert spectrum(matrix).condition > 1e29
    assert spectrum(matrix).rank == np.linalg.matrix_rank(matrix.numpy())


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 99))
def test_small_matrices(rows, columns, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert spectrum(matrix).condition == pytest.approx(np.linalg.cond(matrix.numpy()), rel=1e-6)

"""Matrices on grids: what writes and reads a space, rounded with care for each other, loses less than each alone."""

import pytest
import torch

from skipless.algebra import grids
from skipless.algebra.grids import Gridded, round_space
from skipless.algebra.rounding import Grid
from skipless.algebra.rows import Rows

D, STEP = 24, 0.05


def even(matrix):
    """The same step everywhere."""
    step = torch.full_like(matrix, STEP)
    return Grid(step, torch.zeros_like(step), -127, 127)


def whole(stored):
    """All rows of each matrix, and its grid."""
    return [(torch.cat([rows for rows, _ in parts]), parts[0][1]) for parts in stored]


def gridded(matrix, fit):
    return Gridded(matrix, fit, lambda rows, grid: (rows, grid))


def drawn(rows, power=None, seed=0):
    """Rows whose entries go together as they do in a trained model: few directions have most of the power."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, D, generator=generator)
    return matrix if power is None else matrix @ power


def mixing(seed):
    """A basis with a condition number of 100."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(D, D, generator=generator)).Q for _ in range(2))
    return left @ torch.logspace(0, -2, D).diag() @ right


def loss(writers, readers, stored, passed):
    """Of what is read, and of the stream itself, the mean squared errors over the mean squares; (of all) their sum."""
    total = 0.0
    count = len(writers)
    rows = torch.cat([writer.matrix for writer in writers]).double()
    found = torch.cat([matrix for matrix, _ in stored[:count]]).double()
    for reader, (after, _) in zip(readers, stored[count:], strict=True):
        exact = rows @ reader.matrix.double().T
        total += (found @ after.double().T - exact).square().sum() / exact.square().sum()
    if passed:
        total += (found - rows).square().sum() / rows.square().sum()
    return float(total)


@pytest.mark.parametrize("passed", [False, True])
def test_together_they_lose_less_than_alone(passed):
    power = mixing(1)
    writers = [gridded(drawn(200, power), even)]
    readers = [gridded(drawn(30, torch.linalg.inv(power).T / 20, seed), even) for seed in (2, 3)]
    alone = [(even(each.matrix).nearest(each.matrix), None) for each in (*writers, *readers)]
    together = whole(round_space(writers, readers, passed))
    for matrix, _ in together:
        assert torch.equal(matrix, even(matrix).nearest(matrix))
    assert loss(writers, readers, together, passed) < 0.5 * loss(writers, readers, alone, passed)


def test_what_keeps_its_bits_makes_up_for_what_does_not():
    """A writer in full precision is solved for: with as many outputs as dimensions, nothing of what is read is lost."""
    writers = [gridded(drawn(200), None)]
    readers = [gridded(drawn(D, seed=1), even)]
    stored = whole(round_space(writers, readers, passed=False))
    assert stored[0][1] is None
    assert loss(writers, readers, stored, passed=False) < 1e-9
    assert loss(writers, readers, [(writers[0].matrix, None), stored[1]], passed=False) > 1e-5


def test_nothing_to_round_stays():
    writers, readers = [gridded(drawn(50), None)], [gridded(drawn(30, seed=1), None)]
    for (found, grid), each in zip(
        whole(round_space(writers, readers, passed=True)), (*writers, *readers), strict=True
    ):
        assert grid is None
        assert torch.equal(found, each.matrix)


def test_a_stream_that_is_zero():
    zero = [gridded(torch.zeros(40, D), even)]
    assert all((matrix == 0).all() for matrix, _ in whole(round_space(zero, zero, passed=True)))


def test_matrices_of_which_only_some_rows_are_in_memory(monkeypatch):
    """The same as whole ones, to rounding, however many rows are taken at a time."""
    monkeypatch.setattr(grids, "block_rows", lambda d: 70)  # 64 of them: whole groups
    asked = []

    def made(matrix):
        def make(rows):
            asked.append(rows.stop - rows.start)
            return matrix[rows]

        return Rows(tuple(matrix.shape), matrix.dtype, matrix.device, make)

    matrices = drawn(200, mixing(1)), drawn(90, seed=2)
    found = [
        whole(round_space([gridded(kind(matrices[0]), even)], [gridded(kind(matrices[1]), even)], passed=True))
        for kind in (made, lambda matrix: matrix)
    ]
    assert {64, 8, 26} <= set(asked)
    for (rows, _), (expected, _) in zip(*found, strict=True):
        torch.testing.assert_close(rows, expected)

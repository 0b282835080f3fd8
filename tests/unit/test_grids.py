"""Matrices on grids: what writes and reads a space, rounded with care for each other, loses less than each alone."""

import pytest
import torch

from skipless.algebra.grids import Gridded, round_space
from skipless.algebra.rounding import Grid

D, STEP = 24, 0.05


def even(matrix):
    """The same step everywhere."""
    step = torch.full_like(matrix, STEP)
    return Grid(step, torch.zeros_like(step), -127, 127)


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
    writers = [Gridded(drawn(200, power), even)]
    readers = [Gridded(drawn(30, torch.linalg.inv(power).T / 20, seed), even) for seed in (2, 3)]
    alone = [(even(each.matrix).nearest(each.matrix), None) for each in (*writers, *readers)]
    together = round_space(writers, readers, passed)
    for matrix, grid in together:
        assert torch.equal(matrix, grid.nearest(matrix))
    assert loss(writers, readers, together, passed) < 0.5 * loss(writers, readers, alone, passed)


def test_what_keeps_its_bits_makes_up_for_what_does_not():
    """A writer in full precision is solved for: with as many outputs as dimensions, nothing of what is read is lost."""
    writers = [Gridded(drawn(200), None)]
    readers = [Gridded(drawn(D, seed=1), even)]
    stored = round_space(writers, readers, passed=False)
    assert stored[0][1] is None
    assert loss(writers, readers, stored, passed=False) < 1e-9
    assert loss(writers, readers, [(writers[0].matrix, None), stored[1]], passed=False) > 1e-5


def test_nothing_to_round_stays():
    writers, readers = [Gridded(drawn(50), None)], [Gridded(drawn(30, seed=1), None)]
    for (found, grid), each in zip(round_space(writers, readers, passed=True), (*writers, *readers), strict=True):
        assert grid is None
        assert torch.equal(found, each.matrix)


def test_a_stream_that_is_zero():
    zero = [Gridded(torch.zeros(40, D), even)]
    assert all((matrix == 0).all() for matrix, _ in round_space(zero, zero, passed=True))

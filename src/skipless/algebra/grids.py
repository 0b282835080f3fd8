"""Store all that writes and reads a space in few bits, on grids whose steps groups of numbers share.

Steps 3 to 5 of algebra/rounding.py, in its letters: what reads the stream x is rounded under G = E[x^T x]; what writes
it is solved for again, so that it suits what is now read by, and then rounded under H, which says what an error of the
stream costs in all that reads it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from skipless.algebra.linalg import block_rows, gram, product, slices
from skipless.algebra.rounding import Grid, factorize, moment, round_to_grid
from skipless.algebra.rows import Matrix

# Where nothing is read, mean squares are taken to be this large.
TINY = torch.finfo(torch.float32).tiny
# Rows are worked on in multiples of so many: numbers below each other may share a step, too.
TOGETHER = 32


@dataclass(frozen=True)
class Gridded:
    """A matrix each of whose rows has a number for each dimension of the space: a writer's are vectors of the stream, a
    reader's what one of its outputs multiplies them by.

    fit: the grid for some rows (None: they keep all their bits). encode: what is kept of rows that are on a grid.
    """

    matrix: Float[Matrix, "n d"]
    fit: Callable[[Float[Tensor, "k d"]], Grid] | None
    encode: Callable[[Float[Tensor, "k d"], Grid | None], Any]

    def rounded(
        self, metric: Float[Tensor, "d d"], change: Float[Tensor, "d d"] | None = None
    ) -> Iterator[tuple[Float[Tensor, "k d"], Float[Tensor, "k d"], Any]]:
        """Some rows X at a time: X, or X + X change, the same stored with feedback under a metric, and that encoded.

        The rows that come first say in which order the metric is followed.
        """
        factors = None
        size = block_rows(self.matrix.shape[1])
        for rows in slices(len(self.matrix), max(TOGETHER, size - size % TOGETHER)):
            exact = self.matrix[rows]
            if change is not None:
                exact = exact + product(exact, change, exact.dtype)
            if self.fit is None:
                yield exact, exact, self.encode(exact, None)
                continue
            grid = self.fit(exact)
            if factors is None:
                factors = factorize(metric, grid.step.double().square().mean(0))
            stored = round_to_grid(exact, grid, factors)
            yield exact, stored, self.encode(stored, grid)


def round_space(writers: Sequence[Gridded], readers: Sequence[Gridded], passed: bool) -> list[list[Any]]:
    """Writers and readers, in this order, as they are best stored: what was encoded of each, some rows after the other.

    A vector of the stream is the sum of one row of each writer. passed: whether it is also read as it is. Errors count
    by what they are of each reader's mean square, and of the stream's own.
    """
    power = moment([writer.matrix for writer in writers])  # G
    metric, lost = torch.zeros_like(power), torch.zeros_like(power)  # H; (R - R') W R'^T
    if passed:
        metric.diagonal().add_(1 / power.diagonal().mean().clamp(min=TINY))
    read: list[list[Any]] = []
    for reader in readers:
        weight = len(reader.matrix) / (gram(reader.matrix, power.dtype) * power).sum().clamp(min=TINY)
        read.append([])
        for exact, stored, encoded in reader.rounded(power):
            metric += weight * gram(stored, power.dtype)
            after = stored.to(power.dtype)
            lost += weight * (exact - after).T @ after
            read[-1].append(encoded)
    change = factorize(metric, power.diagonal()).solve(lost.T).T
    written = [[encoded for _, _, encoded in writer.rounded(metric, change)] for writer in writers]
    return written + read

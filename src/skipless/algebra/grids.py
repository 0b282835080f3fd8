"""Store all that writes and reads a space in few bits, on grids whose steps groups of numbers share.

Steps 3 to 5 of algebra/rounding.py, in its letters: what reads the stream x is rounded under G = E[x^T x]; what writes
it is solved for again, so that it suits what is now read by, and then rounded under H, which says what an error of the
stream costs in all that reads it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from skipless.algebra.linalg import blocks, gram, product
from skipless.algebra.rounding import Grid, factorize, moment, round_to_grid

# Where nothing is read, mean squares are taken to be this large.
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Gridded:
    """A matrix each of whose rows has a number for each dimension of the space: a writer's are vectors of the stream, a
    reader's what one of its outputs multiplies them by. fit: the grid for such a matrix (None: it keeps all its bits).
    """

    matrix: Float[Tensor, "n d"]
    fit: Callable[[Float[Tensor, "n d"]], Grid] | None

    def rounded(self, metric: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "n d"], Grid | None]:
        """As it is stored, and on which grid: with feedback under a metric."""
        if self.fit is None:
            return self.matrix, None
        grid = self.fit(self.matrix)
        return round_to_grid(self.matrix, grid, metric), grid


def round_space(
    writers: Sequence[Gridded], readers: Sequence[Gridded], passed: bool
) -> list[tuple[Float[Tensor, "n d"], Grid | None]]:
    """Writers and readers, in this order, as they are best stored, and the grid of each.

    A vector of the stream is the sum of one row of each writer. passed: whether it is also read as it is. Errors count
    by what they are of each reader's mean square, and of the stream's own.
    """
    power = moment([writer.matrix for writer in writers])  # G
    found = [reader.rounded(power) for reader in readers]
    metric, lost = torch.zeros_like(power), torch.zeros_like(power)  # H; (R - R') W R'^T
    if passed:
        metric.diagonal().add_(1 / power.diagonal().mean().clamp(min=TINY))
    for reader, (after, _) in zip(readers, found, strict=True):
        weight = len(after) / (gram(reader.matrix, power.dtype) * power).sum().clamp(min=TINY)
        metric += weight * gram(after, power.dtype)
        for rows in blocks(after):
            stored = after[rows].to(power.dtype)
            lost += weight * (reader.matrix[rows] - stored).T @ stored
    change = factorize(metric, power.diagonal()).solve(lost.T).T
    resolved = [
        Gridded(writer.matrix + product(writer.matrix, change, writer.matrix.dtype), writer.fit) for writer in writers
    ]
    return [writer.rounded(metric) for writer in resolved] + found

"""Which block of a seam becomes the identity, and how well it can be solved with.

S below is square, (d, d), in fp64; solves go through an LU factorization, never through an inverse.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from skipless.errors import InputError
from skipless.seams import Seam

# A solve in fp64 loses about eps * condition. Beyond this, the rewritten model could not reach 1e-9 even in fp64.
MAX_CONDITION = 1e-9 / np.finfo(np.float64).eps


@dataclass(frozen=True)
class Basis:
    """An LU-factorized S; `condition` is LAPACK's estimate (gecon) of its condition number in the 1-norm, or inf."""

    lu: np.ndarray
    pivots: np.ndarray
    condition: float

    @classmethod
    def factorize(cls, matrix: Float[Tensor, "d d"]) -> "Basis":
        """Factorize S (LAPACK getrf through scipy, which outruns torch's fp64 on a CPU)."""
        dense = matrix.to(torch.float64).numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)  # an exactly singular S: condition says so
            lu, pivots = scipy.linalg.lu_factor(dense, check_finite=False)
        reciprocal, _ = scipy.linalg.lapack.dgecon(lu, np.linalg.norm(dense, 1))
        return cls(lu, pivots, 1 / reciprocal if reciprocal > 0 else float("inf"))

    @property
    def usable(self) -> bool:
        """Whether a model rewritten in this basis can equal the original to 1e-9 in fp64."""
        return bool(self.condition <= MAX_CONDITION)

    def solve(self, right: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
        """S^-1 right."""
        solution = scipy.linalg.lu_solve((self.lu, self.pivots), right.numpy(), check_finite=False)
        return torch.from_numpy(solution)


def choose(seam: Seam, gone: str, weights: Mapping[str, Float[Tensor, "d _"]]) -> Basis:
    """The basis that turns the reader `gone` into the identity; weights: those of the seam's readers.

    Raises InputError when it is singular or nearly so, with its condition number and the alternatives that would work.
    """
    basis = Basis.factorize(weights[gone])
    if basis.usable:
        return basis
    others = {name: Basis.factorize(weights[module]) for name, module in seam.identities.items() if module != gone}
    alternatives = [
        *(f"--basis {name} (condition number {other.condition:.1e})" for name, other in others.items() if other.usable),
        f"leave this seam open with --layers-open {seam.layer}",
    ]
    raise InputError(
        f"{gone}.weight: expected an invertible matrix (condition number at most {MAX_CONDITION:.1e}), "
        f"found {basis.condition:.1e}; use {' or '.join(alternatives)}"
    )

"""A module's map, y = x W + b, in row vectors: W (inputs, outputs)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from skipless.algebra.linalg import product
from skipless.algebra.rows import Matrix, Rows
from skipless.architecture.seams import Seam


@dataclass(frozen=True)
class Affine:
    """A module's map, its weight in any dtype, its bias in fp64. A norm's gain is a diagonal, its weight a vector.

    `table`: one of its rows is looked up at a time; `one_hot`: and every row can take a bias in. moment: the
    covariance of its inputs, in blocks of them one after the other, and mean: what they are for any token, where a seam
    that was closed before has made them other than white. scale: by what the stream gets what it writes, bias included,
    or it gets the stream, where trainable gains stand between.
    """

    weight: Float[Matrix, "inputs outputs"] | Float[Tensor, "outputs"]
    bias: Float[Tensor, "outputs"] | None = None
    one_hot: bool = False
    table: bool = False
    moment: Float[Tensor, "blocks n n"] | None = None
    mean: Float[Tensor, "inputs"] | None = None
    scale: float = 1.0

    @property
    def scaled(self) -> Float[Matrix, "inputs outputs"] | Float[Tensor, "outputs"]:
        """The weight, times scale."""
        return self.weight if self.scale == 1 else self.weight.double() * self.scale

    def with_bias(self, bias: Float[Tensor, "outputs"] | None) -> "Affine":
        """The same map plus a bias."""
        if bias is None:
            return self
        if self.one_hot:
            own = bias.to(self.weight.dtype)
            if isinstance(self.weight, Rows):
                return dataclasses.replace(self, weight=self.weight.map(own.add, len(own), own.dtype))
            return dataclasses.replace(self, weight=self.weight + own)
        return dataclasses.replace(self, bias=bias if self.bias is None else self.bias + bias)

    def of_rows(self, weight: Float[Matrix, "some outputs"]) -> "Affine":
        """The map of some inputs alone: rows of its weight. What the others were goes."""
        return dataclasses.replace(self, weight=weight, moment=None, mean=None)


def past_norm(seam: Seam, affines: Mapping[str, Affine]) -> dict[str, Affine]:
    """The readers M of a seam; of a redundant norm before them, which goes, diag(gain) M."""
    readers = {name: affines[name] for name in seam.readers}
    if seam.through not in affines:
        return readers
    gain = affines[seam.through].weight.double()[:, None]
    return {name: dataclasses.replace(reader, weight=gain * reader.weight) for name, reader in readers.items()}


def read(x: Float[Tensor, "inputs"], weight: Float[Tensor, "inputs outputs"]) -> Float[Tensor, "outputs"]:
    """One vector x W, in fp64."""
    return product(weight.T, x[:, None], torch.float64)[:, 0]

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
    """A module's map: its weight in any dtype, its bias in fp64. A norm's weight is its gain, a vector.

    table: its input picks one row. one_hot: a table, each of whose rows can take a bias in.
    moment, mean: the covariance of its inputs, in blocks along the diagonal, and their mean, where a seam that was
    closed before has made them other than white (None: white). scale: a trainable gain between the map and the stream.
    The stream gets scale times what a writer writes, bias included; a reader reads scale times the stream.
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
        """The map of some of its inputs alone, by their rows of the weight; moment and mean are dropped."""
        return dataclasses.replace(self, weight=weight, moment=None, mean=None)


def past_norm(seam: Seam, affines: Mapping[str, Affine]) -> dict[str, Affine]:
    """The readers M of a seam; where a redundant norm before them goes, diag(gain) M."""
    readers = {name: affines[name] for name in seam.readers}
    if seam.through not in affines:
        return readers
    gain = affines[seam.through].weight.double()[:, None]
    return {name: dataclasses.replace(reader, weight=gain * reader.weight) for name, reader in readers.items()}


def read(x: Float[Tensor, "inputs"], weight: Float[Tensor, "inputs outputs"]) -> Float[Tensor, "outputs"]:
    """One vector x W, in fp64."""
    return product(weight.T, x[:, None], torch.float64)[:, 0]

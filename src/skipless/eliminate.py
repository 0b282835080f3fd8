"""Close one seam on tensors: one module becomes the identity, its neighbours take over what it did.

Row vectors, y = x W + b, W (inputs, outputs), all in fp64 (arXiv:2404.12362, Fig. 1 and 2; biases: S has bias b_S).

    a reader S becomes the identity    writers W -> W S, b -> b S, one of them + b_S
                                       other readers A -> R = S^-1 A, b -> b - b_S R
                                       duals (writers read through the transposed, tied table) W -> W S^-T, b -> b S^-T
    a writer P becomes the identity    readers M -> P M, m -> p M + m
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from skipless.basis import Basis
from skipless.seams import Seam


@dataclass(frozen=True)
class Affine:
    """A module's map in fp64. `one_hot`: its inputs are rows of the unit matrix, so every row can take a bias in."""

    weight: Float[Tensor, "inputs outputs"]
    bias: Float[Tensor, "outputs"] | None = None
    one_hot: bool = False

    def with_bias(self, bias: Float[Tensor, "outputs"] | None) -> "Affine":
        """The same map plus a bias."""
        if bias is None:
            return self
        if self.one_hot:
            return dataclasses.replace(self, weight=self.weight + bias)
        return dataclasses.replace(self, bias=bias if self.bias is None else self.bias + bias)


def close(seam: Seam, gone: str, affines: Mapping[str, Affine], basis: Basis | None) -> dict[str, Affine]:
    """Close `seam` by turning the module `gone`, one of seam.identities, into the identity; returns those that remain.

    affines: every module of seam.modules. basis: that of `gone`, if it is a reader (basis.choose).
    """
    if gone in seam.writers:
        return _merge_writer(seam, gone, affines)
    assert basis is not None
    return _reader_to_identity(seam, gone, affines, basis)


def _merge_writer(seam: Seam, gone: str, affines: Mapping[str, Affine]) -> dict[str, Affine]:
    """M* = P M, m* = p M + m (Fig. 2a)."""
    assert seam.writers == (gone,)
    writer = affines[gone]
    merged = {}
    for name in seam.readers:
        reader = affines[name]
        carried = None if writer.bias is None else writer.bias @ reader.weight
        merged[name] = dataclasses.replace(reader, weight=writer.weight @ reader.weight).with_bias(carried)
    return merged


def _reader_to_identity(seam: Seam, gone: str, affines: Mapping[str, Affine], basis: Basis) -> dict[str, Affine]:
    """O* = O S, R = S^-1 A (Fig. 2b), with biases and tied tables."""
    chosen = affines[gone]
    closed = {}
    for name in seam.writers:
        writer = affines[name]
        bias = None if writer.bias is None else writer.bias @ chosen.weight
        moved = dataclasses.replace(writer, weight=writer.weight @ chosen.weight, bias=bias)
        closed[name] = moved.with_bias(chosen.bias) if name in seam.bias_takers else moved
    for name in seam.readers:
        if name != gone:
            rest = basis.solve(affines[name].weight)
            carried = None if chosen.bias is None else -(chosen.bias @ rest)
            closed[name] = dataclasses.replace(affines[name], weight=rest).with_bias(carried)
    for name in seam.duals:
        dual = affines[name]
        bias = None if dual.bias is None else basis.solve(dual.bias[:, None])[:, 0]
        closed[name] = dataclasses.replace(dual, weight=basis.solve(dual.weight.T).T, bias=bias)
    return closed

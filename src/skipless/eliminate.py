"""Close one seam on tensors: a block of one matrix becomes the identity, its neighbours take over what it did.

Row vectors, y = x W + b, W (inputs, outputs), all in fp64 (arXiv:2404.12362, Fig. 1 and 2; biases: S has bias b_S).

    columns S of the readers become the identity    writers W -> W S, b -> b S, one of them + b_S
                                                    the other columns A_r -> R = S^-1 A_r, b_r -> b_r - b_S R
                                                    duals (writers read through the transposed, tied table)
                                                    W -> W S^-T, b -> b S^-T
    a writer P becomes the identity                 readers M -> P M, m -> p M + m
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
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


def merge(seam: Seam, affines: Mapping[str, Affine]) -> dict[str, Affine]:
    """Close a P-M seam: M* = P M, m* = p M + m (Fig. 2a). affines: those of seam.modules; returns the readers."""
    (writer,) = (affines[name] for name in seam.writers)
    merged = {}
    for name in seam.readers:
        reader = affines[name]
        carried = None if writer.bias is None else writer.bias @ reader.weight
        merged[name] = dataclasses.replace(reader, weight=writer.weight @ reader.weight).with_bias(carried)
    return merged


@dataclass(frozen=True)
class Stream:
    """A closed stream seam: the stream x is now the readers' `kept` columns, x R + b_R the `others` (both ascending).

    writers: the maps that write x. rest: R (d, r) with b_R. duals: read through the transposed first writer.
    """

    writers: dict[str, Affine]
    rest: Affine
    duals: dict[str, Affine]
    kept: Int[Tensor, "d"]
    others: Int[Tensor, "r"]


def close_stream(seam: Seam, affines: Mapping[str, Affine], basis: Basis) -> Stream:
    """O* = O S, R = S^-1 A_r (Fig. 2b), with biases and tied tables. affines: every module of seam.modules."""
    joined = _join([affines[name] for name in seam.readers])
    kept = basis.columns
    is_other = torch.ones(joined.weight.shape[1], dtype=torch.bool, device=kept.device)
    is_other[kept] = False
    others = is_other.nonzero()[:, 0]
    chosen = joined.weight[:, kept]
    chosen_bias = None if joined.bias is None else joined.bias[kept]
    rest = Affine(basis.solve(joined.weight[:, others]), None if joined.bias is None else joined.bias[others])
    if chosen_bias is not None:
        rest = rest.with_bias(-(chosen_bias @ rest.weight))
    writers = {}
    for name in seam.writers:
        writer = affines[name]
        # (S^T W^T)^T: stored transposed, a linear layer's weight is then contiguous
        weight = writer.weight @ chosen if writer.one_hot else (chosen.T @ writer.weight.T).T
        bias = None if writer.bias is None else writer.bias @ chosen
        moved = dataclasses.replace(writer, weight=weight, bias=bias)
        writers[name] = moved.with_bias(chosen_bias) if name in seam.bias_takers else moved
    duals = {}
    for name in seam.duals:
        dual = affines[name]
        bias = None if dual.bias is None else basis.solve(dual.bias[:, None])[:, 0]
        duals[name] = dataclasses.replace(dual, weight=basis.solve(dual.weight.T).T, bias=bias)
    return Stream(writers, rest, duals, kept, others)


def modules(seam: Seam, way: str, stream: Stream, widths: Mapping[str, int]) -> dict[str, Affine]:
    """The modules that remain of a stream seam closed by `way`. widths: outputs of seam.readers."""
    if seam.removed(way) == seam.readers:
        rest = {seam.rest: stream.rest} if len(stream.others) else {}
    else:
        names = [name for name in seam.readers if name not in seam.removed(way)]
        sizes = [widths[name] for name in names]
        biases = [None] * len(names) if stream.rest.bias is None else stream.rest.bias.split(sizes)
        parts = zip(names, stream.rest.weight.split(sizes, 1), biases, strict=True)
        rest = {name: Affine(weight, bias) for name, weight, bias in parts}
    return {**stream.writers, **rest, **stream.duals}


def column_order(stream: Stream) -> Int[Tensor, "m"]:
    """With c = [x, x R + b_R], c[column_order] are the readers' outputs in their own order."""
    return torch.cat([stream.kept, stream.others]).argsort().to(torch.int32)


def _join(readers: Sequence[Affine]) -> Affine:
    """[Q|K|V] as one map; it has a bias if one of them has."""
    biases = None
    if any(reader.bias is not None for reader in readers):
        zeros = [reader.weight.new_zeros(reader.weight.shape[1]) for reader in readers]
        pairs = zip(readers, zeros, strict=True)
        biases = torch.cat([zero if reader.bias is None else reader.bias for reader, zero in pairs])
    return Affine(torch.cat([reader.weight for reader in readers], 1), biases)

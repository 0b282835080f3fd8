"""A space whose basis becomes columns of what reads it: the exact algebra of closing it.

Row vectors, y = x W + b, W (inputs, outputs) (arXiv:2404.12362, Fig. 1 and 2; biases: S has bias b_S). Every solve is
in fp64; a product is in what the dtype that it is to be stored in needs (linalg.precision).

    columns S of the readers become the identity    writers W -> W S, b -> b S, those at its first place + b_S / scale
                                                    the other columns A_r -> R = S^-1 A_r, b_r -> b_r - b_S R
                                                    followers (what else reads it) W -> S^-1 W,
                                                    b -> b - scale b_S S^-1 W
                                                    duals (writers read through the transposed, tied table)
                                                    W -> W S^-T, b -> b S^-T
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from skipless.algebra.affine import Affine, read
from skipless.algebra.basis import Basis, join
from skipless.algebra.linalg import product
from skipless.architecture.seams import Seam


@dataclass(frozen=True)
class Stream:
    """A closed stream seam: the stream x is now the readers' `kept` columns, x R + b_R the `others` (both ascending).

    writers: the maps that write x. rest: R (d, r) with b_R. duals: writers that are read through the transposed, tied
    table. followers: further readers, in the new basis. bias_shares: the part of each writer's bias that is in x. seen:
    of "rest" and each follower, how many of the writers have written before it reads (all, if it is not named).
    """

    writers: dict[str, Affine]
    rest: Affine
    duals: dict[str, Affine]
    followers: dict[str, Affine]
    kept: Int[Tensor, "d"]
    others: Int[Tensor, "r"]
    bias_shares: dict[str, float]
    seen: dict[str, int] = dataclasses.field(default_factory=dict)

    def reads(self, reader: str, writer: int) -> bool:
        """Whether "rest", or a follower, reads what the writer of this number has written."""
        return writer < self.seen.get(reader, len(self.writers))

    def beside(self) -> list[tuple[str, Float[Tensor, "d _"]]]:
        """What else reads x, by name: the duals transposed, and the followers."""
        duals = [(name, dual.weight.T) for name, dual in self.duals.items()]
        return [*duals, *((name, follower.weight) for name, follower in self.followers.items())]


def close_rest(seam: Seam, affines: Mapping[str, Affine], basis: Basis) -> Affine:
    """R = S^-1 A_r, b_R = b_r - b_S R: what reads the stream once the seam is closed, in fp64."""
    readers = [affines[name] for name in seam.readers]
    joined, bias, others = join([reader.weight for reader in readers]), _bias(readers), _others(readers, basis)
    rest = Affine(basis.solve(joined.T[others].T), None if bias is None else bias[others])
    return rest if bias is None else rest.with_bias(-read(bias[basis.columns], rest.weight))


def close_stream(
    seam: Seam,
    affines: Mapping[str, Affine],
    basis: Basis,
    precision_of: Callable[[Stream], torch.dtype] = lambda readers: torch.float64,
) -> Stream:
    """O* = O S, R = S^-1 A_r (Fig. 2b), with biases and tied tables. affines: every module of seam.modules.

    precision_of: the precision of O S, of a stream that has all but its writers.
    """
    rest = close_rest(seam, affines, basis)
    readers = [affines[name] for name in seam.readers]
    kept, bias = basis.columns, _bias(readers)
    chosen = join([reader.weight for reader in readers]).T[kept].T
    chosen_bias = None if bias is None else bias[kept]
    duals = {}
    for name in seam.duals:
        dual = affines[name]
        bias = None if dual.bias is None else basis.solve(dual.bias[:, None])[:, 0]
        duals[name] = dataclasses.replace(dual, weight=basis.solve(dual.weight.T).T, bias=bias)
    followers = {}
    for name in seam.followers:
        weight = basis.solve(affines[name].weight)
        moved = dataclasses.replace(affines[name], weight=weight)
        followers[name] = moved.with_bias(None if chosen_bias is None else -moved.scale * read(chosen_bias, weight))
    shares = {name: seam.bias_share(name) for name in seam.writers}
    seen = {name: seam.seen[name] for name in seam.followers if name in seam.seen}
    if seam.readers[0] in seam.seen:
        seen["rest"] = seam.seen[seam.readers[0]]
    stream = Stream({}, rest, duals, followers, kept, _others(readers, basis), shares, seen)
    within = precision_of(stream)
    for name in seam.writers:
        writer = affines[name]
        bias = None if writer.bias is None else read(writer.bias, chosen)
        moved = dataclasses.replace(writer, weight=product(writer.weight, chosen, within, within), bias=bias)
        taken = None if chosen_bias is None else chosen_bias / moved.scale
        stream.writers[name] = moved.with_bias(taken) if name in seam.bias_takers else moved
    return stream


def column_order(stream: Stream) -> Int[Tensor, "m"]:
    """With c = [x, x R + b_R], c[column_order] are the readers' outputs in their own order."""
    return torch.cat([stream.kept, stream.others]).argsort().to(torch.int32)


def _bias(readers: Sequence[Affine]) -> Float[Tensor, "m"] | None:
    """The bias of [Q|K|V]: it has one if one of them has."""
    if all(reader.bias is None for reader in readers):
        return None
    widths = [reader.weight.shape[1] for reader in readers]
    zeros = [torch.zeros(width, dtype=torch.float64, device=readers[0].weight.device) for width in widths]
    return torch.cat([z if reader.bias is None else reader.bias for z, reader in zip(zeros, readers, strict=True)])


def _others(readers: Sequence[Affine], basis: Basis) -> Int[Tensor, "r"]:
    """The columns of [Q|K|V] that do not become the identity, ascending."""
    is_other = torch.ones(
        sum(reader.weight.shape[1] for reader in readers), dtype=torch.bool, device=basis.columns.device
    )
    is_other[basis.columns] = False
    return is_other.nonzero()[:, 0]

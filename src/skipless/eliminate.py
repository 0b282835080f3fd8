"""Close one seam on tensors: a block of one matrix becomes the identity, its neighbours take over what it did.

Row vectors, y = x W + b, W (inputs, outputs) (arXiv:2404.12362, Fig. 1 and 2; biases: S has bias b_S). Every solve is
in fp64; a product is in what the dtype that it is to be stored in needs (products.precision).

    columns S of the readers become the identity    writers W -> W S, b -> b S, one of them + b_S
                                                    the other columns A_r -> R = S^-1 A_r, b_r -> b_r - b_S R
                                                    duals (writers read through the transposed, tied table)
                                                    W -> W S^-T, b -> b S^-T
    a writer P becomes the identity                 readers M -> P M, m -> p M + m
    rows T of a writer become the identity          its other rows W_r -> W_r T^-1, readers A -> T A
                                                    other writers W -> W T^-1, b -> b T^-1
                                                    (heads of V: each its own T; their bias goes on to the readers)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from skipless.basis import Basis, join
from skipless.products import product
from skipless.rows import Matrix
from skipless.seams import Seam


@dataclass(frozen=True)
class Affine:
    """A module's map, its weight in any dtype, its bias in fp64. A norm's gain is a diagonal, its weight a vector.

    `one_hot`: its inputs are rows of the unit matrix, so every row can take a bias in.
    """

    weight: Float[Matrix, "inputs outputs"] | Float[Tensor, "outputs"]
    bias: Float[Tensor, "outputs"] | None = None
    one_hot: bool = False

    def with_bias(self, bias: Float[Tensor, "outputs"] | None) -> "Affine":
        """The same map plus a bias."""
        if bias is None:
            return self
        if self.one_hot:
            return dataclasses.replace(self, weight=self.weight + bias.to(self.weight.dtype))
        return dataclasses.replace(self, bias=bias if self.bias is None else self.bias + bias)


def past_norm(seam: Seam, affines: Mapping[str, Affine]) -> dict[str, Affine]:
    """The readers M of a seam; of a redundant norm before them, which goes, diag(gain) M."""
    readers = {name: affines[name] for name in seam.readers}
    if seam.through not in affines:
        return readers
    gain = affines[seam.through].weight.double()[:, None]
    return {name: dataclasses.replace(reader, weight=gain * reader.weight) for name, reader in readers.items()}


def merge(
    seam: Seam,
    affines: Mapping[str, Affine],
    dtypes: Mapping[str, torch.dtype] | None = None,
    scale: Float[Tensor, "1"] | None = None,
) -> dict[str, Affine]:
    """Close a P-M seam, M* = P M, m* = a p M + m (Fig. 2a), or a norm's gain: P is then a diagonal, its weight (d,).

    affines: those of seam.modules; returns the readers. dtypes: in what each reader's weight is returned (fp64).
    scale: a, by which what P writes is multiplied before it is read (1), as the heads will be in its place.
    """
    (writer,) = (affines[name] for name in seam.writers)
    bias = writer.bias if writer.bias is None or scale is None else writer.bias * scale.to(writer.bias.dtype)
    merged = {}
    for name, reader in past_norm(seam, affines).items():
        weight, dtype = reader.weight, torch.float64 if dtypes is None else dtypes[name]
        carried = None if bias is None else read(bias, weight)
        if writer.weight.ndim == 1:
            moved = (writer.weight.double()[:, None] * weight).to(dtype)
        else:
            moved = product(weight.T, writer.weight.T, dtype).T
        merged[name] = dataclasses.replace(reader, weight=moved).with_bias(carried)
    return merged


def read(x: Float[Tensor, "inputs"], weight: Float[Tensor, "inputs outputs"]) -> Float[Tensor, "outputs"]:
    """One vector x W, in fp64."""
    return product(weight.T, x[:, None], torch.float64)[:, 0]


def close_rows(
    seam: Seam, affines: Mapping[str, Affine], bases: Sequence[Basis], mix: Float[Tensor, "heads"] | None = None
) -> tuple[dict[str, Affine], Int[Tensor, "blocks n"]]:
    """Make rows of the first writer the identity, those of each block of its columns for itself.

    bases: of each block's transposed columns (width, n), the rows T that go. mix: by what a bias of V is multiplied on
    its way through each query head (1, or alpha + beta - gamma), if it is to move on to the readers. Returns the
    modules that remain, and for each block the order of inputs: those passed through, then those of the weight's rows.
    """
    first = affines[seam.writers[0]]
    first = dataclasses.replace(first, weight=first.weight.double())
    size, remaining, orders, kept, passed = seam.width, {}, [], [], []
    for block, basis in zip(first.weight.split(size, 1), bases, strict=True):
        left = torch.ones(len(block), dtype=torch.bool, device=block.device)
        left[basis.columns] = False
        orders.append(torch.cat([basis.columns, left.nonzero()[:, 0]]))
        kept.append(basis.solve(block[left].T).T)
        passed.append(block[basis.columns])
    chosen = torch.stack(passed)
    readers, carried = past_norm(seam, affines), {}
    if mix is not None and first.bias is not None:  # the bias of each query head's value, on its way to the readers
        each = first.bias.view(seam.blocks, 1, size) * mix.view(seam.blocks, -1, 1)
        carried = {name: read(each.flatten(), reader.weight) for name, reader in readers.items()}
    for name, reader in readers.items():
        rows = reader.weight.double().unflatten(0, (seam.blocks, -1, size))
        weight = torch.einsum("brs,bgsf->bgrf", chosen, rows).flatten(0, 2)
        remaining[name] = dataclasses.replace(reader, weight=weight).with_bias(carried.get(name))
    (basis, *_) = bases
    own = None if first.bias is None or mix is not None else basis.solve(first.bias[:, None])[:, 0]
    for name in seam.writers[1:]:
        writer = affines[name]
        bias = None if writer.bias is None else basis.solve(writer.bias[:, None])[:, 0]
        moved = dataclasses.replace(writer, weight=basis.solve(writer.weight.T).T, bias=bias)
        remaining[name] = moved.with_bias(own) if name in seam.bias_takers else moved
    if orders[0].numel() > size:
        stays = own if not seam.bias_takers else None
        remaining[seam.writers[0]] = Affine(torch.cat(kept, 1), stays)
    return remaining, torch.stack(orders)


def normalize_rows(table: Affine, norm: Affine | None, norm_type: str, eps: float) -> Affine:
    """The token table with a norm applied to each row, in fp64. norm: its gain, and bias if it has one."""
    rows = table.weight.double()
    if norm_type == "layer":
        rows = rows - rows.mean(1, keepdim=True)
    rows = rows * torch.rsqrt(rows.square().mean(1, keepdim=True) + eps)
    if norm is not None:
        rows = rows * norm.weight + (0 if norm.bias is None else norm.bias)
    return dataclasses.replace(table, weight=rows)


@dataclass(frozen=True)
class Stream:
    """A closed stream seam: the stream x is now the readers' `kept` columns, x R + b_R the `others` (both ascending).

    writers: the maps that write x. rest: R (d, r) with b_R. duals: read through the transposed first writer.
    followers: further readers, in the new basis. bias_shares: what part of each writer's bias is in x.
    """

    writers: dict[str, Affine]
    rest: Affine
    duals: dict[str, Affine]
    followers: dict[str, Affine]
    kept: Int[Tensor, "d"]
    others: Int[Tensor, "r"]
    bias_shares: dict[str, float]


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
    rest: Affine | None = None,
    within: torch.dtype = torch.float64,
) -> Stream:
    """O* = O S, R = S^-1 A_r (Fig. 2b), with biases and tied tables. affines: every module of seam.modules.

    rest: R, if it has been solved for; within: the precision of O S.
    """
    rest = close_rest(seam, affines, basis) if rest is None else rest
    readers = [affines[name] for name in seam.readers]
    kept, bias = basis.columns, _bias(readers)
    chosen = join([reader.weight for reader in readers]).T[kept].T
    chosen_bias = None if bias is None else bias[kept]
    writers = {}
    for name in seam.writers:
        writer = affines[name]
        bias = None if writer.bias is None else read(writer.bias, chosen)
        moved = dataclasses.replace(writer, weight=product(writer.weight, chosen, within, within), bias=bias)
        writers[name] = moved.with_bias(chosen_bias) if name in seam.bias_takers else moved
    duals = {}
    for name in seam.duals:
        dual = affines[name]
        bias = None if dual.bias is None else basis.solve(dual.bias[:, None])[:, 0]
        duals[name] = dataclasses.replace(dual, weight=basis.solve(dual.weight.T).T, bias=bias)
    followers = {}
    for name in seam.followers:
        weight = basis.solve(affines[name].weight)
        moved = dataclasses.replace(affines[name], weight=weight)
        followers[name] = moved.with_bias(None if chosen_bias is None else -read(chosen_bias, weight))
    shares = {name: seam.bias_share(name) for name in writers}
    return Stream(writers, rest, duals, followers, kept, _others(readers, basis), shares)


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
    return {**stream.writers, **rest, **stream.duals, **stream.followers}


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

"""Rows of what writes a space become the identity: of P where others write with it, or of each head of V.

With T the rows of a writer that go (of V, of each head its own):

    the writer's other rows   W_r -> W_r T^-1
    readers                   A -> T A
    other writers             W -> W T^-1, b -> b T^-1
    a bias of V               goes on to the readers
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from skipless.algebra.affine import Affine, past_norm, read
from skipless.algebra.basis import MAX_CONDITION, MAX_CONDITION_PIVOTED, Basis, pivot
from skipless.algebra.forecast import Forecast, Way, letter, precision_of, relative
from skipless.algebra.linalg import max_abs
from skipless.algebra.tolerances import coarsest, dtype_name
from skipless.architecture.seams import Seam
from skipless.checkpoint.opening import Read
from skipless.errors import InputError
from skipless.removals.setting import Closed, Setting, Step, whole


def close(seam: Seam, affines: dict[str, Affine], setting: Setting, read: Read) -> Closed:
    """Make rows of P, or of each head of V, the identity."""
    weight, mix = affines[seam.writers[0]].weight.double(), None
    if seam.kind == "values":
        mix = _mix(seam, read, weight.new_ones(setting.architecture.num_attention_heads))
    bases = choose_rows(seam, weight)
    stored = {name: setting.kept(name) for name in seam.readers}
    remaining, order = close_rows(seam, affines, bases, mix, stored)
    dtypes = [setting.stored(name) for name in remaining if name not in setting.later]
    name = dtype_name(coarsest(dtypes or [torch.float64]))
    outcome = passed_rows(seam, affines, remaining, bases, [name]).outcome("rows", name)
    return remaining, (order if seam.kind == "values" else order[0]).to(torch.int32), outcome


def _mix(seam: Seam, read: Read, ones: torch.Tensor) -> torch.Tensor:
    """By what each query head's share of a bias of V is multiplied before it is read: alpha + beta - gamma where the
    attention is shaped, and the branch's gain where the heads are scaled by it.
    """
    gains = {name: read(name).to(ones.dtype) for name in seam.mixed}
    shaping = [-gain if name.endswith(".gamma") else gain for name, gain in gains.items() if ".self_attn." in name]
    mix = sum(shaping, 0 * ones) if shaping else ones
    for name, gain in gains.items():
        if ".self_attn." not in name:
            mix = mix * gain
    return mix


def choose_rows(seam: Seam, weight: Float[Tensor, "n b"]) -> list[Basis]:
    """The rows of a writer that become the identity, for each block of seam.width columns.

    Raises InputError when those of a block are not independent, or, where other writers take in T^-1, nearly not.
    """
    limit = MAX_CONDITION_PIVOTED if len(seam.writers) == 1 else MAX_CONDITION
    bases = []
    for number, block in enumerate(weight.split(seam.width, 1)):
        basis = Basis.of_columns(block.T, pivot(block.T), limit)
        if not basis.usable:
            raise InputError(
                f"{seam.writers[0]}.weight: expected {seam.width} linearly independent inputs"
                f"{f' of head {number}' if seam.blocks > 1 else ''} (condition number at most {limit:.1e}), found "
                f"{basis.condition:.1e}; leave {seam.kind} out of --remove"
            )
        bases.append(basis)
    return bases


def close_rows(
    seam: Seam,
    affines: Mapping[str, Affine],
    bases: Sequence[Basis],
    mix: Float[Tensor, "heads"] | None = None,
    stored: Mapping[str, torch.dtype] | None = None,
) -> tuple[dict[str, Affine], Int[Tensor, "blocks n"]]:
    """Make rows of the first writer the identity, those of each block of its columns for itself.

    bases: of each block's transposed columns (width, n), the rows T that go. mix: by what a bias of V is multiplied on
    its way through each query head (1, or alpha + beta - gamma), if it is to move on to the readers. stored: in what
    each reader will be rounded (fp64). Returns the modules that remain, and for each block the order of inputs: those
    passed through, then those of the weight's rows.

    A bias b of V becomes b T^-1 times the reader as it is stored: values whose mean is zero, b included, lose only what
    they differ by from it, and not what rounding does to a large -b T^-1, which the readers now get in its place.
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
    offset = None
    if mix is not None and first.bias is not None:  # of each query head's value, on its way to the readers
        parts = zip(bases, first.bias.split(size), mix.split(len(mix) // seam.blocks), strict=True)
        offset = torch.cat([torch.outer(of, basis.solve(bias[:, None])[:, 0]) for basis, bias, of in parts]).flatten()
    for name, reader in past_norm(seam, affines).items():
        rows = reader.weight.double().unflatten(0, (seam.blocks, -1, size))
        weight = torch.einsum("brs,bgsf->bgrf", chosen, rows).flatten(0, 2)
        carried = None
        if offset is not None:
            carried = read(offset, weight if stored is None else weight.to(stored[name]).double())
        remaining[name] = dataclasses.replace(reader, weight=weight).with_bias(carried)
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


def forecast(
    seam: Seam,
    affines: Mapping[str, Affine],
    dtypes: Sequence[str],
    ways: Iterable[str] | None = None,
    rest_dtype: str | None = None,
) -> Forecast:
    """What passing rows through will cost in each dtype."""
    try:
        bases = choose_rows(seam, affines[seam.writers[0]].weight)
    except InputError:
        return _impossible(seam, dtypes)
    bare = {name: dataclasses.replace(affine, bias=None) for name, affine in affines.items()}  # weights count
    return passed_rows(seam, affines, close_rows(seam, bare, bases)[0], bases, dtypes)


def passed_rows(
    seam: Seam,
    affines: Mapping[str, Affine],
    remaining: Mapping[str, Affine],
    bases: Sequence[Basis],
    dtypes: Sequence[str],
) -> Forecast:
    """The errors of x W A, for white x, when writers W and readers A are rounded, and when, of those that remain, only
    the rows that are not passed through are.
    """
    squares, powers = {}, {}
    names: dict[str, list[str]] = {}
    for name in seam.readers:
        names.setdefault(letter(name), []).append(name)

    def heads(writer: Tensor) -> Tensor:
        return writer.double().unflatten(1, (seam.blocks, seam.width)).transpose(0, 1)

    def rows(found: Mapping[str, Affine], of: Sequence[str]) -> Tensor:
        weight = torch.cat([found[name].weight for name in of], 1).double()
        return weight.unflatten(0, (seam.blocks, -1, seam.width)).transpose(1, 2).flatten(2)

    unclosed = past_norm(seam, affines)
    before = [heads(affines[name].weight) for name in seam.writers]
    after = [heads(remaining[name].weight) for name in seam.writers if name in remaining]
    for name, readers in names.items():
        read = rows(unclosed, readers)
        inner = read @ read.mT
        powers[name] = sum(((writer.mT @ writer) * inner).sum().item() for writer in before)
        squares[name] = (read, rows(remaining, readers))

    def lost(writers: Sequence[Tensor], read: Tensor, passed: float, floor: float) -> float:
        p = sum((writer.square().sum(1) for writer in writers), torch.zeros_like(read[..., 0]))
        m = read.square().sum(2)
        inputs = sum(writer.shape[1] for writer in writers)
        return ((p + floor * inputs) * m + (p + passed) * (m + floor * read.shape[2])).sum().item()

    largest = max(max_abs(affine.weight) for affine in remaining.values())
    original, errors = {}, {}
    for dtype in dtypes:
        unit, floor = precision_of(dtype)
        fits = largest <= torch.finfo(getattr(torch, dtype)).max
        original[dtype] = {
            name: unit * relative(lost(before, read, 0.0, 0.0), powers[name]) for name, (read, _) in squares.items()
        }
        errors[dtype] = {
            name: unit * relative(lost(after, read, 1.0, floor) if fits else math.inf, powers[name])
            for name, (_, read) in squares.items()
        }
    return Forecast(seam, original, {"rows": Way(max(basis.condition for basis in bases), None, errors)})


def _impossible(seam: Seam, dtypes: Sequence[str]) -> Forecast:
    """A seam whose only way cannot be gone."""
    names = dict.fromkeys(letter(name) for name in seam.readers)
    infinite = {dtype: dict.fromkeys(names, math.inf) for dtype in dtypes}
    nothing = {dtype: dict.fromkeys(names, 0.0) for dtype in dtypes}
    return Forecast(seam, nothing, {way: Way(math.inf, math.inf, infinite) for way in seam.identities})


def steps(seam: Seam, setting: Setting) -> Iterator[Step]:
    """Those of close_rows, block by block of the writer's columns, in fp64."""
    width, blocks = seam.width, seam.blocks
    rows = setting.size(seam.writers[0]) / (width * blocks)
    yield "choose rows", torch.float64, blocks * (width**2 * (rows - width / 3) + width**2 * (rows - width))
    yield "factorize T", torch.float64, blocks * 2 / 3 * width**3
    yield "W T^-1", torch.float64, blocks * 2.0 * width**2 * (rows - width)
    yield "other writers", torch.float64, sum(2.0 * width * setting.size(name) for name in seam.writers[1:])
    yield "T A", torch.float64, sum(2.0 * width * setting.size(name) for name in seam.readers)


memory = whole

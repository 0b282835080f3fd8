"""Rows of what writes a space become the identity: of P where others write with it, or of each head of V, or K.

With T the rows of a writer that go (of V, of each head its own):

    the writer's other rows   U -> R = U T^-1
    readers                   A -> T A
    other writers             W -> W T^-1, b -> b T^-1
    a bias of V               goes on to the readers
    a bias of K               goes: it adds the same to all of a query's scores

So x [T; U] A = x [I; R] (T A). Letters are those of docs/half-precision.md: R is the rest, here of rows.
Of K, the reader A is Q transposed, with its bias as one more column: scores are (x [T; U]) (A (y, 1)^T). Where RoPE
rotates a part of each head, the first columns, these stay as they are, and the others are K and Q here.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from skipless.algebra.affine import Affine, past_norm, read
from skipless.algebra.basis import MAX_CONDITION, MAX_CONDITION_PIVOTED, Basis, pivot
from skipless.algebra.forecast import Forecast, Way, letter, precision_of, relative
from skipless.algebra.linalg import HALF, gram, squares
from skipless.algebra.rounding import passed_moment, round_passed, round_reader
from skipless.algebra.tolerances import coarsest, dtype_name
from skipless.architecture.seams import Seam
from skipless.checkpoint.opening import Read
from skipless.errors import InputError
from skipless.model.modeling_skipless import exchanged
from skipless.removals.setting import Closed, Setting, Step, whole


def close(seam: Seam, affines: dict[str, Affine], setting: Setting, read: Read) -> Closed:
    """Make rows of P, or of each head of V or K, the identity, and round what remains with the least error."""
    given, affines = affines, turned(seam, affines)
    weight, mix = affines[seam.writers[0]].weight.double(), None
    if seam.kind == "values":
        mix = _mix(seam, read, weight.new_ones(setting.architecture.num_attention_heads))
    bases = choose_rows(seam, weight)
    remaining, order = close_rows(seam, affines, bases, biased=seam.kind == "p")
    dtypes = {name: setting.kept(name) for name in remaining}
    written = [dtypes[name] for name in remaining if name not in setting.later]
    name = dtype_name(coarsest(written or [torch.float64]))
    carried = None if mix is None else Carried.of(seam, affines, bases, mix)
    stored = round_remaining(seam, affines, remaining, order, dtypes, carried)
    condition = max(basis.condition for basis in bases)
    errors = measure(seam, affines, remaining, stored, order, dtypes)
    outcome = _forecast(seam, affines, condition, {name: errors}).outcome("rows", name)
    stored = turned_back(seam, stored, given)
    return stored, (order[0] if seam.kind == "p" else order[:, : seam.width]).to(torch.int32), outcome


def turned(seam: Seam, affines: Mapping[str, Affine]) -> dict[str, Affine]:
    """Of a seam between K and Q, what is not rotated of both, Q transposed, its bias as one more column; of others, all
    as it is.
    """
    modules = dict(affines)
    for name in seam.writers if seam.kind == "queries" else ():
        (_, weight), bias = _parts(seam, affines, affines[name].weight), None
        modules[name] = dataclasses.replace(affines[name], weight=weight.flatten(-2), bias=bias)
    for name in seam.readers if seam.kind == "queries" else ():
        (_, weight) = _parts(seam, affines, _with_bias(affines[name]))
        modules[name] = Affine(weight.flatten(-2).T)
    return modules


def turned_back(seam: Seam, modules: Mapping[str, Affine], affines: Mapping[str, Affine]) -> dict[str, Affine]:
    """The same, back again, with what is rotated. affines: as they were before."""
    back = dict(modules)
    for name in seam.readers if seam.kind == "queries" else ():
        inputs = len(affines[name].weight)
        rotated, _ = _parts(seam, affines, _with_bias(affines[name]))
        weight = torch.cat([rotated, modules[name].weight.T.unflatten(-1, (-1, seam.width))], -1).flatten(-2)
        back[name] = Affine(weight[:inputs], weight[inputs] if len(weight) > inputs else None)
    if seam.kept:
        keys = affines[seam.writers[0]]
        bias = None if keys.bias is None else _parts(seam, affines, keys.bias)[0].flatten()
        back[seam.kept] = Affine(_parts(seam, affines, keys.weight)[0].flatten(-2), bias)
    return back


def _with_bias(module: Affine) -> Float[Tensor, "n m"]:
    """W, with its bias as one more row."""
    weight, bias = module.weight.double(), module.bias
    return weight if bias is None else torch.cat([weight, bias.double()[None]])


def _parts(
    seam: Seam, affines: Mapping[str, Affine], columns: Float[Tensor, "... heads_h"]
) -> tuple[Float[Tensor, "... heads r"], Float[Tensor, "... heads u"]]:
    """Columns of K or Q, head by head: those that RoPE rotates, and the others."""
    size = affines[seam.writers[0]].weight.shape[1] // seam.blocks
    rotated, others = columns.unflatten(-1, (-1, size)).split((size - seam.width, seam.width), -1)
    return rotated, others


def _mix(seam: Seam, read: Read, ones: torch.Tensor) -> torch.Tensor:
    """What multiplies each query head's share of a bias of V before it is read.

    It is alpha + beta - gamma where the attention is shaped, and the branch's gain where it scales the heads.
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
        basis = Basis.of_columns(block.T, exchanging(pivot(block.T)), limit)
        if not basis.usable:
            raise InputError(
                f"{seam.writers[0]}.weight: expected {seam.width} linearly independent inputs"
                f"{f' of head {number}' if seam.blocks > 1 else ''} (condition number at most {limit:.1e}), found "
                f"{basis.condition:.1e}; leave {seam.kind} out of --remove"
            )
        bases.append(basis)
    return bases


def exchanging(rows: Int[Tensor, "width"]) -> Int[Tensor, "width"]:
    """The same rows, in an order that says as well where the others go (modeling_skipless.exchanged).

    Row i of these changes places with input i of all. Those below the width are at their own place.
    """
    order = torch.arange(len(rows), device=rows.device)
    beyond, here = rows[rows >= len(rows)].sort().values, torch.zeros_like(rows, dtype=torch.bool)
    here[rows[rows < len(rows)]] = True
    order[~here] = beyond
    return order


def close_rows(
    seam: Seam,
    affines: Mapping[str, Affine],
    bases: Sequence[Basis],
    biased: bool = False,
) -> tuple[dict[str, Affine], Int[Tensor, "blocks n"]]:
    """Make rows of the first writer the identity, those of each block of its columns for itself.

    bases: for each block of columns (n, width), the rows T that go. biased: whether the writers keep the first one's
    bias (else see Carried). Returns the modules that remain, and each block's order of inputs: first those
    passed through, then those of R's rows.
    """
    first = affines[seam.writers[0]]
    first = dataclasses.replace(first, weight=first.weight.double())
    size, remaining, orders, rests, passed = seam.width, {}, [], [], []
    for block, basis in zip(first.weight.split(size, 1), bases, strict=True):
        orders.append(exchanged(basis.columns[None], len(block))[0])
        rests.append(basis.solve(block[orders[-1][size:]].T).T)  # R = U T^-1
        passed.append(block[basis.columns])  # T
    chosen = torch.stack(passed)
    for name, reader in past_norm(seam, affines).items():
        rows = reader.weight.double().unflatten(0, (seam.blocks, -1, size))
        weight = torch.einsum("brs,bgsf->bgrf", chosen, rows).flatten(0, 2)  # T A, in each block
        remaining[name] = dataclasses.replace(reader, weight=weight)
    (basis, *_) = bases
    own = None if first.bias is None or not biased else basis.solve(first.bias[:, None])[:, 0]
    for name in seam.writers[1:]:
        writer = affines[name]
        bias = None if writer.bias is None else basis.solve(writer.bias[:, None])[:, 0]
        moved = dataclasses.replace(writer, weight=basis.solve(writer.weight.T).T, bias=bias)
        taken = None if own is None else own * (first.scale / moved.scale)
        remaining[name] = moved.with_bias(taken) if name in seam.bias_takers else moved
    if orders[0].numel() > size:
        stays = own if not seam.bias_takers else None
        remaining[seam.writers[0]] = Affine(torch.cat(rests, 1), stays)
    return remaining, torch.stack(orders)


@dataclass(frozen=True)
class Carried:
    """V's bias b, which moves on to what reads the values.

    values: b T^-1, as each query head reads it. shares: by block, what a value is multiplied by on its way through each
    of its query heads.
    """

    values: Float[Tensor, "heads_s"]
    shares: Sequence[Float[Tensor, "groups"]]

    @classmethod
    def of(
        cls, seam: Seam, affines: Mapping[str, Affine], bases: Sequence[Basis], mix: Float[Tensor, "heads"]
    ) -> "Carried | None":
        """That of a seam's values; None without a bias. mix: as from _mix."""
        bias = affines[seam.writers[0]].bias
        if bias is None:
            return None
        shares = mix.split(len(mix) // seam.blocks)
        parts = zip(bases, bias.split(seam.width), strict=True)
        return cls(of_heads((basis.solve(part[:, None])[:, 0] for basis, part in parts), shares), shares)


def of_heads(
    values: Iterable[Float[Tensor, "s"]], shares: Iterable[Float[Tensor, "groups"]]
) -> Float[Tensor, "heads_s"]:
    """What all query heads read of a value of each block."""
    return torch.cat([torch.outer(share, value) for share, value in zip(shares, values, strict=True)]).flatten()


def with_carried(
    seam: Seam,
    affines: Mapping[str, Affine],
    remaining: Mapping[str, Affine],
    stored: Mapping[str, Affine],
    order: Int[Tensor, "blocks n"],
    carried: Carried | None,
) -> dict[str, Affine]:
    """The readers, with the bias b of V that moves on to them, and with what makes up for a change of the values' mean.

    A reader A gets the bias b T^-1 A', with A' as it is stored. It now reads values less b, so what rounding A does to
    -b T^-1, which may be large, cancels. Where the mean of x is known, what rounding does to that is made up for
    instead, exactly. remaining, stored: all that remains, exactly and as it is.
    """
    readers = {name: stored[name] for name in seam.readers}
    if carried is None:
        return readers
    offset, mean = carried.values, affines[seam.writers[0]].mean
    if mean is None:
        return {name: reader.with_bias(read(offset, reader.weight)) for name, reader in readers.items()}
    exact, found = (
        of_heads(
            (
                mean[own[: seam.width]] + mean[own[seam.width :]] @ block.rest.double()
                for own, block in zip(order, _blocks(seam, affines, each, order), strict=True)
            ),
            carried.shares,
        )
        for each in (remaining, stored)
    )
    for name, reader in readers.items():
        bias = read(exact + offset, remaining[name].weight) - read(found, reader.weight)
        readers[name] = dataclasses.replace(reader.with_bias(bias), mean=found)
    return readers


@dataclass(frozen=True)
class _Block:
    """One block's x [I; R] A.

    rest: R, the rows that remain of the first writer and those of the others. moment: E[x^T x], with what is passed
    first, or None for the identity. readers: A^T of each.
    """

    rest: Float[Tensor, "l s"]
    moment: Float[Tensor, "n n"] | None
    readers: dict[str, Float[Tensor, "_ s"]]


def _blocks(
    seam: Seam, affines: Mapping[str, Affine], remaining: Mapping[str, Affine], order: Int[Tensor, "blocks n"]
) -> Iterator[_Block]:
    """The blocks of what remains. affines: as before closing; their writers know the moments of their inputs."""
    readers = {
        name: remaining[name].weight.unflatten(0, (seam.blocks, -1, seam.width)).mT.flatten(1, 2)
        for name in seam.readers
    }
    writers = [affines[name] for name in seam.writers]
    moment = None
    if any(writer.moment is not None for writer in writers):
        moment = torch.block_diag(*(_moment(writer) for writer in writers))
    inputs = torch.arange(order.shape[1], sum(len(writer.weight) for writer in writers), device=order.device)
    for number, own in enumerate(order):
        columns = slice(number * seam.width, (number + 1) * seam.width)
        rests = [remaining[name].weight[:, columns] for name in seam.writers if name in remaining]
        places = torch.cat([own, inputs])
        yield _Block(
            rest=torch.cat(rests) if rests else own.new_zeros(0, seam.width, dtype=torch.float64),
            moment=None if moment is None else moment[places][:, places],
            readers={name: reader[number] for name, reader in readers.items()},
        )


def _moment(writer: Affine) -> Float[Tensor, "n n"]:
    """E[x^T x] of a writer's inputs."""
    if writer.moment is None:
        return torch.eye(len(writer.weight), dtype=torch.float64, device=writer.weight.device)
    return torch.block_diag(*writer.moment)


def round_remaining(
    seam: Seam,
    affines: Mapping[str, Affine],
    remaining: Mapping[str, Affine],
    order: Int[Tensor, "blocks n"],
    dtypes: Mapping[str, torch.dtype],
    carried: Carried | None = None,
) -> dict[str, Affine]:
    """What remains, rounded with feedback where it is stored in half precision; what reads it knows its moment."""
    half = any(dtype in HALF for dtype in dtypes.values())
    writers = [name for name in seam.writers if name in remaining]
    written = {dtypes[name] for name in writers}
    (dtype,) = written if len(written) == 1 else (torch.float64,)  # of several, each is cast by itself
    rests: list[Tensor] = []
    moments: list[Tensor] = []
    solved: dict[str, list[Tensor]] = {name: [] for name in seam.readers}
    for block in _blocks(seam, affines, remaining, order):
        if not half:
            moments.append(passed_moment(block.rest, block.moment))
            continue
        rest, reads, moment = round_passed(block.rest, list(block.readers.values()), block.moment, dtype)
        rests.append(rest)
        moments.append(moment)
        for name, reader in zip(block.readers, reads, strict=True):
            solved[name].append(reader)
    groups = len(remaining[seam.readers[0]].weight) // (seam.blocks * seam.width)
    moment = torch.stack(moments).repeat_interleave(groups, 0)
    stored = {**remaining, **{name: dataclasses.replace(remaining[name], moment=moment) for name in seam.readers}}
    if half:
        sizes = [len(remaining[name].weight) for name in writers]
        for name, weight in zip(writers, torch.cat(rests, 1).split(sizes), strict=True):
            stored[name] = dataclasses.replace(stored[name], weight=weight)
        for name, parts in solved.items():
            weight = torch.stack(parts).unflatten(1, (groups, -1)).mT.flatten(0, 2)
            stored[name] = dataclasses.replace(stored[name], weight=weight)
    for name, affine in with_carried(seam, affines, remaining, stored, order, carried).items() if half else ():
        weight = round_reader(affine.weight.T, moment, dtypes[name], affine.mean, affine.bias).T
        stored[name] = dataclasses.replace(stored[name], weight=weight)
    for name in seam.readers:
        stored[name] = dataclasses.replace(stored[name], weight=stored[name].weight.to(dtypes[name]))
    return {**stored, **with_carried(seam, affines, remaining, stored, order, carried)}


def forecast(
    seam: Seam,
    affines: Mapping[str, Affine],
    dtypes: Sequence[str],
    ways: Iterable[str] | None = None,
    rest_dtype: str | None = None,
    later: frozenset[str] = frozenset(),
) -> Forecast:
    """What passing rows through will cost in each dtype: it is done, and measured."""
    affines = turned(seam, affines)
    try:
        bases = choose_rows(seam, affines[seam.writers[0]].weight)
    except InputError:
        return _impossible(seam, dtypes)
    remaining, order = close_rows(seam, affines, bases, biased=seam.kind == "p")
    carried = None
    if seam.kind == "values":  # of attention that is not shaped
        heads = len(remaining[seam.readers[0]].weight) // seam.width
        carried = Carried.of(seam, affines, bases, order.new_ones(heads, dtype=torch.float64))
    errors = {}
    for dtype in dtypes:
        kept = {name: torch.float64 if name in later else getattr(torch, dtype) for name in remaining}
        stored = round_remaining(seam, affines, remaining, order, kept, carried)
        errors[dtype] = measure(seam, affines, remaining, stored, order, kept)
    left = {name: dataclasses.replace(stored[name], weight=remaining[name].weight) for name in later if name in stored}
    return _forecast(seam, affines, max(basis.condition for basis in bases), errors, left)


def measure(
    seam: Seam,
    affines: Mapping[str, Affine],
    remaining: Mapping[str, Affine],
    stored: Mapping[str, Affine],
    order: Int[Tensor, "blocks n"],
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, float]:
    """By letter of the readers A: the relative error of x [I; R] A, biases of A included, as it is stored.

    remaining: what it would be exactly. With y = x [I; R], y' A' - y A = (y' - y) A' + y (A' - A).
    """
    cast = {
        name: dataclasses.replace(affine, weight=affine.weight.to(dtypes[name]).double())
        for name, affine in stored.items()
    }
    if not all(affine.weight.isfinite().all() for affine in cast.values()):
        return {letter(name): math.inf for name in seam.readers}
    lost: dict[str, float] = {}
    powers: dict[str, float] = {}
    pairs = zip(_blocks(seam, affines, remaining, order), _blocks(seam, affines, cast, order), strict=True)
    for exact, rounded in pairs:
        size, change = seam.width, rounded.rest - exact.rest  # R' - R
        if exact.moment is None:
            mixed, own = change.T @ exact.rest, change.T @ change  # E[(y' - y)^T y], E[(y' - y)^T (y' - y)]
        else:
            beside = exact.moment[size:, size:] @ change
            mixed, own = (exact.moment[:size, size:] @ change).T + beside.T @ exact.rest, change.T @ beside
        read = passed_moment(exact.rest, exact.moment)  # E[y^T y]
        for name, before in exact.readers.items():
            what, after = letter(name), rounded.readers[name]
            gone = after - before
            square = (own * gram(after) + 2 * mixed * (after.T @ gone) + read * gram(gone)).sum().item()
            lost[what] = lost.get(what, 0.0) + square
            powers[what] = powers.get(what, 0.0) + (read * gram(before)).sum().item()
    for name in seam.readers:
        if (bias := stored[name].bias) is not None:
            lost[letter(name)] += (bias.to(dtypes[name]).double() - bias).square().sum().item()
    return {name: relative(max(square, 0.0), powers[name]) for name, square in lost.items()}


def _forecast(
    seam: Seam,
    affines: Mapping[str, Affine],
    condition: float,
    errors: Mapping[str, Mapping[str, float]],
    left: Mapping[str, Affine] | None = None,
) -> Forecast:
    """These errors, beside those of x W A when writers W and readers A are rounded as they are.

    Where x is not white, an earlier seam has made W, which is then taken to lose as much as the readers do.
    """
    lost: dict[str, float] = {}
    powers: dict[str, float] = {}
    writers = [affines[name] for name in seam.writers]
    moment = None
    if any(writer.moment is not None for writer in writers):
        moment = torch.block_diag(*(_moment(writer) for writer in writers))
    weight = torch.cat([writer.weight.double() for writer in writers])
    for name, reader in past_norm(seam, affines).items():
        what, inner = letter(name), reader.weight.double().unflatten(0, (seam.blocks, -1, seam.width))
        for block, own in zip(weight.split(seam.width, 1), inner, strict=True):
            columns = own.mT.flatten(0, 1)
            written = gram(block) if moment is None else block.T @ moment @ block
            lost[what] = lost.get(what, 0.0) + 2 * (written.diagonal() @ squares(columns, 0)).item()
            powers[what] = powers.get(what, 0.0) + (written * gram(columns)).sum().item()
    original = {
        dtype: {name: precision_of(dtype)[0] * relative(square, powers[name]) for name, square in lost.items()}
        for dtype in errors
    }
    return Forecast(seam, original, {"rows": Way(condition, None, errors)}, {"rows": left or {}})


def _impossible(seam: Seam, dtypes: Sequence[str]) -> Forecast:
    """The forecast of a seam that cannot be closed: its only way has no invertible rows."""
    names = dict.fromkeys(letter(name) for name in seam.readers)
    infinite = {dtype: dict.fromkeys(names, math.inf) for dtype in dtypes}
    nothing = {dtype: dict.fromkeys(names, 0.0) for dtype in dtypes}
    return Forecast(seam, nothing, {way: Way(math.inf, math.inf, infinite) for way in seam.identities})


def steps(seam: Seam, setting: Setting) -> Iterator[Step]:
    """Those of close_rows, round_remaining and measure, block by block of the writer's columns, in fp64."""
    width, blocks = seam.width, seam.blocks
    first = setting.modules[seam.writers[0]]
    others = sum(setting.size(name) for name in seam.writers[1:])
    read = sum(setting.size(name) for name in seam.readers) * width * blocks / first.outputs
    rows = first.inputs
    left = rows + others / (width * blocks) - width
    yield "choose rows", torch.float64, blocks * (width**2 * (rows - width / 3) + width**2 * (rows - width))
    yield "factorize T", torch.float64, blocks * 2 / 3 * width**3
    yield "W T^-1", torch.float64, blocks * 2.0 * width**2 * (rows - width)
    yield "other writers", torch.float64, 2.0 * width * others
    yield "T A", torch.float64, 2.0 * width * read
    stored = [name for name in (*seam.writers, *seam.readers) if f"{name}.weight" in setting.outputs]
    half = any(setting.kept(name) in HALF for name in stored)
    known = not setting.earlier.isdisjoint(seam.writers)
    yield "moments", torch.float64, blocks * width * left * ((8.0 if half else 4.0) * left if known else 2.0 * width)
    if half:
        yield "A A^T", torch.float64, float(width * read)
        if known:
            yield "factorize the moment", torch.float64, blocks * left**3 / 3
        yield "round W", torch.float32, blocks * width * left * ((left if known else 0.0) + width)
        yield "A + A change", torch.float64, 2.0 * width * read
        yield "round A", torch.float32, float(width * read)
    yield "measure", torch.float64, 5.0 * width * read


def memory(seam: Seam, setting: Setting) -> float:
    """All that is read and made; where inputs are not white, their moment as a whole, a block's, and its factors."""
    if setting.earlier.isdisjoint(seam.writers):
        return whole(seam, setting) + sum(16.0 * setting.size(name) for name in seam.readers)
    rows = sum(setting.modules[name].inputs for name in seam.writers)
    return whole(seam, setting) + sum(16.0 * setting.size(name) for name in seam.readers) + 48.0 * rows**2

"""Columns of what reads a space become the identity: Q, K or V, d columns of all three, or d columns of the head.

The exact algebra is algebra/stream.py, its rounding algebra/rounding.py. Here, on one page: which columns, closing and
rounding, what that has cost or will cost, and its FLOPs and memory, all by the same steps.
n, d, m, r: the rows of the writers, their width, the columns of the readers, and those that are left of them.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from skipless.algebra.affine import Affine
from skipless.algebra.basis import Basis, candidate, join
from skipless.algebra.forecast import PROBES, Forecast, Way, letter, mean_square, precision_of, reach, relative
from skipless.algebra.linalg import (
    HALF,
    ROWS,
    block_rows,
    max_abs,
    multiply,
    product,
    slices,
    squares,
)
from skipless.algebra.rounding import (
    COLUMNS,
    Rest,
    mean_row,
    mean_squares,
    moment,
    noise_weights,
    round_stream,
)
from skipless.algebra.rows import Matrix, Rows
from skipless.algebra.stream import Stream, close_stream, column_order
from skipless.algebra.tolerances import coarsest, dtype_name
from skipless.architecture.seams import Seam
from skipless.checkpoint.opening import Read
from skipless.checkpoint.reader import TensorInfo
from skipless.errors import BugError, InputError
from skipless.removals.setting import Closed, Setting, Step

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


# How many matrices in fp64 of S's size, and of R's, a forecast holds at most, as benchmarks/memory.py measures it.
SQUARES, RESTS = 16, 6
# While the scaled |R| of all that reads the stream stays below this, O* = O S may be off by fp32's 1e-7 where it is
# stored in half precision.
LARGEST_REST = 1e3
# By how much closing a seam may change what is read, by the precision of O* = O S: a few times what MAX_CONDITION and
# LARGEST_REST leave.
EXACT = {torch.float64: 1e-8, torch.float32: 1e-3}


def choose(
    seam: Seam,
    way: str,
    readers: Mapping[str, Float[Tensor, "d _"]],
    weights: Float[Tensor, "m"],
    dtype: torch.dtype = torch.float64,
) -> Basis:
    """The basis that closes a stream seam by `way`, one of seam.identities.

    readers: the weights of seam.readers, in that order; weights: what a squared error counts in each of their columns;
    dtype: in what pivoted columns are looked for.
    Raises InputError when it is singular or nearly so, with its condition number and the alternatives that would work.
    """
    basis = candidate(seam, way, readers, weights, dtype)
    if basis.usable:
        return basis
    others = {name: candidate(seam, name, readers, weights) for name in seam.identities if name != way}
    alternatives = [
        *(f"--basis {name} (condition number {other.condition:.1e})" for name, other in others.items() if other.usable),
        f"leave this seam open with --layers-open {seam.layer}"
        if seam.kind == "stream"
        else f"leave {seam.kind} out of --remove",
    ]
    gone = seam.identities[way]
    what = (
        f"{gone[0]}.weight: expected an invertible matrix"
        if gone != seam.readers
        else (f"{', '.join(gone)}: expected {seam.width} linearly independent outputs")
    )
    raise InputError(
        f"{what} (condition number at most {basis.limit:.1e}), found {basis.condition:.1e}; "
        f"use {' or '.join(alternatives)}"
    )


def close(seam: Seam, affines: dict[str, Affine], setting: Setting, read: Read) -> Closed:
    """Close a stream or head seam by the plan's basis, and round what comes out with the least error."""
    way = seam.way(setting.basis)
    dtypes = stored_dtypes(seam, setting)
    name = dtype_name(coarsest(dtypes.values()))
    opened = OpenStream(seam, affines)
    quick = all(dtype in HALF for dtype in dtypes.values())
    basis = choose(seam, way, opened.readers, opened.weights, torch.float32 if quick else torch.float64)
    stream = opened.close(basis, dtypes)
    opened.release()
    opened.check(way, basis, stream)
    for writer in seam.writers:
        del affines[writer]
    condition = basis.condition
    del basis
    if getattr(torch, name) in HALF:
        stream = round_stream(stream, opened.weights, opened.extra_weights, dtypes)
    stream = handed_on(stream, setting.later)
    outcome = opened.measure(way, condition, stream, dtypes, name).outcome(way, name)
    widths = {name: weight.shape[1] for name, weight in opened.readers.items()}
    return modules(seam, way, stream, widths), column_order(stream), outcome


def handed_on(stream: Stream, later: frozenset[str]) -> Stream:
    """The stream; the followers that a later seam closes again now know the moment and mean of what they read."""
    followers = dict(stream.followers)
    for name in later & followers.keys():
        writers = {each: stream.writers[each] for each in list(stream.writers)[: stream.seen.get(name)]}
        weights = [writer.scaled for writer in writers.values()]
        read = moment(weights, F32 if all(weight.dtype in HALF for weight in weights) else F64).double()
        read, mean = of_white_inputs(list(writers.values()), read)
        for each, writer in writers.items():
            mean = mean if writer.bias is None else mean + stream.bias_shares[each] * writer.scale * writer.bias
        followers[name] = dataclasses.replace(followers[name], moment=read[None], mean=mean)
    return dataclasses.replace(stream, followers=followers)


def of_white_inputs(
    writers: Sequence[Affine], read: Float[Tensor, "d d"]
) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d"]]:
    """Covariance and mean, biases aside, of what these write with white inputs; of tables, of any row of each.

    read: G, the moment of the sum of any row of each (rounding.moment).
    """
    if not writers[0].table:
        return len(writers[0].weight) * read, read.new_zeros(len(read))
    mean = torch.stack([mean_row(writer.weight) for writer in writers]).sum(0)
    return read - torch.outer(mean, mean), mean


def stored_dtypes(seam: Seam, setting: Setting) -> dict[str, torch.dtype]:
    """The dtypes of writers, duals, followers and, as "rest", of the readers (the finest of theirs)."""
    dtypes = {name: setting.kept(name) for name in (*seam.writers, *seam.duals, *seam.followers)}
    rest = [setting.stored(name) for name in (*seam.readers, seam.rest) if f"{name}.weight" in setting.outputs]
    return {**dtypes, "rest": min(rest, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)}


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


def forecast(
    seam: Seam,
    affines: Mapping[str, Affine],
    dtypes: Sequence[str],
    ways: Iterable[str] | None = None,
    rest_dtype: str | None = None,
    later: frozenset[str] = frozenset(),
) -> Forecast:
    """What closing a seam by each way will cost in each dtype: it is done, and measured on a sample of rows."""
    stream = OpenStream(seam, affines)
    return stream.forecast(dtypes, {way: stream.basis(way) for way in ways or seam.identities}, rest_dtype, later)


class OpenStream:
    """A stream seam's tensors before it is closed; it can be closed by each way, and what that changes be measured.

    affines: every module of seam.modules, in fp64. weights: what a squared error counts in each column of the readers.
    extra_weights: the same, in each column of what else reads the stream, the duals' transposed weights and the
    followers.
    """

    def __init__(self, seam: Seam, affines: Mapping[str, Affine]):
        self.seam, self.affines = seam, affines
        self.readers = {name: affines[name].weight for name in seam.readers}
        self.writers = [affines[name].scaled for name in seam.writers]
        self.power = mean_squares(self.writers)
        counts = {*seam.seen.values(), len(self.writers)}
        self.written = {count: mean_squares(self.writers[:count]) if seam.seen else self.power for count in counts}
        generator = torch.Generator().manual_seed(0)
        drawn = (torch.randint(len(writer), (PROBES,), generator=generator, device="cpu") for writer in self.writers)
        self.rows = {name: rows.to(self.power.device) for name, rows in zip(seam.writers, drawn, strict=True)}
        self.sample = {name: affines[name].of_rows(affines[name].weight[rows]) for name, rows in self.rows.items()}
        self.within = torch.float64
        self.bias_scale = bias_scale(self.writers, any(affines[name].table for name in seam.writers))
        duals = [affines[name].weight.T for name in seam.duals]
        followers = [affines[name].weight for name in seam.followers]
        parts = noise_weights(self.power, [*self.readers.values(), *duals, *followers])
        self.weights = torch.cat(parts[: len(self.readers)])
        self.extra_weights = torch.cat([*parts[len(self.readers) :], self.weights[:0]])
        # everything that reads the stream; a tied head reads it through the duals
        self.outputs = {letter(name): reader for name, reader in self.readers.items()}
        if duals:
            self.outputs["logits"] = duals[0] if len(duals) == 1 else torch.cat(duals, 1)
        self.followers: dict[str, list[str]] = {}
        for name in seam.followers:  # of other layers, too, where skips join their streams
            what = letter(name)
            self.followers.setdefault(f"later {what}" if what in self.outputs else what, []).append(name)
        for name, others in self.followers.items():
            self.outputs[name] = join([affines[other].weight for other in others])

    @cached_property
    def moment(self) -> Float[Tensor, "d d"]:
        """G = E[x^T x] of the original stream."""
        return moment(self.writers)

    @cached_property
    def output_of(self) -> dict[str, str]:
        """By reader, dual and follower: the name of what it gives, in `outputs`."""
        names = {name: letter(name) for name in self.readers} | dict.fromkeys(self.seam.duals, "logits")
        return names | {name: what for what, group in self.followers.items() for name in group}

    @cached_property
    def powers(self) -> dict[str, float]:
        """Mean squares of q, k, v and all other `outputs`, summed over their columns."""
        return {
            name: sum(
                (multiply(self.moment, part) * part).sum().item()
                for columns in slices(reader.shape[1], ROWS)
                for part in [reader[:, columns].double()]
            )
            for name, reader in self.outputs.items()
        }

    def basis(self, way: str) -> Basis:
        """The basis of a way, usable or not."""
        return candidate(self.seam, way, self.readers, self.weights)

    @cached_property
    def by_rows(self) -> dict[str, Affine]:
        """All modules; of writers that nothing needs whole, rows are computed when they are asked for."""
        found = dict(self.affines)
        for name in self.rows:
            weight = found[name].weight
            if isinstance(weight, Tensor) and found[name].bias is None and name not in self.seam.duals:
                rows = Rows((len(weight), weight.shape[1]), weight.dtype, weight.device, weight.__getitem__)
                found[name] = dataclasses.replace(found[name], weight=cast(Tensor, rows))
        return found

    def close(
        self, basis: Basis, dtypes: Mapping[str, torch.dtype] | None = None, affines: Mapping[str, Affine] | None = None
    ) -> Stream:
        """The seam closed: exactly, or as precisely as the writers' dtypes can tell. affines: all, or `by_rows`.

        If all are stored in half precision, O S is computed in fp32, unless R, or that of another reader, is so large
        that its error would show.
        """
        affines = self.affines if affines is None else affines
        half = dtypes is not None and all(dtypes[name] in HALF for name in self.seam.writers)

        def precision(stream: Stream) -> torch.dtype:
            self.within = torch.float32 if half and self._largest(stream) <= LARGEST_REST else torch.float64
            return self.within

        return close_stream(self.seam, affines, basis, precision)

    def _largest(self, stream: Stream) -> float:
        """The largest scaled |R|, of all that reads the stream."""
        others = [matrix for _, matrix in stream.beside()]
        weights = self.extra_weights.split([matrix.shape[1] for matrix in others])
        parts = zip([stream.rest.weight, *others], [self.weights[stream.others], *weights], strict=True)
        return max(Rest(*part, torch.float64).largest(self.weights[stream.kept]) for part in parts)

    def release(self) -> None:
        """Drop the writers: a sample of their rows is all that `measure` needs."""
        self.writers = []
        bare = {name: self.affines[name].of_rows(self.sample[name].weight) for name in self.rows}
        self.affines = {**self.affines, **bare}

    def forecast(
        self,
        dtypes: Sequence[str],
        bases: Mapping[str, Basis],
        rest_dtype: str | None = None,
        later: frozenset[str] = frozenset(),
    ) -> Forecast:
        """What closing it in each of these bases will cost in each dtype; later: as in removals.forecast."""
        original = {dtype: self._original(dtype, self.powers) for dtype in dtypes}
        lost: Mapping[str, float] = dict.fromkeys(self.outputs, math.inf)
        ways, left = {}, {}
        for way, basis in bases.items():
            largest, errors = math.inf, dict.fromkeys(dtypes, lost)
            for name in dtypes if basis.usable else ():
                dtype = getattr(torch, name)
                stored = self._stored(dtype, way, rest_dtype, later)
                # a rest that is solved for last, and what is handed on, take all rows; all else a sample
                whole = not later.isdisjoint(self.seam.followers) or (dtype in HALF) != (stored["rest"] in HALF)
                stream = self.close(basis, stored, self.affines if whole else self.by_rows)
                rest = Rest(stream.rest.weight, self.weights[stream.others], stored["rest"])
                largest = rest.largest(self.weights[stream.kept])
                if not self._fits(basis, stream, stored):
                    continue
                if dtype in HALF:
                    stream = round_stream(stream, self.weights, self.extra_weights, stored)
                stream = handed_on(stream, later)
                errors[name] = self.measure(way, basis.condition, stream, stored, name).ways[way].errors[name]
                left[way] = {each: follower for each, follower in stream.followers.items() if each in later}
            ways[way] = Way(basis.condition, largest, errors)
        return Forecast(self.seam, original, ways, left)

    def _stored(
        self, dtype: torch.dtype, way: str, rest_dtype: str | None, later: frozenset[str]
    ) -> dict[str, torch.dtype]:
        """As stored_dtypes, of a seam that is stored in `dtype`."""
        names = (*self.seam.writers, *self.seam.duals, *self.seam.followers)
        finer = dtype if rest_dtype is None or way != "pivoted" else getattr(torch, rest_dtype)
        kept = {name: torch.float64 if name in later else dtype for name in names}
        return {**kept, "rest": torch.promote_types(dtype, finer)}

    def _fits(self, basis: Basis, stream: Stream, dtypes: Mapping[str, torch.dtype]) -> bool:
        """Whether there are no numbers larger than the dtypes can hold."""
        chosen = join(list(self.readers.values())).T[basis.columns].double().T
        largest = dict(zip(self.seam.writers, (reach(writer, chosen) for writer in self.writers), strict=True))
        parts = {"rest": stream.rest, **stream.duals, **stream.followers}
        largest |= {name: max_abs(part.weight) for name, part in parts.items() if part.weight.numel()}
        return all(number <= torch.finfo(dtypes[name]).max for name, number in largest.items())

    def measure(
        self,
        way: str,
        condition: float,
        stream: Stream,
        dtypes: Mapping[str, torch.dtype],
        judged: str,
        bias_scale: float | None = None,
    ) -> Forecast:
        """What closing it by `way` has cost, on a sample of the writers' rows.

        stream: closed, and rounded to `dtypes` (of each writer, dual and follower, and of "rest"). judged: the dtype
        that the errors are said to be of. bias_scale: by what biases are multiplied (None: self.bias_scale).
        """
        scale = self.bias_scale if bias_scale is None else bias_scale
        before = [_scale_bias(writer, scale) for writer in self.sample.values()]
        readers = {name: _scale_bias(self.affines[name], scale) for name in (*self.readers, *self.seam.followers)}
        after = [
            _scale_bias(_cast(writer.of_rows(writer.weight[self.rows[name]]), dtypes[name]), scale)
            for name, writer in stream.writers.items()
        ]
        shares = list(stream.bias_shares.values())
        rest = _scale_bias(_cast(stream.rest, dtypes["rest"]), scale)
        (seen,) = {self._seen(name) for name in self.readers}  # one layer's
        x, offset = self._stream(before[:seen], shares)
        exact = {letter(name): self._times(x, reader) for name, reader in self.readers.items()}
        powers = {name: mean_square(part) for name, part in exact.items()}
        y = _sum(after[:seen], shares[:seen])
        outputs = torch.cat([y, self._read(y, rest)], 1)[:, torch.cat([stream.kept, stream.others]).argsort()]
        lost = {}
        sizes = [reader.shape[1] for reader in self.readers.values()]
        for name, part in zip(self.readers, outputs.split(sizes, 1), strict=True):
            lost[letter(name)] = part - exact[letter(name)] - self._read(offset[None], readers[name])
        for name, others in self.followers.items():
            parts = []
            for other in others:
                seen = self._seen(other)
                follower, (x, offset) = readers[other], self._stream(before[:seen], shares)
                powers[name] = powers.get(name, 0.0) + mean_square(self._times(x, follower.weight))
                was = self._read(follower.scale * (x + offset), follower)
                y = follower.scale * _sum(after[:seen], shares[:seen])
                moved = _scale_bias(_cast(stream.followers[other], dtypes[other]), scale)
                parts.append((self._read(y, moved) - was) / follower.scale)
            lost[name] = torch.cat(parts, 1)
        if stream.duals:
            duals = [_cast(dual, dtypes[name]).weight.T for name, dual in stream.duals.items()]
            logits = self._times(before[0].weight.double(), self.outputs["logits"])
            lost["logits"] = torch.cat([self._times(after[0].weight, dual) for dual in duals], 1) - logits
            powers["logits"] = mean_square(logits)
        errors = {name: relative(mean_square(part), powers[name]) for name, part in lost.items()}
        original = {judged: self._original(judged, powers)}
        return Forecast(self.seam, original, {way: Way(condition, None, {judged: errors})})

    def check(self, way: str, basis: Basis, stream: Stream) -> None:
        """Raise BugError if closing the seam, before anything is rounded, has changed what is read of the sample."""
        exactly = dict.fromkeys((*stream.writers, *stream.duals, *stream.followers, "rest"), torch.float64)
        foretold = self.measure(way, basis.condition, stream, exactly, "float64", bias_scale=1.0)
        errors = foretold.ways[way].errors["float64"]
        limit = EXACT[self.within]
        for name, error in errors.items():
            if not error <= limit:
                raise BugError(
                    f"{name} of layer {self.seam.layer}: expected closing the {self.seam.kind} seam to change nothing "
                    f"(at most {limit:.0e}, before it is rounded), found a relative error of {error:.1e}; nothing was "
                    f"published"
                )

    def width(self, name: str) -> int:
        """Columns of what reads the stream."""
        weight = self.affines[name].weight
        return len(weight) if name in self.seam.duals else weight.shape[1]

    def _seen(self, name: str) -> int:
        """How many of the writers have written before a reader or follower reads."""
        return self.seam.seen.get(name, len(self.rows))

    def _stream(
        self, writers: Sequence[Affine], shares: Sequence[float]
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "d"]]:
        """What these writers write: rows, each of one of its inputs, and what comes of biases."""
        parts = [_parts(writer, share) for writer, share in zip(writers, shares, strict=False)]
        rows, offsets = zip(*parts, strict=True)
        return torch.stack(rows).sum(0), torch.stack(offsets).sum(0)

    def _times(self, x: Float[Tensor, "n d"], matrix: Float[Tensor, "d r"]) -> Float[Tensor, "n r"]:
        """X A as precisely as the seam was closed."""
        return product(x, matrix, torch.float64, self.within)

    def _read(self, x: Float[Tensor, "n d"], affine: Affine) -> Float[Tensor, "n r"]:
        return self._times(x, affine.weight) + (0 if affine.bias is None else affine.bias)

    def _original(self, dtype: str, powers: Mapping[str, float]) -> dict[str, float]:
        """Relative errors of q, k, v (and logits) when the original's weights are rounded to `dtype`."""
        unit, _ = precision_of(dtype)
        lost = {name: (2 * self._written(name) @ squares(reader, 1)).item() for name, reader in self.outputs.items()}
        for name, what in self.output_of.items():
            if (bias := self.affines[name].bias) is not None and name not in self.seam.duals:
                lost[what] += (self.bias_scale * bias / self.affines[name].scale).square().sum().item()
        return {name: unit * relative(square, powers[name]) for name, square in lost.items()}

    def _written(self, name: str) -> Float[Tensor, "d"]:
        """Mean squares of what one of `outputs` reads, biases included."""
        group = self.followers.get(name, [other for other in self.readers if letter(other) == name])
        seen = max(map(self._seen, group), default=len(self.rows))
        power = self.written[seen]
        for writer in self.seam.writers[:seen]:
            if (bias := self.affines[writer].bias) is not None:
                scale = self.bias_scale * self.affines[writer].scale
                power = power + self.seam.bias_share(writer) * (scale * bias).square()
        return power


def bias_scale(writers: Sequence[Float[Matrix, "_ d"]], tables: bool) -> float:
    """By what biases are multiplied where one row of each writer stands for its inputs, all of variance 1.

    They are as large beside that row as they are beside the sum of all. Of a table, one row is read: 1.
    """
    if tables:
        return 1.0
    powers = [mean_squares([writer]).sum().item() for writer in writers]
    whole = sum(len(writer) * power for writer, power in zip(writers, powers, strict=True))
    return (sum(powers) / whole) ** 0.5 if whole else 1.0


def _scale_bias(affine: Affine, scale: float) -> Affine:
    """The map with its bias multiplied by scale."""
    return affine if affine.bias is None else dataclasses.replace(affine, bias=scale * affine.bias)


def _cast(affine: Affine, dtype: torch.dtype) -> Affine:
    """A map as it is stored."""
    bias = None if affine.bias is None else affine.bias.to(dtype).double()
    return Affine(affine.weight.to(dtype), bias, scale=affine.scale)


def _parts(writer: Affine, share: float) -> tuple[Float[Tensor, "n d"], Float[Tensor, "d"]]:
    """What a writer adds to the stream: of each input a row, and the share of its bias."""
    weight = writer.weight.double() * writer.scale
    return weight, weight.new_zeros(weight.shape[1]) if writer.bias is None else share * writer.scale * writer.bias


def _sum(writers: Sequence[Affine], shares: Sequence[float]) -> Float[Tensor, "n d"]:
    """Rows of the stream: the sum of one row of each writer, with the shares of their biases."""
    parts = [_parts(writer, share) for writer, share in zip(writers, shares, strict=True)]
    return torch.stack([weight + offset for weight, offset in parts]).sum(0)


def forecast_memory(seam: Seam, tensors: Mapping[str, TensorInfo], by_rows: Collection[str]) -> int:
    """Bytes that forecast holds for a stream seam whose modules have these tensors.

    That is what it has read, but for what it takes by rows; what the writers become; and, in fp64, (d, d) and (d, r)
    matrices, with r all columns that are not passed.
    """
    stored = {name: tensors[f"{name}.weight"] for name in seam.modules if f"{name}.weight" in tensors}
    d, readers = seam.width, (*seam.readers, *seam.followers, *seam.duals)
    r = sum(stored[name].weights for name in readers) // d - d
    held = sum(info.bytes for name, info in stored.items() if name not in by_rows)
    n = sum(stored[name].weights for name in seam.writers if name not in by_rows) // d
    return 8 * d * (SQUARES * d + RESTS * r + n) + held


@dataclass(frozen=True)
class _Shapes:
    """A stream seam's sizes: rows of each writer, d, m, and extra: the columns of followers and duals.

    half: whether all that is stored is in half precision. rounded: whether any is. fixed: whether R is not. by_rows:
    whether what the writers become is computed anew for each use.
    """

    rows: tuple[int, ...]
    d: int
    m: int
    extra: int
    pivoted: bool
    half: bool
    rounded: bool
    fixed: bool
    by_rows: bool

    @classmethod
    def of(cls, seam: Seam, setting: Setting) -> "_Shapes":
        """Those of a seam."""

        def width(name: str) -> int:
            return setting.size(name) // seam.width

        dtypes = stored_dtypes(seam, setting)
        return cls(
            rows=tuple(width(name) for name in seam.writers),
            d=seam.width,
            m=sum(width(name) for name in seam.readers),
            extra=sum(width(name) for name in (*seam.followers, *seam.duals)),
            pivoted=seam.removed(setting.basis) == seam.readers,
            half=all(dtype in HALF for dtype in dtypes.values()),
            rounded=any(dtype in HALF for dtype in dtypes.values()),
            fixed=dtypes["rest"] not in HALF,
            by_rows=setting.by_rows,
        )

    @property
    def r(self) -> int:
        return self.m - self.d

    @property
    def n(self) -> int:
        return sum(self.rows)

    @property
    def within(self) -> torch.dtype:
        """Of O S, and, unless the rest is large, of all that rounding does."""
        return F32 if self.half else F64


def steps(seam: Seam, setting: Setting) -> Iterator[Step]:
    """Those of close_stream, round_stream and OpenStream.measure.

    What depends on the numbers is taken as usual: R is moderate (rounding.MODERATE_REST), no Cholesky factorization has
    to be repeated, and pivoting needs no swaps.
    """
    s = _Shapes.of(seam, setting)
    d, r, n, within = s.d, s.r + s.extra, s.n, s.within
    if s.pivoted:
        yield "choose columns", within, d**2 * (s.m - d / 3) + d**2 * s.r
    yield "factorize S", F64, 2 / 3 * d**3
    yield "R = S^-1 A", F64, 2.0 * d**2 * r
    uses = 1 if not (s.by_rows and s.rounded) else 2 if len(s.rows) == 1 else 3  # G, the means of several, X + X change
    yield "X = O S", within, 2.0 * n * d**2 * uses
    if s.rounded:
        yield "G = X^T X", within, float(n * d**2)
        if not s.pivoted:
            yield "shrink R", F64, d**3 / 3 + 2.0 * d**2 * r
        widths = [width for width in (s.r, s.extra) if width]
        yield "factorize G", within, len(widths) * d**3 / 3
        for width in widths:
            blocks = [min(COLUMNS, width - start) for start in range(0, width, COLUMNS)]
            yield "N", within, float(sum(b * b * d for b in blocks))
            yield "factorize N", within, 4 / 3 * sum(b**3 for b in blocks)
            yield "round R", F32, float(sum(b * d**2 + b * b * d for b in blocks))
        yield "H = 1 + R R^T", within, float(r * d**2)
        yield "factorize H", within, d**3 / 3
        yield "R^T H^-1", within, 2.0 * d**2 * r
        yield "change of X", within, 2.0 * d**2 * r
        yield "X + X change", BF16 if s.half and s.pivoted else within, 2.0 * n * d**2
        yield "round X", BF16 if s.half else F32, float(n * d**2)
        if s.fixed:
            yield "solve for R again", F64, 4.0 * n * d * s.r + n * d**2 + d**3 / 3 + 2.0 * d**2 * s.r
    if not setting.later.isdisjoint(seam.followers):
        yield "moment of X", within, float(n * d**2)
    yield "measure, exact and rounded", within, 4.0 * PROBES * d * (s.m + s.r + 2 * s.extra)


def memory(seam: Seam, setting: Setting) -> float:
    """The largest of `close`'s stages, beside what has been read. The writers are dropped after O S.

    By rows, neither tables nor X are held whole; instead, S and what X is rounded with are, for each writer, and what
    has been read of the others.
    """
    s = _Shapes.of(seam, setting)
    d, m, r, n, x = s.d, s.m, s.r + s.extra, s.n, s.within.itemsize
    stored = {name: setting.info(name) for name in seam.writers}
    made, gone, unread, result = n * d * x, sum(info.bytes for info in stored.values()), 0, n
    if s.by_rows:
        read = {name: info for name, info in stored.items() if not setting.is_table(name)}
        made, gone, unread = len(s.rows) * x * d * d, 0, gone - sum(info.bytes for info in read.values())
        result = sum(info.weights // d for name, info in read.items() if setting.stored(name) != info.dtype)
    joined = d * m * max(setting.info(name).dtype.itemsize for name in seam.readers)
    choose = joined + (2 * x * m * d + x * d * d if s.pivoted else 0)
    factors = 8 * d * d
    close = joined + factors + 16 * d * r
    chunk = min(block_rows(d), max(s.rows)) * d * x
    write = joined + factors + 8 * d * r + made + 2 * x * d * d + 2 * chunk
    held, size = 8 * d * r + made - gone, 2 if s.half else 8
    stages = [choose, joined + 2 * factors, close, write]
    if s.rounded:
        root = (4 * x if s.pivoted else max(4 * x, x + 16)) * d * d
        stages.append(held + x * d * d + root + (0 if s.pivoted else 16 * d * r))
        widest = min(COLUMNS, max(s.r, s.extra))
        stages.append(held + 2 * x * d * d + 4 * d * d + 24 * d * widest + 20 * widest**2 + 2 * d * r)
        stages.append(held + 2 * d * r + 3 * x * d * r + 4 * x * d * d)
        block = (x + 2 * x + 8 + 8 + (2 * x + 8 if s.by_rows else 0)) * d * min(block_rows(d), max(s.rows))
        under = 2 * x * d * d + 8 * d * d * (len(s.rows) if s.by_rows else 1)
        stages.append(held + 2 * d * r + result * d * size + under + block)
    elif s.by_rows:
        stages.append(held + result * d * size + 3 * chunk)
    if not setting.later.isdisjoint(seam.followers):
        stages.append(held + 2 * d * r + result * d * size + (x + 16) * d * d)
    stages.append(held + 8 * PROBES * (2 * d + 4 * m + 3 * s.extra) + x * d * max(d, m - d))
    return float(max(stages) - unread)

"""What storing a model in some dtype will cost, before doing it: expected relative errors of q, k, v and M.

Inputs are taken as white, rounding errors as independent with a relative size that the dtype sets. Every error then is
a sum of squares, of G = E[x^T x], of the pivots of the metrics that rounding.py rounds under, and of R; where those
would take longer than the rounding itself, it is the mean of a sample.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from skipless.basis import Basis, candidate, choose_rows, join
from skipless.checkpoint.reader import TensorInfo
from skipless.dtypes import DTYPE_NAMES
from skipless.eliminate import Affine, Stream, close_rest, close_rows, close_stream, past_norm
from skipless.errors import InputError
from skipless.products import HALF, ROWS, blocks, max_abs, multiply, product, slices, squares
from skipless.rounding import (
    Rest,
    along_rows,
    factorize,
    joint_metric,
    left_by_solving,
    mean_squares,
    moment,
    noise_weights,
    repaired_weights,
    rounding_error,
    shrink,
    subnormal_power,
)
from skipless.rows import Matrix
from skipless.seams import Seam
from skipless.tolerances import tolerance

# Sampled errors: those of q, k or v, a sum over at least as many, are then right to a few per cent.
PROBES = 512
# The size of a merged matrix, of as many outputs as it has: of so few inputs it is right to a few per cent, too.
FEW_PROBES = 16
# Matrices in fp64, of S's size and of R's, that a forecast holds at most, as benchmarks/memory.py measures them.
SQUARES, RESTS = 10, 6
# While the scaled |R| stays below this, O* = O S may be off by fp32's 1e-7 where it is stored in half precision.
LARGEST_REST = 1e3


@dataclass(frozen=True)
class Way:
    """A way to close a seam.

    condition: estimated condition number, 1-norm, of the columns that become the identity; largest: max|R| of the rest,
    rows and columns scaled by what errors count there (both None in a P-M seam, where nothing is solved for).
    errors: dtype -> q, k, v (and logits, if the head is tied to the seam's table; m, in a parallel layer), or m ->
    expected relative error as stored in it; infinite if the way cannot be gone or the dtype cannot hold the numbers.
    """

    condition: float | None
    largest: float | None
    errors: Mapping[str, Mapping[str, float]]

    @property
    def usable(self) -> bool:
        """Whether it can be gone at all, in exact enough arithmetic."""
        return self.largest != math.inf

    def worst(self, dtype: str) -> float:
        """The largest of the errors in a dtype."""
        return max(self.errors[dtype].values())


@dataclass(frozen=True)
class Outcome:
    """A seam that has been closed, by `way`, and stored in `dtype`. errors, original: as in Way and Forecast, in that
    dtype (empty: where nothing is solved for); problem: why that loses too much, or None.
    """

    kind: str
    layer: int
    way: str
    dtype: str
    errors: Mapping[str, float]
    original: Mapping[str, float]
    problem: str | None = None

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "Outcome":
        """What dataclasses.asdict gave. Raises ValueError for anything else."""
        if {field.name for field in dataclasses.fields(cls)} != fields.keys():
            raise ValueError("other fields")
        words = (fields[name] for name in ("kind", "way", "problem") if fields[name] is not None)
        if not all(isinstance(word, str) and word.isprintable() for word in words):
            raise ValueError("no words")
        if type(fields["layer"]) is not int or fields["dtype"] not in DTYPE_NAMES:
            raise ValueError("no layer, or no dtype")
        if not all(map(_are_errors, (fields["errors"], fields["original"]))):
            raise ValueError("no errors")
        return cls(**fields)


def _are_errors(found: object) -> bool:
    """Whether something is the errors of q, k, v and so on, as JSON has them."""
    return isinstance(found, dict) and all(type(error) in (int, float) and error >= 0 for error in found.values())


@dataclass(frozen=True)
class Forecast:
    """What closing a seam will cost, by way and dtype, and `original`: what rounding it unclosed costs by dtype alone.

    The original's weights are taken to use all their bits: a bf16 checkpoint would lose nothing in bf16. And none of
    them is taken to be too small for the dtype, so that such numbers, where closing the seam makes them, count as loss.
    """

    seam: Seam
    original: Mapping[str, Mapping[str, float]]
    ways: Mapping[str, Way]

    def outcome(self, way: str, dtype: str) -> Outcome:
        """What has become of the seam, closed by `way` and stored in `dtype`."""
        errors, problem = self.ways[way].errors[dtype], self.problem(way, dtype)
        return Outcome(self.seam.kind, self.seam.layer, way, dtype, errors, self.original[dtype], problem)

    def problem(self, way: str, dtype: str) -> str | None:
        """Why closing the seam by `way` is not safe in `dtype`, or None: the error would exceed the tolerance."""
        found, own = self.ways[way].errors[dtype], self.original[dtype]
        limits = {name: tolerance(getattr(torch, dtype), own[name]) for name in found}
        beyond = [name for name in found if found[name] > limits[name] or math.isinf(found[name])]
        if not beyond:
            return None
        name = max(beyond, key=found.__getitem__)
        if not self.ways[way].usable:
            return (
                f"layer {self.seam.layer} cannot be rewritten by {way}: the condition number is "
                f"{self.ways[way].condition:.1e}"
            )
        if math.isinf(found[name]):
            return f"layer {self.seam.layer} by {way}: there are numbers larger than {dtype} can hold"
        return (
            f"layer {self.seam.layer} by {way} in {dtype}: the relative error of {name} is {found[name]:.1e}, above "
            f"{limits[name]:.1e} (the original's: {own[name]:.1e})"
        )


def forecast(
    seam: Seam,
    affines: Mapping[str, Affine],
    dtypes: Sequence[str],
    ways: Iterable[str] | None = None,
    rest_dtype: str | None = None,
) -> Forecast:
    """What closing a seam by each of `ways` (None: all there are) will cost in each dtype.

    affines: every module of seam.modules in fp64. rest_dtype: that of the rest of pivoted columns, if it is another.
    """
    if seam.rest:
        stream = OpenStream(seam, affines)
        return stream.forecast(dtypes, {way: stream.basis(way) for way in ways or seam.identities}, rest_dtype)
    if "rows" in seam.identities:
        try:
            bases = choose_rows(seam, affines[seam.writers[0]].weight)
        except InputError:
            return _impossible(seam, dtypes)
        bare = {name: dataclasses.replace(affine, bias=None) for name, affine in affines.items()}  # weights count
        return passed_rows(seam, affines, close_rows(seam, bare, bases)[0], bases, dtypes)
    (writer,) = (affines[name].weight for name in seam.writers)
    readers = [reader.weight for reader in past_norm(seam, affines).values()]
    power = merged_power(seam, affines, PROBES)
    return merged(seam, affines, dtypes, power, max(_reach(writer, reader) for reader in readers))


def forecast_memory(seam: Seam, tensors: Mapping[str, TensorInfo], by_rows: Collection[str]) -> int:
    """Bytes that forecast holds for a stream seam whose modules have these tensors: all but what it takes by rows, and
    in fp64 (d, d) matrices, and (d, r) ones of all columns that are not passed.
    """
    stored = {name: tensors[f"{name}.weight"] for name in seam.modules if f"{name}.weight" in tensors}
    d, readers = seam.width, (*seam.readers, *seam.followers, *seam.duals)
    r = sum(stored[name].weights for name in readers) // d - d
    held = sum(info.bytes for name, info in stored.items() if name not in by_rows)
    return 8 * d * (SQUARES * d + RESTS * r) + held


def merged_power(seam: Seam, affines: Mapping[str, Affine], most: int) -> float:
    """Sum of squares of all M* = P M, on a sample of so many white x: x P, and then M."""
    (writer,) = (affines[name].weight for name in seam.writers)
    written = product(_probes(len(writer), writer)[:most], writer, torch.float64)
    readers = past_norm(seam, affines).values()
    return len(writer) * sum(_mean_square(product(written, reader.weight, torch.float64)) for reader in readers)


def merged(seam: Seam, affines: Mapping[str, Affine], dtypes: Sequence[str], power: float, largest: float) -> Forecast:
    """The errors of x P M, for white x, when P (D, d) and every M (d, f) are rounded, and when M* = P M is.

    power: sum of squares of all M*; largest: max |M*|, or a bound of it.
    """
    (writer,) = (affines[name].weight for name in seam.writers)
    size = len(writer) * sum(reader.weight.shape[1] for reader in past_norm(seam, affines).values())
    errors = {}
    for dtype in dtypes:
        unit, floor = _precision(dtype)
        lost = math.inf if largest > torch.finfo(getattr(torch, dtype)).max else power + floor * size
        errors[dtype] = {"m": unit * _relative(lost, power)}
    original = {dtype: _unmerged(seam, affines, dtype, power) for dtype in dtypes}
    return Forecast(seam, original, {way: Way(None, None, errors) for way in seam.identities})


def _unmerged(seam: Seam, affines: Mapping[str, Affine], dtype: str, power: float) -> dict[str, float]:
    """Relative error of x P M when P and every M are rounded to `dtype`; power: as for `merged`."""
    (writer,) = (affines[name].weight for name in seam.writers)
    m = torch.stack([squares(reader.weight, 1) for reader in past_norm(seam, affines).values()]).sum(0)
    unit, _ = _precision(dtype)
    return {"m": unit * _relative(2 * (squares(writer, 0) @ m).item(), power)}


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
        unit, floor = _precision(dtype)
        fits = largest <= torch.finfo(getattr(torch, dtype)).max
        original[dtype] = {
            name: unit * _relative(lost(before, read, 0.0, 0.0), powers[name]) for name, (read, _) in squares.items()
        }
        errors[dtype] = {
            name: unit * _relative(lost(after, read, 1.0, floor) if fits else math.inf, powers[name])
            for name, (_, read) in squares.items()
        }
    return Forecast(seam, original, {"rows": Way(max(basis.condition for basis in bases), None, errors)})


def _impossible(seam: Seam, dtypes: Sequence[str]) -> Forecast:
    """A seam whose only way cannot be gone."""
    names = dict.fromkeys(letter(name) for name in seam.readers)
    infinite = {dtype: dict.fromkeys(names, math.inf) for dtype in dtypes}
    nothing = {dtype: dict.fromkeys(names, 0.0) for dtype in dtypes}
    return Forecast(seam, nothing, {way: Way(math.inf, math.inf, infinite) for way in seam.identities})


class OpenStream:
    """A stream seam's tensors before it is closed, and what each way to close it would do to what is read from it.

    affines: every module of seam.modules in fp64; ways are the names in seam.identities. weights, extra_weights: what a
    squared error counts in each column of the readers, and of what else reads the stream: the duals' transposed
    weights, and the followers.
    """

    def __init__(self, seam: Seam, affines: Mapping[str, Affine]):
        self.seam, self.affines = seam, affines
        self.readers = {name: affines[name].weight for name in seam.readers}
        self.writers = [affines[name].weight for name in seam.writers]
        self.power = mean_squares(self.writers)
        generator = torch.Generator().manual_seed(0)
        drawn = (torch.randint(len(writer), (PROBES,), generator=generator, device="cpu") for writer in self.writers)
        self.rows = {name: rows.to(self.power.device) for name, rows in zip(seam.writers, drawn, strict=True)}
        self.sample = {name: _rows(affines[name], rows) for name, rows in self.rows.items()}
        self.within = torch.float64
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
    def powers(self) -> dict[str, float]:
        """Mean squares of q, k and v (and logits), summed over their columns."""
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

    def close(self, basis: Basis, dtypes: Mapping[str, torch.dtype] | None = None) -> Stream:
        """The seam closed: exactly, or, with the dtypes in which the writers will be stored, as precisely as they can
        tell. That of a writer in half precision is fp32, if R does not enlarge what that is off by.
        """
        rest = close_rest(self.seam, self.affines, basis)
        if dtypes is not None and all(dtypes[name] in HALF for name in self.seam.writers):
            kept = torch.ones(len(self.weights), dtype=torch.bool, device=self.weights.device)
            kept[basis.columns] = False
            found = Rest(rest.weight, self.weights[kept.nonzero()[:, 0]], torch.float64)
            self.within = torch.float32 if found.largest(self.weights[basis.columns]) <= LARGEST_REST else torch.float64
        return close_stream(self.seam, self.affines, basis, rest, self.within)

    def release(self) -> None:
        """Forget the writers: a sample of their rows is all that `measure` needs."""
        self.writers = []
        bare = {name: dataclasses.replace(self.affines[name], weight=self.sample[name].weight) for name in self.rows}
        self.affines = {**self.affines, **bare}

    def forecast(self, dtypes: Sequence[str], bases: Mapping[str, Basis], rest_dtype: str | None = None) -> Forecast:
        """What closing it in each of these bases will cost in each dtype."""
        original = {dtype: self._original(dtype, self.powers) for dtype in dtypes}
        ways = {way: self._way(way, basis, dtypes, rest_dtype) for way, basis in bases.items()}
        return Forecast(self.seam, original, ways)

    def measure(
        self, way: str, condition: float, stream: Stream, dtypes: Mapping[str, torch.dtype], judged: str
    ) -> Forecast:
        """What closing it by `way` has cost, on a sample of the writers' rows; `judged`: the dtype it counts as.

        stream: as it will be stored in `dtypes` (of each writer and dual, and of "rest").
        """
        before = list(self.sample.values())
        after = [_cast(_rows(writer, self.rows[name]), dtypes[name]) for name, writer in stream.writers.items()]
        shares = list(stream.bias_shares.values())
        x, offset = (part.sum(0) for part in map(torch.stack, zip(*map(_parts, before, shares), strict=True)))
        y = _sum(after, shares)
        read = (*map(letter, self.readers), *self.followers)
        exact = {name: self._times(x, self.outputs[name]) for name in read}
        powers = {name: _mean_square(part) for name, part in exact.items()}
        rest = _cast(stream.rest, dtypes["rest"])
        found = torch.cat([y, self._read(y, rest)], 1)[:, torch.cat([stream.kept, stream.others]).argsort()]
        lost = {}
        sizes = [reader.shape[1] for reader in self.readers.values()]
        for name, part in zip(self.readers, found.split(sizes, 1), strict=True):
            lost[letter(name)] = part - exact[letter(name)] - self._read(offset[None], self.affines[name])
        for name, others in self.followers.items():
            now = [self._read(y, _cast(stream.followers[other], dtypes[other])) for other in others]
            extra = [self._read(offset[None], self.affines[other]) for other in others]
            lost[name] = torch.cat(now, 1) - exact[name] - torch.cat(extra, 1)
        if stream.duals:
            duals = [_cast(dual, dtypes[name]).weight.T for name, dual in stream.duals.items()]
            logits = self._times(before[0].weight.double(), self.outputs["logits"])
            lost["logits"] = torch.cat([self._times(after[0].weight, dual) for dual in duals], 1) - logits
            powers["logits"] = _mean_square(logits)
        errors = {name: _relative(_mean_square(part), powers[name]) for name, part in lost.items()}
        original = {judged: self._original(judged, powers)}
        return Forecast(self.seam, original, {way: Way(condition, None, {judged: errors})})

    def _times(self, x: Float[Tensor, "n d"], matrix: Float[Tensor, "d r"]) -> Float[Tensor, "n r"]:
        """X A as precisely as the seam was closed."""
        return product(x, matrix, torch.float64, self.within)

    def _read(self, x: Float[Tensor, "n d"], affine: Affine) -> Float[Tensor, "n r"]:
        return self._times(x, affine.weight) + (0 if affine.bias is None else affine.bias)

    def _original(self, dtype: str, powers: Mapping[str, float]) -> dict[str, float]:
        """Relative errors of q, k, v (and logits) when the original's weights are rounded to `dtype`."""
        power, (unit, _) = self.power, _precision(dtype)
        for name in self.seam.writers:
            if (bias := self.affines[name].bias) is not None:
                power = power + self.seam.bias_share(name) * bias.square()
        lost = {name: (2 * power @ squares(reader, 1)).item() for name, reader in self.outputs.items()}
        for name in self.readers:
            if (bias := self.affines[name].bias) is not None:
                lost[letter(name)] += bias.square().sum().item()
        return {name: unit * _relative(square, powers[name]) for name, square in lost.items()}

    def _way(self, way: str, basis: Basis, dtypes: Sequence[str], rest_dtype: str | None) -> Way:
        """What the seam closed in a basis, usable or not, loses."""
        lost = dict.fromkeys(self.outputs, math.inf)
        if not basis.usable:
            return Way(basis.condition, math.inf, dict.fromkeys(dtypes, lost))
        # without the writers' rows, which would take longest and of which `moment` says enough
        bare = {
            name: dataclasses.replace(self.affines[name], weight=self.affines[name].weight[0:0])
            for name in self.seam.writers
        }
        stream = close_stream(self.seam, {**self.affines, **bare}, basis)
        chosen = join(list(self.readers.values())).T[basis.columns].double().T
        metric = multiply(chosen.T, multiply(self.moment, chosen))
        extra = [dual.weight.T for dual in stream.duals.values()]
        extra += [follower.weight for follower in stream.followers.values()]
        passed_weights, errors, largest = self.weights[stream.kept], {}, 0.0
        written = max(_reach(writer, chosen) for writer in self.writers)
        for name in dtypes:
            dtype = getattr(torch, name)
            finer = dtype if rest_dtype is None or way != "pivoted" else getattr(torch, rest_dtype)
            rests = [Rest(stream.rest.weight, self.weights[stream.others], torch.promote_types(dtype, finer))]
            largest = rests[0].largest(passed_weights)
            if extra:
                rests.append(Rest(torch.cat(extra, 1), self.extra_weights, dtype))
            numbers = max([written, *(max_abs(rest.matrix) for rest in rests if rest.matrix.numel())])
            fits = numbers <= torch.finfo(dtype).max
            errors[name] = self._fused(stream, rests, metric, name) if fits else lost
        return Way(basis.condition, largest, errors)

    def _fused(self, stream: Stream, rests: Sequence[Rest], metric: Tensor, dtype: str) -> dict[str, float]:
        """Relative errors of q, k, v (and logits); metric: E[x^T x] of the closed seam's stream."""
        unit, floor = _precision(dtype)
        biases = [writer.bias for writer in stream.writers.values() if writer.bias is not None]
        power = sum((bias.square() for bias in biases), torch.zeros_like(metric[0]))
        rest_bias = stream.rest.bias
        if getattr(torch, dtype) in HALF:
            passed, others, matrix = self._shaped(rests, self.weights[stream.kept], metric, dtype)
            if rest_bias is not None:  # as round_stream has it make up for the writers'
                rest_bias = rest_bias + sum((bias @ (stream.rest.weight - matrix) for bias in biases), 0)
        else:
            passed = unit**2 * (metric.diagonal() + floor * (metric.diagonal() > 0))
            noise = [_noise(metric.diagonal() + power, rest.matrix, floor) for rest in rests]
            others = unit**2 * torch.cat(noise, 1).sum(0)
        passed = passed + unit**2 * power
        own, extra = others[: len(stream.others)], others[len(stream.others) :]
        if rest_bias is not None:
            own = own + unit**2 * rest_bias.square()
        squares = torch.cat([torch.cat([passed, own])[torch.cat([stream.kept, stream.others]).argsort()], extra])
        parts = squares.split([reader.shape[1] for reader in self.outputs.values()])
        return {
            name: _relative(part.sum().item(), self.powers[name])
            for name, part in zip(self.outputs, parts, strict=True)
        }

    def _shaped(
        self, rests: Sequence[Rest], passed_weights: Tensor, metric: Tensor, dtype: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Squared errors of the passed and the rests' columns after rounding.round_seam, as means over PROBES samples;
        and the first rest as it is before it is rounded.

        The stream's error, in rows rounded under M, and the rests', U, in columns rounded under N and shrunk, are
        independent. Re-solving X spreads U: with T = W_r R^T M^-1, U T goes to the passed columns, U (1 - T R) stays.
        A rest in fp32 is not rounded but solved for last, which leaves a part of what the stream's error does to it.
        """
        generator = torch.Generator().manual_seed(0)

        def noise(sizes: Tensor) -> Tensor:
            drawn = torch.randn(PROBES, len(sizes), generator=generator, dtype=sizes.dtype, device="cpu")
            return drawn.to(sizes.device) * sizes

        power, (unit, floor) = metric.diagonal(), _precision(dtype)
        shrunk = [shrink(rest, metric, passed_weights) if rest.dtype in HALF else rest for rest in rests]
        after, before = (torch.cat([rest.matrix for rest in each], 1) for each in (shrunk, rests))
        left = left_by_solving(self.writers)
        weights = repaired_weights(rests, left)
        under = factorize(joint_metric(after, passed_weights, weights), power)
        written = under.feedback(noise(unit * (power + floor * (power > 0)).sqrt()))
        down = factorize(metric, (after**2).mean(1))
        read = []
        for rest in shrunk:
            if rest.dtype not in HALF:
                read.append(rest.matrix.new_zeros(PROBES, rest.matrix.shape[1]))
                continue
            for block in rest.blocks():
                entries = block.matrix[down.order] ** 2
                sizes = unit * (down.pivots @ (entries + floor * (entries > 0))).sqrt()
                read.append(along_rows(block, passed_weights).feedback(noise(sizes)))
        streams = torch.empty_like(written)
        streams[:, down.order] = noise(down.pivots.sqrt()) @ down.upper.T  # with E[x^T x] = metric
        error = torch.cat(read, 1) + streams @ (after - before)
        moved = under.solve(after @ (error * weights).T).T
        others = ((error + (written - moved) @ after) ** 2).mean(0)
        solved = [others.new_full((rest.matrix.shape[1],), 1.0 if rest.dtype in HALF else left) for rest in rests]
        return ((written + moved) ** 2).mean(0), others * torch.cat(solved), shrunk[0].matrix


def _precision(dtype: str) -> tuple[float, float]:
    """A dtype's relative rounding error, and the square below which it is an absolute one."""
    kind = getattr(torch, dtype)
    return rounding_error(kind), subnormal_power(kind)


def _noise(power: Float[Tensor, "d"], matrix: Float[Tensor, "d r"], floor: float) -> Float[Tensor, "d r"]:
    """What rounding adds to the mean squares of x A, entry by entry of A, in units of the squared rounding error.

    power: mean squares of x's columns. Zeros are stored exactly.
    """
    squares = matrix**2
    x = (power + floor * (power > 0))[:, None]
    return x * squares + power[:, None] * (squares + floor * (squares > 0))


def _reach(left: Float[Matrix, "n d"], right: Float[Tensor, "d m"]) -> float:
    """Max |A B|; a bound of it where that is below the largest number of every dtype."""
    power = max(squares(left[rows], 1).max() for rows in blocks(left))
    bound = (power * squares(right, 0).max()).sqrt()
    if bound <= torch.finfo(torch.float16).max:
        return bound.item()
    return max(max_abs(product(left[rows], right, torch.float64)) for rows in blocks(left))


def _cast(affine: Affine, dtype: torch.dtype) -> Affine:
    """A map as it is stored."""
    bias = None if affine.bias is None else affine.bias.to(dtype).double()
    return Affine(affine.weight.to(dtype), bias)


def _rows(affine: Affine, rows: Tensor) -> Affine:
    return dataclasses.replace(affine, weight=affine.weight[rows])


def _parts(writer: Affine, share: float) -> tuple[Float[Tensor, "n d"], Float[Tensor, "d"]]:
    """What a writer writes of its inputs, and of its bias, of which the stream has a share."""
    weight = writer.weight.double()
    return weight, weight.new_zeros(weight.shape[1]) if writer.bias is None else share * writer.bias


def _sum(writers: Sequence[Affine], shares: Sequence[float]) -> Float[Tensor, "n d"]:
    """A stream that each of these writes a row of, with its share of their biases."""
    parts = [_parts(writer, share) for writer, share in zip(writers, shares, strict=True)]
    return torch.stack([weight + offset for weight, offset in parts]).sum(0)


def _probes(size: int, like: Tensor) -> Float[Tensor, "n size"]:
    """Unit vectors, orthogonal if there are enough of them to be: the mean of x^2 over a sample, and exactly over all.

    Their squares in any quadratic form average to its trace over `size`.
    """
    drawn = torch.randn(
        size, min(size, PROBES), generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
    )
    return torch.linalg.qr(drawn.to(like.device)).Q.T


def _mean_square(outputs: Float[Tensor, "n r"]) -> float:
    """Of a row, the sum of its squares, on average."""
    return outputs.square().sum(1).mean().item()


def _relative(square: float, total: float) -> float:
    """The root of an error's square as part of what it is an error of; of nothing (all weights are 0), nothing."""
    return (square / total) ** 0.5 if total > 0 else 0.0


def letter(name: str) -> str:
    """The paper's name of a matrix, or of what it gives, in lower case: q of model.layers.0.self_attn.q_proj, p of
    o_proj, m of what reads the FFN's input.
    """
    letters = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "p", "lm_head": "logits"}
    return letters.get(name.rpartition(".")[2], "m")

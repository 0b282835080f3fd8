"""Store a closed seam in bf16 or fp16 with the least error: round with feedback, and re-solve what is still free.

docs/half-precision.md explains it with the same letters and the same steps. In row vectors:

    X = O S    (n, d)   the writer; its rows are the stream x
    R          (d, r)   the rest, S^-1 A_r: a reader gets [x | x R]. Both are rounded; plainly, R multiplies X's error
    X', R'              what is stored in their place
    W_b, W_r            diagonal: what a squared error counts in each passed column, and in each column of the rest
                        (passed_weights, rest_weights)
    u                   the relative error of rounding to the dtype (rounding_error)
    G = E[x^T x]        what an error costs down a column of R: X^T X / n (moment)
    N                   what it costs along a row, once X is re-solved: (W_r^-1 + R^T W_b^-1 R)^-1 (repaired_metric)
    H                   what an error in the stream costs in all columns: W_b + R' W_r R'^T (joint_metric)

The steps (the basis S, step 1, is chosen before: basis.pivot):

    2. shrink: R is replaced by what is best to multiply by when X and R will both be off by u,
       argmin over R' of || X (R' - R) ||^2 / n + 2 u^2 || diag(G)^1/2 R' ||^2. (A pivoted R is small: it stays.)
    3. round_rest: R is rounded with feedback, under G down its columns and under N along its rows. With E = R' - R,
       tr(G E N E^T) = min over X' of || [X' - X | X' R' - X R] ||^2 / n, weighted: what step 4 cannot repair.
    4. round_seam: X is re-solved for the rounded R', X' = (X W_b + X R W_r R'^T) H^-1.
    5. round_rows: X' is rounded row by row with feedback under H.
    6. solve_rest: an R that is kept in fp32 or fp64 skips step 3, and is re-solved for the rounded X' instead.

Feedback. With a metric H = L D L^T (Metric), L unit upper triangular, tr(E H E^T) = sum_j D_j |(E L)_j|^2. Columns are
rounded from first to last, and each makes up for the errors of those before it (LDL^T rounding, arXiv:2307.13304;
GPTQ, arXiv:2210.17323). In two directions, G = Lg Dg Lg^T and N = Ln Dn Ln^T,
tr(G E N E^T) = sum_ij Dg_i Dn_j (Lg^T E Ln)_ij^2, and entry (i, j) makes up for all (a <= i, b <= j) before it.

Where rows of a writer become the identity, x [I; R] A, it is the same turned around: R is rounded with feedback under
E[x^T x] and A A^T, and A is re-solved for the rounded R' (round_passed). Then A is rounded under the moment of what it
reads (round_reader).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from skipless.algebra.affine import Affine, read
from skipless.algebra.linalg import HALF, blocks, cholesky, gram, inverse, multiply, slices, solve_triangular, squares
from skipless.algebra.rows import Matrix, Rows
from skipless.algebra.stream import Stream
from skipless.errors import InputError

# Within rows of X that are rounded together, errors are passed on at once from so many columns, by bf16 products from
# so many on.
LEAF, COARSE = 8, 256
# Columns of R under one metric N: bounds N (a tied table's readers are as many as the FFN is wide).
COLUMNS = 4096
# Side of the tiles that R is rounded in, along anti-diagonals: 2 (d + r) steps, each on up to r entries; and how many
# tiles get what they owe from one product, as long as the longest of them needs.
TILE, GROUP = 48, 12
# While the scaled |R| stays below this, directions of X that fp32 cannot see (1e-7 of its power) do not matter in k or
# v either: G may be summed in fp32, at twice the speed, and R need not be shrunk. (Pivoted bases keep |R| <= 1.05.)
SMALL_REST = 2
# A larger R is shrunk by V (step 2), which for bf16 is far above fp32's 1e-7 of G; not so for an R beyond this.
MODERATE_REST = 100
# While H's mean diagonal is less than so many times the least of W_b, fp32's 1e-7 of it is nothing beside W_b.
EVEN_METRIC = 1e4
# X change (round_seam) is computed in bf16 where that adds to the loss less than this part of what rounding X adds.
NEGLIGIBLE = 0.01
# A metric is damped by so many eps of its mean diagonal, below which its dtype cannot tell directions apart; and by
# more, step by step, if it still has no Cholesky factor.
DAMPING = 50
DAMPING_STEP, DAMPING_STEPS = 100, 6
# With fewer rows in X than dimensions, solving for the rest last leaves nothing; the weights stay positive.
LEAST_LEFT = 1e-3
# Rounding an entry m 2^k, 1 <= m < 2, is an error of at most eps 2^k / 2, evenly spread: rms eps / (m sqrt(12)) of it;
# with m spread evenly over the logarithm, E[1 / m^2] = 3 / (8 ln 2).
RMS = (3 / (8 * math.log(2)) / 12) ** 0.5


def rounding_error(dtype: torch.dtype) -> float:
    """Root mean square relative error of storing numbers in `dtype`."""
    return RMS * torch.finfo(dtype).eps


def subnormal_power(dtype: torch.dtype) -> float:
    """The square below which numbers are rounded as if they were that large: to multiples of the smallest subnormal."""
    return (torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps) ** 2 / 12 / rounding_error(dtype) ** 2


@dataclass(frozen=True)
class Metric:
    """A metric H = L diag(D) L^T: what an error e of a row costs is e H e^T.

    order: order[k] is the column that is rounded k-th; L and D are of H in that order. upper: L. pivots: D.
    """

    order: Int[Tensor, "n"]
    upper: Float[Tensor, "n n"]
    pivots: Float[Tensor, "n"]

    def to(self, dtype: torch.dtype) -> "Metric":
        """The same in another precision."""
        return Metric(self.order, self.upper.to(dtype), self.pivots.to(dtype))

    def solve(self, right: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
        """H^-1 right."""
        half = solve_triangular(self.upper, right[self.order], upper=True, unit=True)
        half /= self.pivots[:, None]
        solution = torch.empty_like(right)
        solution[self.order] = solve_triangular(self.upper.T, half, upper=False, unit=True)
        return solution

    def feedback(self, noise: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        """E = Z L^-1, the errors of rows rounded under H, of the errors Z that each column's own rounding makes."""
        errors = torch.empty_like(noise)
        errors[:, self.order] = torch.linalg.solve_triangular(
            self.upper, noise[:, self.order], upper=True, left=False, unitriangular=True
        )
        return errors


@dataclass(frozen=True)
class Grid:
    """What each entry of a matrix, or of some of its rows, can become: origin + k step, k from low to high."""

    step: Float[Tensor, "..."]
    origin: Float[Tensor, "..."]
    low: int
    high: int

    @property
    def T(self) -> "Grid":  # noqa: N802 (torch's name)
        """That of the transposed matrix."""
        return Grid(self.step.T, self.origin.T, self.low, self.high)

    def __getitem__(self, rows: Any) -> "Grid":
        """That of some rows."""
        return Grid(self.step[rows], self.origin[rows], self.low, self.high)

    def places(self, matrix: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Which k is the nearest to each entry."""
        return ((matrix - self.origin) / self.step).round_().clamp_(self.low, self.high)

    def nearest(self, matrix: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Each entry as it is stored."""
        return self.places(matrix) * self.step + self.origin


@dataclass(frozen=True)
class Rest:
    """R, or another matrix that reads the stream in its new basis (a follower, a dual's transpose).

    weights: W_r's diagonal, what a squared error counts in each of its columns. dtype: in what it will be stored.
    """

    matrix: Float[Tensor, "d r"]
    weights: Float[Tensor, "r"]
    dtype: torch.dtype

    def to(self, dtype: torch.dtype) -> "Rest":
        """The same in another precision."""
        return Rest(self.matrix.to(dtype), self.weights.to(dtype), self.dtype)

    def blocks(self) -> list["Rest"]:
        """Its columns, COLUMNS at a time."""
        parts = zip(self.matrix.split(COLUMNS, 1), self.weights.split(COLUMNS), strict=True)
        return [Rest(matrix, weights, self.dtype) for matrix, weights in parts]

    def largest(self, passed_weights: Float[Tensor, "d"]) -> float:
        """Max |W_b^-1/2 R W_r^1/2|: each row and column scaled by what errors count there."""
        if not self.matrix.shape[1]:
            return 0.0
        rows = (self.matrix * self.weights.sqrt()).abs_().amax(1)
        return (rows / passed_weights.sqrt()).max().item()


def round_stream(
    stream: Stream,
    weights: Float[Tensor, "m"],
    extra_weights: Float[Tensor, "u"],
    dtypes: Mapping[str, torch.dtype],
) -> Stream:
    """A closed stream seam with every weight rounded to its dtype, and biases that make up for it.

    weights, extra_weights: what a squared error counts in each column of the readers, and of the duals' transposed
    weights and the followers (noise_weights). dtypes: of each writer, dual and follower, and of "rest". Modules in fp32
    or fp64 keep the precision that they have, and change only to make up for the others.
    """
    rests = [Rest(stream.rest.weight, weights[stream.others], dtypes["rest"])]
    extra = dict(stream.beside())
    sizes = [matrix.shape[1] for matrix in extra.values()]
    for (name, matrix), part in zip(extra.items(), extra_weights.split(sizes), strict=True):
        rests.append(Rest(matrix, part, dtypes[name]))
    # where the rest has a bias, it makes up for what becomes of the writers' biases; else those are rows like any other
    as_rows = stream.rest.bias is None
    rows = [
        torch.cat([writer.weight, writer.bias[None].to(writer.weight.dtype)])
        if as_rows and writer.bias is not None
        else writer.weight
        for writer in stream.writers.values()
    ]
    kinds = [dtypes[name] for name in stream.writers]
    seen = [stream.seen.get(name, len(rows)) for name in ("rest", *extra)]
    rounded, rounded_rests = round_seam(rows, rests, weights[stream.kept], kinds, seen)
    after_of = dict(zip(extra, rounded_rests[1:], strict=True))
    writers, bias = {}, stream.rest.bias
    biases = {name: follower.bias for name, follower in stream.followers.items()}
    for number, ((name, writer), after) in enumerate(zip(stream.writers.items(), rounded, strict=True)):
        if writer.bias is None:
            writers[name] = dataclasses.replace(writer, weight=after)
            continue
        writers[name] = dataclasses.replace(writer, weight=after[: len(writer.weight)])
        stored = (after[-1] if as_rows else writer.bias.to(dtypes[name])).to(writer.bias.dtype)
        writers[name] = dataclasses.replace(writers[name], bias=stored)
        share = stream.bias_shares[name] * writer.scale
        if bias is not None:
            if stream.reads("rest", number):
                bias = bias + share * (read(writer.bias, stream.rest.weight) - read(stored, rounded_rests[0]))
            for follower, own in biases.items():
                if own is not None and stream.reads(follower, number):
                    reader = stream.followers[follower]
                    lost = read(writer.bias, reader.weight) - read(stored, after_of[follower])
                    biases[follower] = own + share * reader.scale * lost
    duals = {name: dataclasses.replace(dual, weight=after_of[name].T) for name, dual in stream.duals.items()}
    followers = {
        name: dataclasses.replace(follower, weight=after_of[name], bias=biases[name])
        for name, follower in stream.followers.items()
    }
    rest = Affine(rounded_rests[0], bias)
    return dataclasses.replace(stream, writers=writers, rest=rest, duals=duals, followers=followers)


def noise_weights(power: Float[Tensor, "d"], readers: Sequence[Float[Tensor, "d _"]]) -> list[Float[Tensor, "_"]]:
    """What a squared error counts in each column of each reader: the inverse of what storing the original costs there.

    Rounding O and A to relative precision u makes the columns of x A wrong by 2 u^2 sum_i |x_i|^2 A_ij^2, here as the
    mean over the reader's columns. Weighted so, q, k and v lose alike, compared with the original in the same dtype.
    power: mean squares of x's columns.
    """
    noise = torch.stack([power @ squares(reader, 1) / reader.shape[1] for reader in readers])
    noise = noise.clamp(min=1e-12 * noise.max()).clamp(min=torch.finfo(noise.dtype).tiny)
    return [value.expand(reader.shape[1]) for value, reader in zip(noise.max() / noise, readers, strict=True)]


def round_seam(
    writers: Sequence[Float[Matrix, "_ d"]],
    rests: Sequence[Rest],
    passed_weights: Float[Tensor, "d"],
    dtypes: Sequence[torch.dtype],
    seen: Sequence[int] = (),
) -> tuple[list[Float[Matrix, "_ d"]], list[Float[Tensor, "d _"]]]:
    """The writers X (the stream is a sum of one row of each) and the rests R as they are best stored: steps 2 to 6.

    passed_weights: W_b's diagonal. dtypes: of each writer. seen: of how many of the writers, in their order, each rest
    reads the sum (all). A rest in fp32 or fp64 is not rounded but re-solved, after everything else.
    """
    half = all(dtype in HALF for dtype in dtypes)
    reads = list(seen) or [len(writers)] * len(rests)
    stored = [rest.matrix for rest in rests]
    if any(rest.dtype in HALF for rest in rests):
        kind = _metric_dtype(rests, passed_weights, half)
        first, *later = sorted({len(writers), *reads})
        g = moment(writers[:first], kind)
        for count in (first, *later):  # what is read later must suit what is read before, too
            if count > first:
                g.add_(moment(writers[:count], kind))
            for k, rest in enumerate(rests):
                if rest.dtype in HALF and reads[k] == count:
                    stored[k] = round_rest(shrink(rest, g, passed_weights), g, passed_weights)  # steps 2 and 3
        power = g.diagonal().clone()
        del g
    else:
        power = mean_squares(writers)
    rest_weights = repaired_weights(rests, left_by_solving(writers))
    even = (_mean_diagonal(rests, passed_weights) <= EVEN_METRIC * passed_weights.min()).item()
    precise = torch.float32 if half and even else torch.float64
    rounded_rest = torch.cat([part.to(precise) for part in stored], 1)  # R'
    h = joint_metric(rounded_rest, passed_weights.to(precise), rest_weights.to(precise))
    metric = factorize(h, power)
    del h
    # step 4: X' = (X W_b + X R W_r R'^T) H^-1 = X + X change, change = (R - R') W_r R'^T H^-1
    solved = metric.solve(rounded_rest * rest_weights.to(precise)).T  # W_r R'^T H^-1
    lost = torch.cat([(rest.matrix - part).to(precise) for rest, part in zip(rests, stored, strict=True)], 1)  # R - R'
    change = multiply(lost, solved)
    del rounded_rest, lost, solved
    # step 5
    rounded = [round_rows(writer, change, metric, dtype, power) for writer, dtype in zip(writers, dtypes, strict=True)]
    for k, rest in enumerate(rests):  # step 6
        if rest.dtype not in HALF:
            stored[k] = solve_rest(writers, rounded, rest.matrix)
    return rounded, stored


def round_passed(
    rest: Float[Tensor, "l s"],
    readers: Sequence[Float[Tensor, "_ s"]],
    moment: Float[Tensor, "n n"] | None,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "l s"], list[Float[Tensor, "_ s"]], Float[Tensor, "s s"]]:
    """R of x [I; R] A as it is best stored in `dtype`, the A that suit it, and the moment of y = x [I; R'].

    readers: A^T of each. moment: E[x^T x], with n = s + l, the entries that are passed first (None: the identity).
    R in fp32 or fp64 is not rounded.
    """
    size, stored = rest.shape[1], rest
    if dtype in HALF and len(rest):
        along = factorize(torch.stack([gram(reader) for reader in readers]).sum(0), (rest**2).mean(0))  # A A^T
        if moment is None:
            stored = round_rows(rest, torch.zeros_like(along.upper), along, dtype, (rest**2).mean(0))
        else:
            stored = round_both_ways(rest, factorize(moment[size:, size:], squares(rest, 1)), along, dtype)
    # A' = argmin || x [I; R'] A' - x [I; R] A || = A + E[y^T y]^-1 E[y^T x] [0; R - R'] A
    after, lost = stored.double(), rest - stored.double()
    read = passed_moment(after, moment)
    crossed = after.T if moment is None else moment[:size, size:] + after.T @ moment[size:, size:]  # of E[y^T x]
    power = torch.stack([squares(reader, 0) for reader in readers]).sum(0)
    change = factorize(read, power).solve(crossed @ lost).T
    return stored, [reader + reader @ change for reader in readers], read


def round_reader(
    matrix: Float[Tensor, "f n"],
    moment: Float[Tensor, "blocks s s"],
    dtype: torch.dtype,
    mean: Float[Tensor, "n"] | None = None,
    bias: Float[Tensor, "f"] | None = None,
) -> Float[Tensor, "f n"]:
    """A^T of y A + a, rounded with feedback under the moment of y, one block of y's entries after the other.

    moment, mean: C, the covariance of y, in blocks, and its mean m. bias: a, which will be stored in `dtype`, too, and
    makes up for what becomes of m. If both are known, and if it costs less, a is rounded first: that adds e to all that
    is read, and A makes up for it. Of all changes of A, -C^-1 m^T e / (1 + m C^-1 m^T) leaves the least. Later blocks
    make up for what rounding a block does to m, too.
    """
    size, power = moment.shape[1], squares(matrix, 0)
    knows = mean if bias is not None and dtype in HALF else None
    metrics, ways, _ = reader_metrics(moment, power, knows, 0.0 if bias is None else bias.square().sum().item())
    parts = list(zip(matrix.split(size, 1), metrics, power.split(size), strict=True))
    still = torch.zeros_like(moment[0])
    if ways is None or mean is None or bias is None:
        return torch.cat([round_rows(part, still, metric, dtype, own) for part, metric, own in parts], 1)
    means, rounded = mean.split(size), []
    owed = bias.to(dtype).double() - bias
    left = 1 + sum((at @ way).item() for at, way in zip(means, ways, strict=True))
    for (part, metric, own), at, way in zip(parts, means, ways, strict=True):
        rounded.append(round_rows(part - torch.outer(owed, way / left), still, metric, dtype, own))
        owed = owed + (rounded[-1].double() - part) @ at
        left -= (at @ way).item()
    return torch.cat(rounded, 1)


def reader_metrics(
    moment: Float[Tensor, "blocks s s"], power: Float[Tensor, "n"], mean: Float[Tensor, "n"] | None, bias: float
) -> tuple[list[Metric], list[Float[Tensor, "s"]] | None, float]:
    """The metrics of A's blocks in y A + a, the ways C^-1 m to make up for a, or None, and what it costs, in u^2.

    moment, mean: as for round_reader. power, bias: sums of squares, of A's rows, and of a. If a is rounded last, it
    costs what it loses, and the metrics are C; if first, 1 / (1 + m C^-1 m^T) of that, and they are C + m^T m.
    """
    powers = power.split(moment.shape[1])
    metrics = [factorize(own, each) for own, each in zip(moment, powers, strict=True)]
    cost = _cost(metrics, powers) + bias
    if mean is None or not bias:
        return metrics, None, cost
    means = mean.split(moment.shape[1])
    first = [factorize(own + torch.outer(at, at), each) for own, at, each in zip(moment, means, powers, strict=True)]
    ways = [_toward(metric, at) for metric, at in zip(first, means, strict=True)]
    shared = _cost(first, powers) + bias / (1 + sum((at @ way).item() for at, way in zip(means, ways, strict=True)))
    return (first, ways, shared) if shared < cost else (metrics, None, cost)


def _cost(metrics: Sequence[Metric], powers: Sequence[Float[Tensor, "s"]]) -> float:
    """What rounding with feedback costs, in u^2. powers: sums of squares of the columns that are rounded."""
    return sum((each.pivots @ power[each.order]).item() for each, power in zip(metrics, powers, strict=True))


def _toward(metric: Metric, mean: Float[Tensor, "s"]) -> Float[Tensor, "s"]:
    """C^-1 m, of the factors of C + m^T m."""
    way = metric.solve(mean[:, None])[:, 0]
    return way / max(1 - (mean @ way).item(), torch.finfo(way.dtype).eps)


def passed_moment(rest: Float[Tensor, "l s"], moment: Float[Tensor, "n n"] | None) -> Float[Tensor, "s s"]:
    """E[y^T y] of y = x [I; R], with E[x^T x] = moment (None: the identity)."""
    size = rest.shape[1]
    if moment is None:
        read = gram(rest)
        read.diagonal().add_(1)
        return read
    mixed = moment[:size, size:] @ rest
    return moment[:size, :size] + mixed + mixed.T + rest.T @ moment[size:, size:] @ rest


def _metric_dtype(rests: Sequence[Rest], passed_weights: Tensor, half: bool) -> torch.dtype:
    """The precision of G: fp32 where its 1e-7 of G is nothing beside what R will be off by, or what R is shrunk by."""
    coarse = all(rest.dtype == torch.bfloat16 for rest in rests if rest.dtype in HALF)
    largest = max(rest.largest(passed_weights) for rest in rests)
    return torch.float32 if half and largest <= (MODERATE_REST if coarse else SMALL_REST) else torch.float64


def _mean_diagonal(rests: Sequence[Rest], passed_weights: Tensor) -> Tensor:
    """The mean of H's diagonal, W_b + R W_r R^T."""
    parts = [squares(rest.matrix, 0) @ rest.weights for rest in rests if rest.matrix.numel()]
    return passed_weights.mean() + sum(parts, passed_weights.new_zeros(())) / len(passed_weights)


def left_by_solving(writers: Sequence[Float[Matrix, "_ d"]]) -> float:
    """Of a rest's squared errors, the part that solving for it last leaves: n rows of X span d of n dimensions."""
    rows = sum(len(writer) for writer in writers)
    return max(1 - writers[0].shape[1] / rows, LEAST_LEFT)


def repaired_weights(rests: Sequence[Rest], left: float) -> Float[Tensor, "r"]:
    """What an error of the stream costs in each column of the rests: less where the rest is solved for last."""
    return torch.cat([rest.weights if rest.dtype in HALF else rest.weights * left for rest in rests])


def shrink(rest: Rest, metric: Float[Tensor, "d d"], passed_weights: Float[Tensor, "d"]) -> Rest:
    """Step 2: (G + V)^-1 G R = R - (G + V)^-1 V R, V = 2 u^2 diag(G), the noise that X and R will have. metric: G.

    A small R stays as it is.
    """
    if rest.largest(passed_weights) <= SMALL_REST:
        return rest
    noise = 2 * rounding_error(rest.dtype) ** 2 * metric.diagonal().double()  # V
    ridge = metric.to(torch.float64, copy=True)  # G + V
    ridge.diagonal().add_(noise)
    lost = solve_root(_root(ridge), noise[:, None] * rest.matrix)
    return dataclasses.replace(rest, matrix=rest.matrix - lost)


def round_rest(rest: Rest, metric: Float[Tensor, "d d"], passed_weights: Float[Tensor, "d"]) -> Float[Tensor, "d r"]:
    """Step 3: R', R rounded under G (metric) and N, COLUMNS at a time."""
    if not rest.matrix.shape[1]:
        return rest.matrix
    rest, passed_weights = rest.to(metric.dtype), passed_weights.to(metric.dtype)
    rows = factorize(metric, squares(rest.matrix, 1))
    return torch.cat(
        [
            round_both_ways(block.matrix, rows, along_rows(block, passed_weights), block.dtype)
            for block in rest.blocks()
        ],
        1,
    )


def along_rows(rest: Rest, passed_weights: Float[Tensor, "d"]) -> Metric:
    """N, factorized: what an error costs along a row of R."""
    return factorize(repaired_metric(rest.matrix, passed_weights, rest.weights), (rest.matrix**2).mean(0))


def moment(writers: Sequence[Float[Matrix, "_ d"]], dtype: torch.dtype = torch.float64) -> Float[Tensor, "d d"]:
    """G = E[x^T x] of a stream x that is the sum of one row of each writer, every row as likely as any other."""
    total, means = None, None
    for writer in writers:
        part = gram(writer, dtype).div_(len(writer))
        total = part if total is None else total.add_(part)
        if len(writers) > 1:
            mean = _mean(writer, lambda rows: rows.sum(0, dtype=dtype))
            if means is not None:
                total += torch.outer(means, mean) + torch.outer(mean, means)
            means = mean if means is None else means + mean
    assert total is not None
    return total


def mean_squares(writers: Sequence[Float[Matrix, "_ d"]]) -> Float[Tensor, "d"]:
    """What the writers' columns add to the stream's mean square."""
    return torch.stack([_mean(writer, lambda rows: squares(rows, 0)) for writer in writers]).sum(0)


def mean_row(matrix: Float[Matrix, "n d"]) -> Float[Tensor, "d"]:
    """The mean of all rows."""
    return _mean(matrix, lambda rows: rows.sum(0, dtype=torch.float64))


def _mean(matrix: Float[Matrix, "n d"], sums: Callable[[Tensor], Tensor]) -> Float[Tensor, "d"]:
    """Of all rows; sums: of a few of them."""
    return torch.stack([sums(matrix[rows]) for rows in blocks(matrix)]).sum(0) / len(matrix)


def joint_metric(rest: Tensor, passed_weights: Tensor, rest_weights: Tensor) -> Float[Tensor, "d d"]:
    """H = W_b + R W_r R^T: what an error in the stream costs in the passed and the rest columns together."""
    metric = gram((rest * rest_weights.sqrt()).T.contiguous())
    metric.diagonal().add_(passed_weights)
    return metric


def repaired_metric(rest: Tensor, passed_weights: Tensor, rest_weights: Tensor) -> Float[Tensor, "r r"]:
    """N = (W_r^-1 + R^T W_b^-1 R)^-1."""
    metric = gram((rest / passed_weights.sqrt()[:, None]).contiguous())
    metric.diagonal().add_(1 / rest_weights)
    return inverse(_root(metric))


def solve_rest(
    exact: Sequence[Float[Matrix, "_ d"]], rounded: Sequence[Float[Matrix, "_ d"]], rest: Float[Tensor, "d r"]
) -> Float[Tensor, "d r"]:
    """Step 6: argmin over R' of || X' R' - X R ||, as R + (X'^T X')^-1 X'^T (X - X') R: the difference is solved for.

    X is a stream like that of `moment`: a sum of one row of each writer.
    """
    owed, afters, lost = torch.zeros_like(rest), [], []
    for before, after in zip(exact, rounded, strict=True):
        for rows in blocks(after):
            now = after[rows].to(rest.dtype)
            gone = multiply(before[rows].to(rest.dtype) - now, rest)
            owed += multiply(now.T, gone) / len(after)
        afters.append(mean_row(after).to(rest.dtype))
        lost.append((mean_row(before).to(rest.dtype) - afters[-1]) @ rest)
    for k, after in enumerate(afters):
        for other, value in enumerate(lost):
            if other != k:
                owed += torch.outer(after, value)
    return rest + solve_root(_root(moment(rounded)), owed)


def solve_root(root: Float[Tensor, "n n"], right: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """(L L^T)^-1 right."""
    return solve_triangular(root.T, solve_triangular(root, right, upper=False), upper=True)


def _root(metric: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Cholesky's L, H = L L^T, of a metric as little damped as it takes; in fp64 if fp32 has none."""
    eps, tiny = torch.finfo(metric.dtype).eps, torch.finfo(metric.dtype).tiny
    damping = metric.diagonal().mean() * DAMPING * eps + tiny
    for dtype in [metric.dtype, *[torch.float64] * DAMPING_STEPS]:
        damped = metric.to(dtype, copy=True)
        damped.diagonal().add_(damping)
        root = cholesky(damped)
        if root is not None:
            return root.to(metric.dtype)
        del damped
        if dtype == torch.float64:
            damping = damping.double() * DAMPING_STEP
    raise InputError("weights: expected numbers whose squares can be summed, found larger ones; scale the model down")


def factorize(metric: Float[Tensor, "n n"], power: Float[Tensor, "n"]) -> Metric:
    """Factorize a metric H = L D L^T; power: mean squares of the columns that are rounded under it.

    A column's rounding error grows with its numbers. The last column can pass its error on to no other, so the one
    whose error costs least, H_jj power_j, goes last (GPTQ's act-order).
    """
    order = (metric.diagonal() * power).argsort(descending=True, stable=True)
    backwards = order.flip(0)
    root = _root(metric[backwards][:, backwards]).flip(0, 1)  # H = root root^T, upper triangular
    diagonal = root.diagonal().clone()
    return Metric(order, root.div_(diagonal), diagonal**2)


def round_rows(
    matrix: Float[Matrix, "n d"],
    change: Float[Tensor, "d d"],
    metric: Metric,
    dtype: torch.dtype,
    power: Float[Tensor, "d"],
) -> Float[Matrix, "n d"]:
    """Step 5: X' = X + X change, rounded to `dtype` with feedback under `metric`, or as precise as X if that is finer.

    Each row is rounded by itself; those of Rows, when they are asked for. Where X itself is no more precise than fp32,
    small terms may be in bf16. power: mean squares of the stream's columns.
    """
    half, quick = dtype in HALF, matrix.dtype == torch.float32
    kept = dtype if half else matrix.dtype
    within = torch.bfloat16 if half and quick and _is_small(change, power, metric, dtype) else matrix.dtype
    moved, upper = change[:, metric.order].T.to(within).contiguous(), metric.upper.float()
    coarse = upper.bfloat16() if quick and dtype == torch.bfloat16 else upper  # fp16 would feel it

    def rounded(exact: Tensor, into: Tensor) -> Tensor:
        exact = exact.T
        block = exact[metric.order]
        block += multiply(moved, exact.to(within).contiguous())
        if half:
            error, owed = torch.empty_like(block, dtype=upper.dtype), torch.zeros_like(block, dtype=upper.dtype)
            exact, block = block, torch.empty_like(block, dtype=dtype)
            _round_block(exact, block, upper, coarse, error, owed)
        into.T[metric.order] = block
        return into

    if isinstance(matrix, Rows):
        return matrix.map(lambda rows: rounded(rows, torch.empty_like(rows, dtype=kept)), matrix.shape[1], kept)
    result = torch.empty_like(matrix, dtype=kept)
    for rows in blocks(matrix):
        rounded(matrix[rows], result[rows])
    return result


def _is_small(change: Float[Tensor, "d d"], power: Float[Tensor, "d"], metric: Metric, dtype: torch.dtype) -> bool:
    """Whether X change can be computed in bf16: its two factors and itself are then each off by bf16's u.

    No feedback makes up for that error, so it costs H's diagonal. What is rounded with feedback costs the pivots D.
    """
    order = metric.order  # of what follows
    added = 3 * rounding_error(torch.bfloat16) ** 2 * (power.to(change.dtype) @ change.square())[order].double()
    costs = metric.upper.square().double() @ metric.pivots.double()  # diag(L D L^T)
    return bool(
        added @ costs <= NEGLIGIBLE * rounding_error(dtype) ** 2 * (power[order].double() @ metric.pivots.double())
    )


def _round_block(
    exact: Float[Tensor, "d n"],
    rounded: Float[Tensor, "d n"],
    upper: Float[Tensor, "d d"],
    coarse: Float[Tensor, "d d"],
    error: Float[Tensor, "d n"],
    owed: Float[Tensor, "d n"],
    grid: Grid | None = None,
) -> None:
    """Round X^T row by row, first to last, by halves: x_j' = round(x_j - sum over i < j of L_ij e_i), e = x' - x.

    error: e. owed: the sum, as far as it is known; a row's turn come, it is overwritten with what is to be rounded.
    upper: L. Both are fp32, which is enough for corrections this small. coarse: L in the precision in which many errors
    are passed on at once: even bf16's 2^-9 of what is owed is small beside what rounding a row adds. grid: X^T's (None:
    `rounded` has the dtype to round to).
    """
    size = len(exact)
    if size <= LEAF:
        wanted = torch.sub(exact, owed, out=owed)
        for k in range(size):
            if k:
                wanted[k : k + 1].addmm_(upper[:k, k : k + 1].T, error[:k], alpha=-1)
            rounded[k] = wanted[k] if grid is None else grid[k].nearest(wanted[k])
            torch.sub(rounded[k], exact[k], out=error[k])
        return

    def round_part(part: slice) -> None:
        own = None if grid is None else grid[part]
        _round_block(exact[part], rounded[part], upper[part, part], coarse[part, part], error[part], owed[part], own)

    first, last = slice(0, size // 2), slice(size // 2, size)
    round_part(first)
    if size >= COARSE:
        owed[last] += multiply(coarse[first, last].T, error[first].to(coarse.dtype))
    else:
        owed[last].addmm_(upper[first, last].T, error[first])
    round_part(last)


def round_to_grid(matrix: Float[Tensor, "n d"], grid: Grid, metric: Metric) -> Float[Tensor, "n d"]:
    """Each row on the grid, rounded with feedback under a metric."""
    upper, order = metric.upper.to(matrix.dtype), metric.order
    exact = matrix.T[order]
    rounded, error, owed = torch.empty_like(exact), torch.empty_like(exact), torch.zeros_like(exact)
    _round_block(exact, rounded, upper, upper, error, owed, grid.T[order])
    result = torch.empty_like(matrix)
    result.T[order] = rounded
    return result


def round_both_ways(
    matrix: Float[Tensor, "d r"], rows: Metric, columns: Metric, dtype: torch.dtype
) -> Float[Tensor, "d r"]:
    """Round to `dtype` with feedback down the columns (metric `rows`, G) and along the rows (metric `columns`, N).

    R'_ij = round(R_ij - sum over (a, b) before (i, j) of Lg_ai E_ab Ln_bj), E = R' - R, Lg and Ln the factors of G and
    N. Entry (i, j) waits for all (a <= i, b <= j), so the tiles (p, q) of an anti-diagonal are rounded together, and
    within the tiles the entries of an anti-diagonal. Tile columns are kept last to first: those of an anti-diagonal of
    tiles then lie in memory as its tile rows do, and products need no copies.
    """
    (d, r), device = matrix.shape, matrix.device
    down, across = -(-d // TILE), -(-r // TILE)
    exact = _pad(matrix[rows.order][:, columns.order], down, across)
    exact = exact.view(down, TILE, across, TILE).transpose(1, 2).contiguous()  # (p, q, i, j)
    lg = _column_blocks(_pad(rows.upper.float(), down, down))  # (p, d, j)
    ln = _column_blocks(_pad(columns.upper.float(), across, across)).flip(0)  # (-q, r, j)
    p, q = torch.arange(down, device=device), torch.arange(across, device=device)
    own_g = lg.view(down, down, TILE, TILE)[p, p]
    own_n = ln.view(across, across, TILE, TILE)[across - 1 - q, q]
    rounded = torch.empty_like(exact, dtype=dtype)
    error = torch.zeros(across, down * TILE, TILE, dtype=torch.float32, device=device)  # E: (-q, i, j)
    mixed = torch.zeros(down, TILE, across * TILE, dtype=torch.float32, device=device)  # Lg^T E: (p, i, j)
    error_tiles, mixed_tiles = error.view(across, down, TILE, TILE), mixed.view(down, TILE, across, TILE)
    for diagonal in range(down + across - 1):
        first, last = max(0, diagonal - across + 1), min(down, diagonal + 1)
        p = torch.arange(first, last, device=device)
        q = diagonal - p
        above, owed = torch.empty(2, last - first, TILE, TILE, dtype=torch.float32, device=device)
        groups = [(first + tiles.start, first + tiles.stop, tiles) for tiles in slices(last - first, GROUP)]
        backwards = across - 1 - diagonal
        for start, stop, tiles in groups:  # of Lg^T E, what the tiles above give
            up = slice(0, (stop - 1) * TILE)
            torch.bmm(lg[start:stop, up].mT, error[backwards + start : backwards + stop, up], out=above[tiles])
        mixed_tiles[p, :, q] = above
        for start, stop, tiles in groups:  # (Lg^T E) Ln, from the tiles to the left
            left = slice(0, (diagonal - start + 1) * TILE)
            torch.bmm(mixed[start:stop, :, left], ln[backwards + start : backwards + stop, left], out=owed[tiles])
        rounded[p, q], wrong, gained = _round_tiles(exact[p, q], owed, own_g[p], own_n[q], dtype)
        error_tiles[across - 1 - q, p] = wrong
        mixed_tiles[p, :, q] = above + gained
    result = torch.empty_like(matrix, dtype=dtype)
    result[rows.order[:, None], columns.order] = rounded.transpose(1, 2).reshape(down * TILE, -1)[:d, :r]
    return result


def _round_tiles(
    exact: Float[Tensor, "t i j"],
    owed: Float[Tensor, "t i j"],
    lg: Float[Tensor, "t i i"],
    ln: Float[Tensor, "t j j"],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "t i j"], Float[Tensor, "t i j"], Float[Tensor, "t i j"]]:
    """Round tiles, anti-diagonal by anti-diagonal: the rounded values R', their errors E, and Lg^T E.

    owed: what entries make up for because of other tiles. lg, ln: each tile's own block of Lg and of Ln.
    With columns last to first an anti-diagonal is a diagonal; its entries, of all tiles, are kept side by side.
    """
    size = exact.shape[1]
    places = torch.arange(size**2, device=exact.device).view(size, size).flip(1)
    order = torch.cat([places.diagonal(offset) for offset in range(size - 1, -size, -1)])
    down, across = lg.permute(2, 1, 0).contiguous(), ln.permute(2, 1, 0).flip(0, 1).contiguous()
    exact = exact.flatten(1).T[order]
    wanted = exact - owed.flatten(1).T[order]
    rounded, error = torch.empty_like(exact, dtype=dtype), torch.empty_like(exact, dtype=lg.dtype)
    mixed, stop = torch.zeros_like(down), 0
    for offset in range(size - 1, -size, -1):
        up, left = max(0, -offset), max(0, offset)  # above and left of which there is nothing of theirs
        i, j = slice(up, min(size, size - offset)), slice(left, min(size, size + offset))
        here = slice(stop, stop := stop + size - abs(offset))
        rounded[here] = wanted[here] - (mixed[i, left:] * across[j, left:]).sum(1)
        mixed[up:, j].addcmul_(down[up:, i], torch.sub(rounded[here], exact[here], out=error[here]))
    back = order.argsort()
    return rounded[back].T.reshape(lg.shape), error[back].T.reshape(lg.shape), mixed.flip(1).permute(2, 0, 1)


def _pad(matrix: Tensor, down: int, across: int) -> Tensor:
    """The matrix with zeros below and to the right, of whole tiles."""
    rows, columns = matrix.shape
    return torch.nn.functional.pad(matrix, (0, across * TILE - columns, 0, down * TILE - rows))


def _column_blocks(matrix: Tensor) -> Tensor:
    """(n, blocks * TILE) -> (blocks, n, TILE)."""
    return matrix.view(matrix.shape[0], -1, TILE).transpose(0, 1).contiguous()

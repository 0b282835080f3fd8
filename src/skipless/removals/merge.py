"""P merges into what reads it, where it writes a space alone: M* = P M, m* = p M + m (Fig. 2a of arXiv:2404.12362)."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from skipless.algebra.affine import Affine, past_norm, read
from skipless.algebra.forecast import PROBES, Forecast, Way, mean_square, precision_of, reach, relative
from skipless.algebra.linalg import HALF, block_rows, max_abs, precision, product, squares
from skipless.algebra.rounding import reader_metrics, round_reader
from skipless.algebra.tolerances import coarsest, dtype_name
from skipless.architecture.seams import Seam
from skipless.checkpoint.opening import Read
from skipless.removals.setting import Closed, Setting, Step

# The size of a merged matrix is right to a few per cent from this few inputs, as it has many outputs.
FEW_PROBES = 16


def close(seam: Seam, affines: dict[str, Affine], setting: Setting, read: Read) -> Closed:
    """Merge the writer into what reads it."""
    way = seam.way(setting.basis)
    dtypes = {name: setting.kept(name) for name in seam.readers}
    (scale,) = map(read, seam.mixed) if seam.mixed else (None,)
    remaining = merge(seam, affines, dtypes, scale)
    name = dtype_name(coarsest(setting.stored(name) for name in remaining))
    power = merged_power(seam, affines, FEW_PROBES)
    largest = max(max_abs(affine.weight) for affine in remaining.values())
    return remaining, None, merged(seam, affines, [name], power, largest).outcome(way, name)


def merge(
    seam: Seam,
    affines: Mapping[str, Affine],
    dtypes: Mapping[str, torch.dtype] | None = None,
    scale: Float[Tensor, "1"] | None = None,
) -> dict[str, Affine]:
    """Close a P-M seam, M* = P M, m* = a p M + m (Fig. 2a).

    affines: those of seam.modules; returns the readers. dtypes: in what each reader's weight is returned (fp64).
    scale: a, by which what P writes is multiplied before it is read (1), as the heads will be in its place.
    """
    (writer,) = (affines[name] for name in seam.writers)
    bias = writer.bias if writer.bias is None or scale is None else writer.bias * scale.to(writer.bias.dtype)
    merged = {}
    for name, reader in past_norm(seam, affines).items():
        weight, dtype = reader.weight, torch.float64 if dtypes is None else dtypes[name]
        carried = None if bias is None else read(bias, weight)
        if writer.moment is None or dtype not in HALF:
            moved = product(weight.T, writer.weight.T, dtype).T
        else:
            exact = product(weight.T, writer.weight.T, torch.float64)
            total = reader.with_bias(carried).bias
            moved = round_reader(exact, writer.moment, dtype, writer.mean, total).T
            if writer.mean is not None and carried is not None:  # any token's part is made up for
                carried = carried + read(writer.mean, exact.T) - read(writer.mean, moved)
        merged[name] = dataclasses.replace(reader, weight=moved).with_bias(carried)
    return merged


def forecast(
    seam: Seam,
    affines: Mapping[str, Affine],
    dtypes: Sequence[str],
    ways: Iterable[str] | None = None,
    rest_dtype: str | None = None,
    later: frozenset[str] = frozenset(),
) -> Forecast:
    """What merging will cost in each dtype."""
    (writer,) = (affines[name].weight for name in seam.writers)
    readers = [reader.weight for reader in past_norm(seam, affines).values()]
    power = merged_power(seam, affines, PROBES)
    return merged(seam, affines, dtypes, power, max(reach(writer, reader) for reader in readers))


def merged_power(seam: Seam, affines: Mapping[str, Affine], most: int) -> float:
    """Sum of squares of all M* = P M, from x P M of at most `most` sampled x: white, or of P's moment."""
    (writer,) = (affines[name] for name in seam.writers)
    weight, inputs = writer.weight, _probes(len(writer.weight), writer.weight)[:most]
    if writer.moment is not None:
        values, vectors = torch.linalg.eigh(writer.moment)
        roots = vectors * values.clamp(min=0).sqrt()[:, None, :]
        inputs = torch.einsum("nbi,bji->nbj", inputs.unflatten(1, (len(roots), -1)), roots).flatten(1)
    written = product(inputs, weight, torch.float64)
    readers = past_norm(seam, affines).values()
    return len(weight) * sum(mean_square(product(written, reader.weight, torch.float64)) for reader in readers)


def merged(seam: Seam, affines: Mapping[str, Affine], dtypes: Sequence[str], power: float, largest: float) -> Forecast:
    """The errors of x P M when P (D, d) and every M (d, f) are rounded, and when M* = P M is instead.

    power: sum of squares of all M*. largest: max |M*|, or a bound of it. Where x is not white, M* is rounded with
    feedback, and P has the bias that closing the values has left there.
    """
    (writer,) = (affines[name] for name in seam.writers)
    readers = past_norm(seam, affines).values()
    columns = sum(reader.weight.shape[1] for reader in readers)
    rows = None if writer.moment is None else _row_squares(seam, affines)
    biases = 0.0
    if writer.bias is not None:
        carried = [reader.with_bias(read(writer.bias, reader.weight)).bias for reader in readers]
        biases = sum(bias.square().sum().item() for bias in carried if bias is not None)
    errors = {}
    for dtype in dtypes:
        unit, floor = precision_of(dtype)
        lost = power + floor * len(writer.weight) * columns
        if writer.moment is not None and rows is not None:
            lost = (writer.moment.diagonal(dim1=1, dim2=2).flatten() @ rows).item() + biases
            if getattr(torch, dtype) in HALF:
                known = None if writer.bias is None else writer.mean
                _, _, lost = reader_metrics(writer.moment, rows + floor * columns, known, biases)
        lost = math.inf if largest > torch.finfo(getattr(torch, dtype)).max else lost
        errors[dtype] = {"m": unit * relative(lost, power)}
    original = {dtype: _unmerged(seam, affines, dtype, power) for dtype in dtypes}
    return Forecast(seam, original, {way: Way(None, None, errors) for way in seam.identities})


def _row_squares(seam: Seam, affines: Mapping[str, Affine]) -> Float[Tensor, "inputs"]:
    """Sums of squares of the rows of all M*, on a sample of mixtures of its columns."""
    (writer,) = (affines[name].weight for name in seam.writers)
    total = torch.zeros(len(writer), dtype=torch.float64, device=writer.device)
    for reader in past_norm(seam, affines).values():
        mixtures = _probes(reader.weight.shape[1], writer).T
        mixed = product(writer, product(reader.weight, mixtures, torch.float64), torch.float64)
        total += squares(mixed, 1) * (mixtures.shape[0] / mixtures.shape[1])
    return total


def _unmerged(seam: Seam, affines: Mapping[str, Affine], dtype: str, power: float) -> dict[str, float]:
    """Relative error of x P M when P and every M are rounded to `dtype`, which lose as much; power: as for `merged`.

    Where x is not white, an earlier seam has made P.
    """
    (writer,) = (affines[name] for name in seam.writers)
    m = torch.stack([squares(reader.weight, 1) for reader in past_norm(seam, affines).values()]).sum(0)
    written = squares(writer.weight, 0)
    if writer.moment is not None:
        blocks = writer.weight.double().unflatten(0, (len(writer.moment), -1))
        written = torch.einsum("bij,bid,bjd->d", writer.moment, blocks, blocks)
    unit, _ = precision_of(dtype)
    return {"m": unit * relative(2 * (written @ m).item(), power)}


def _probes(size: int, like: Tensor) -> Float[Tensor, "n size"]:
    """At most PROBES orthonormal vectors. A quadratic form averages, over them, to about its trace over `size`."""
    drawn = torch.randn(
        size, min(size, PROBES), generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
    )
    return torch.linalg.qr(drawn.to(like.device)).Q.T


def steps(seam: Seam, setting: Setting) -> Iterator[Step]:
    """One product a reader."""
    (writer,) = seam.writers
    for name in seam.readers:
        within = precision(setting.info(name).dtype, setting.info(writer).dtype, setting.kept(name))
        yield f"P {name.rpartition('.')[2]}", within, 2.0 * setting.size(writer) * setting.size(name) / seam.width
    probes = min(FEW_PROBES, setting.size(writer) // seam.width)
    read = sum(setting.size(name) for name in seam.readers)
    yield "power", torch.float64, 2.0 * probes * (setting.size(writer) + read)
    if writer in setting.earlier:
        yield "sizes of rows", torch.float64, 2.0 * PROBES * (setting.size(writer) * len(seam.readers) + read)
        merged = setting.size(writer) / seam.width * read / seam.width
        yield "round P M", torch.float32, merged * setting.architecture.head_dim


def memory(seam: Seam, setting: Setting) -> float:
    """What comes out, and one block of it before it is rounded."""
    (writer,) = seam.writers
    d, total, most = seam.width, 0.0, 0.0
    for name in seam.readers:
        kept = setting.kept(name)
        within = precision(setting.info(name).dtype, setting.info(writer).dtype, kept)
        inner, rows = setting.size(writer) / d, setting.size(name) / d
        total += rows * inner * kept.itemsize
        block = min(block_rows(d), rows) * (d + inner) * within.itemsize + setting.size(writer) * within.itemsize
        if writer in setting.earlier and kept in HALF:  # in fp64 before it is rounded, block by block
            block += rows * inner * (8 + kept.itemsize)
        most = max(most, block)
    return float(total + most)

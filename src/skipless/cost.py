"""What a task costs, from shapes and dtypes alone: FLOPs, step by step as closing.py takes them, and memory.

n, d, m, r: the rows of a stream's writers, its width, the columns of its readers, and those that are left of them.
Of the terms, those of third order are counted. What depends on the numbers themselves is taken as it usually is: R is
moderate (rounding.MODERATE_REST), no Cholesky factorization has to be repeated, and pivoting needs no swaps.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from skipless.checkpoint.reader import TensorInfo
from skipless.closing import COPIED, kept_dtype, stream_dtypes, with_later
from skipless.planning import Plan, Task
from skipless.prediction import FEW_PROBES, PROBES
from skipless.products import HALF, block_rows, precision
from skipless.rounding import COLUMNS
from skipless.seams import Seam
from skipless.tolerances import dtype_name

# Beside what is counted: Python's own, vectors, and the buffers of BLAS.
OVERHEAD = 96 * 2**20
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
Step = tuple[str, torch.dtype, float]


@dataclass(frozen=True)
class Cost:
    """FLOPs by precision, and the bytes that a task holds at most, beside what the process held before."""

    flops: Mapping[str, float]
    memory: int

    @property
    def total(self) -> float:
        """FLOPs in any precision."""
        return sum(self.flops.values())


def cost(plan: Plan, task: Task) -> Cost:
    """FLOPs and memory of a task."""
    flops: dict[str, float] = {}
    for dtype, count in steps(plan, task).values():
        flops[dtype] = flops.get(dtype, 0.0) + count
    return Cost(flops, _memory(plan, task))


def needed(plan: Plan, tasks: Iterable[Task]) -> int:
    """Bytes that carrying out tasks adds to what the process holds: the largest one's, and what waits to be written."""
    return max((cost(plan, task).memory for task in tasks), default=0) + waiting(plan)


def least(plan: Plan) -> Plan:
    """The plan with every task by rows that takes less memory so."""
    every = plan.by_rows(plan.tasks)
    pairs = zip(plan.tasks, every.tasks, strict=True)
    return plan.by_rows([task for task, other in pairs if cost(every, other).memory < cost(plan, task).memory])


def waiting(plan: Plan) -> int:
    """Bytes of the largest that a task hands out at a time, one of which may wait to be written."""
    return max(_piece(plan, task, name) for task in plan.tasks for name in task.writes)


def _piece(plan: Plan, task: Task, name: str) -> int:
    """Bytes of a tensor that a task hands out at a time."""
    info = plan.outputs[name]
    if not task.seams:
        return _copied(plan.inputs[name]) * info.dtype.itemsize // plan.inputs[name].dtype.itemsize
    if task.by_rows and _is_table(plan, name.rpartition(".")[0]):
        return min(info.bytes, block_rows(info.shape[1]) * info.row_bytes)
    return info.bytes


def _copied(info: TensorInfo) -> int:
    """Bytes of a tensor that are copied at a time."""
    return min(info.bytes, max(COPIED, info.row_bytes))


def _is_table(plan: Plan, name: str) -> bool:
    module = plan.modules[0].get(name)
    return module is not None and module.table


def steps(plan: Plan, task: Task) -> dict[str, tuple[str, float]]:
    """The task's steps in their order: name -> precision, FLOPs."""
    found: dict[str, tuple[str, float]] = {}
    for number, (seam, later) in enumerate(with_later(task)):
        for name, dtype, count in _seam_steps(plan, task, seam, later):
            key = f"{seam.kind} seam: {name}" if len(task.seams) == 1 else f"{seam.kind} seam {number}: {name}"
            kind, before = found.get(key, (dtype_name(dtype), 0.0))
            found[key] = (kind, before + count)
    return found


def _seam_steps(plan: Plan, task: Task, seam: Seam, later: frozenset[str]) -> Iterator[Step]:
    way = seam.way(plan.basis)
    if seam.rest:
        return _stream_steps(_Shapes.of(plan, task, seam, later))
    if way == "rows":
        return _rows_steps(plan, seam)
    if way == "p":
        return _merge_steps(plan, seam, later)
    return iter(())  # gains and norms: every number once


@dataclass(frozen=True)
class _Shapes:
    """Of a stream seam: rows of each writer, d, m; extra: further columns that read it (followers, duals).

    half: whether all that is written is in half precision; rounded: whether some is; fixed: whether the rest is not;
    by_rows: whether what the writers become is computed for each use.
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
    def of(cls, plan: Plan, task: Task, seam: Seam, later: frozenset[str]) -> "_Shapes":

        def width(name: str) -> int:
            return _size(plan, name) // seam.width

        dtypes = stream_dtypes(plan, seam, later)
        return cls(
            rows=tuple(width(name) for name in seam.writers),
            d=seam.width,
            m=sum(width(name) for name in seam.readers),
            extra=sum(width(name) for name in (*seam.followers, *seam.duals)),
            pivoted=seam.removed(plan.basis) == seam.readers,
            half=all(dtype in HALF for dtype in dtypes.values()),
            rounded=any(dtype in HALF for dtype in dtypes.values()),
            fixed=dtypes["rest"] not in HALF,
            by_rows=task.by_rows,
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


def _stream_steps(s: _Shapes) -> Iterator[Step]:
    """eliminate.close_stream, rounding.round_seam, prediction.OpenStream.measure."""
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
        yield "M = 1 + R R^T", within, float(r * d**2)
        yield "factorize M", within, d**3 / 3
        yield "R^T M^-1", within, 2.0 * d**2 * r
        yield "change of X", within, 2.0 * d**2 * r
        yield "X + X change", BF16 if s.half and s.pivoted else within, 2.0 * n * d**2
        yield "round X", BF16 if s.half else F32, float(n * d**2)
        if s.fixed:
            yield "solve for R again", F64, 4.0 * n * d * s.r + n * d**2 + d**3 / 3 + 2.0 * d**2 * s.r
    yield "measure", within, 2.0 * PROBES * d * (s.m + s.r + 2 * s.extra)


def _merge_steps(plan: Plan, seam: Seam, later: frozenset[str]) -> Iterator[Step]:
    (writer,) = seam.writers
    for name in seam.readers:
        kept = kept_dtype(plan, name, later)
        within = precision(_dtype(plan, name), _dtype(plan, writer), kept)
        yield f"P {name.rpartition('.')[2]}", within, 2.0 * _size(plan, writer) * _size(plan, name) / seam.width
    probes = min(FEW_PROBES, _size(plan, writer) // seam.width)
    yield "power", F64, 2.0 * probes * (_size(plan, writer) + sum(_size(plan, name) for name in seam.readers))


def _rows_steps(plan: Plan, seam: Seam) -> Iterator[Step]:
    """eliminate.close_rows, block by block of the writer's columns, in fp64."""
    width, blocks = seam.width, seam.blocks
    rows = _size(plan, seam.writers[0]) / (width * blocks)
    yield "choose rows", F64, blocks * (width**2 * (rows - width / 3) + width**2 * (rows - width))
    yield "factorize T", F64, blocks * 2 / 3 * width**3
    yield "W T^-1", F64, blocks * 2.0 * width**2 * (rows - width)
    yield "other writers", F64, sum(2.0 * width * _size(plan, name) for name in seam.writers[1:])
    yield "T A", F64, sum(2.0 * width * _size(plan, name) for name in seam.readers)


def _size(plan: Plan, name: str) -> int:
    """Weights of a module before the task."""
    return plan.inputs[f"{name}.weight"].weights


def _dtype(plan: Plan, name: str) -> torch.dtype:
    return plan.inputs[f"{name}.weight"].dtype


def _memory(plan: Plan, task: Task) -> int:
    """Bytes at most: of the largest of the seams, with what is read for it and what earlier ones have left."""
    if not task.seams:
        (name,) = task.writes
        return OVERHEAD + _copied(plan.inputs[name]) + _piece(plan, task, name)
    largest, left = 0.0, dict[str, float]()
    for seam, later in with_later(task):
        own = [name for name in seam.modules if name in plan.modules[0]]
        read = sum(plan.inputs[f"{name}.weight"].bytes for name in own if name not in left)
        held = read + sum(left.values()) + sum(plan.inputs[name].bytes for name in seam.mixed)
        if seam.rest:
            needed = _stream_memory(plan, seam, _Shapes.of(plan, task, seam, later))
        elif seam.way(plan.basis) == "p":
            needed = _merge_memory(plan, seam, later)
        else:  # in fp64: what it reads, and what it makes of it
            needed = sum(24.0 * _size(plan, name) for name in own)
        if len(task.seams) > 1:  # what it gives, as it is handed out
            needed += sum(8.0 * _size(plan, name) for name in own if name not in later)
        largest = max(largest, held + needed)
        left = {name: size for name, size in left.items() if name not in own}
        left |= {name: 8.0 * _size(plan, name) for name in later if name in own}
    return OVERHEAD + int(largest)


def _merge_memory(plan: Plan, seam: Seam, later: frozenset[str]) -> float:
    """What comes out, and one block of it before it is rounded."""
    (writer,) = seam.writers
    d, total, most = seam.width, 0.0, 0.0
    for name in seam.readers:
        kept = kept_dtype(plan, name, later)
        within = precision(_dtype(plan, name), _dtype(plan, writer), kept)
        inner, rows = _size(plan, writer) / d, _size(plan, name) / d
        total += rows * inner * kept.itemsize
        block = min(block_rows(d), rows) * (d + inner) * within.itemsize + _size(plan, writer) * within.itemsize
        most = max(most, block)
    return total + most


def _stream_memory(plan: Plan, seam: Seam, s: _Shapes) -> float:
    """The largest of the stages of closing.py; what was read is counted beside, and the writers go after O S.

    By rows, neither tables nor X are held whole, but for each writer S and what it is rounded with; and what has been
    read of the other writers stays.
    """
    d, m, r, n, x = s.d, s.m, s.r + s.extra, s.n, s.within.itemsize
    stored = {name: plan.inputs[f"{name}.weight"] for name in seam.writers}
    made, gone, unread, result = n * d * x, sum(info.bytes for info in stored.values()), 0, n
    if s.by_rows:
        read = {name: info for name, info in stored.items() if not _is_table(plan, name)}
        made, gone, unread = len(s.rows) * x * d * d, 0, gone - sum(info.bytes for info in read.values())
        result = sum(
            info.weights // d for name, info in read.items() if plan.outputs[f"{name}.weight"].dtype != info.dtype
        )
    joined = d * m * max(_dtype(plan, name).itemsize for name in seam.readers)
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
    stages.append(held + 8 * PROBES * (2 * d + 4 * m + 3 * s.extra) + x * d * max(d, m - d))
    return max(stages) - unread

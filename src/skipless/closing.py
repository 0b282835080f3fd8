"""Carry out one task of a plan: read its tensors, close its seams, and hand out what is to be written.

Tensors are held as they were read, and what is made of them as it will be stored or as precisely as that needs; each is
forgotten after its last use.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from skipless.basis import choose, choose_rows
from skipless.checkpoint.reader import not_finite
from skipless.eliminate import Affine, close_rows, column_order, merge, modules, normalize_rows
from skipless.errors import InputError
from skipless.planning import Plan, Task
from skipless.prediction import FEW_PROBES, OpenStream, Outcome, merged, merged_power, passed_rows
from skipless.products import HALF, blocks, max_abs, slices
from skipless.rounding import round_stream
from skipless.rows import Rows
from skipless.seams import Seam
from skipless.source import Read, read_affine, read_by_rows
from skipless.tolerances import coarsest, dtype_name

# Bytes of a tensor that are copied at a time.
COPIED = 2**26


@dataclass(frozen=True)
class Done:
    """What a task gives: the tensors to write, each whole or some of its rows after the other, and, once they have been
    taken, what became of its seams, and, where that is asked for, the SHA-256 of each tensor that it read.

    confirm: given the SHA-256 of each tensor as it was written, raises StorageError if it is not what was computed.
    """

    tensors: Iterator[tuple[str, torch.Tensor]]
    outcomes: list[Outcome]
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    confirm: Callable[[Mapping[str, str]], None] = lambda digests: None


def run_task(plan: Plan, task: Task, read: Read) -> Done:
    """Carry out one task, as its tensors are taken: read what a seam needs, close it, hand out what no other needs.

    Taking one raises InputError if casting it to a smaller dtype has overflowed.
    """
    outcomes: list[Outcome] = []
    tensors = _close_all(plan, task, read, outcomes) if task.seams else _copy(plan, task, read)
    return Done(_finite(tensors), outcomes)


def _finite(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same, each looked at by this thread: the writing one would wait for threads that the next seam keeps busy."""
    for name, tensor in tensors:
        if not_finite(tensor):
            raise InputError(
                f"{name}: expected numbers that {tensor.dtype} can hold, found an overflow; use --dtype float32"
            )
        yield name, tensor
        del tensor


def _copy(plan: Plan, task: Task, read: Read) -> Iterator[tuple[str, torch.Tensor]]:
    (name,) = task.writes
    info, dtype = plan.inputs[name], plan.outputs[name].dtype
    if info.bytes <= COPIED:
        yield name, read(name).to(dtype)
        return
    for rows in slices(info.shape[0], max(1, COPIED // info.row_bytes)):
        yield name, read(name, rows).to(dtype)


def _close_all(plan: Plan, task: Task, read: Read, outcomes: list[Outcome]) -> Iterator[tuple[str, torch.Tensor]]:
    before, after = plan.modules
    affines: dict[str, Affine] = {}
    seen: set[str] = set()
    for seam, later in with_later(task):
        for name in seam.modules:
            if name in before and name not in seen:  # once: what an earlier seam has removed is no more
                by_rows = task.by_rows and name in seam.writers
                affines[name] = (
                    read_by_rows(before[name], read) if by_rows else read_affine(before[name], after.get(name), read)
                )
        seen.update(seam.modules)
        own = {name: affines.pop(name) for name in seam.modules if name in affines}
        remaining, order, outcome = _close(plan, seam, own, later, read)
        del own
        outcomes.append(outcome)
        affines |= {name: remaining.pop(name) for name in list(remaining) if name in later}
        yield from _stored(plan, remaining)
        if order is not None and seam.order in plan.outputs:
            yield seam.order, order


def with_later(task: Task) -> Iterator[tuple[Seam, frozenset[str]]]:
    """The seams of a task in turn, each with those of its modules that a later one will rewrite."""
    last = {name: number for number, seam in enumerate(task.seams) for name in seam.modules}
    for number, seam in enumerate(task.seams):
        yield seam, frozenset(name for name in seam.modules if last[name] > number)


Closed = tuple[dict[str, Affine], torch.Tensor | None, Outcome]


def _close(
    plan: Plan,
    seam: Seam,
    affines: dict[str, Affine],
    later: frozenset[str],
    read: Read,
) -> Closed:
    """Close one seam: the modules that remain, their order, and what closing it has cost.

    affines: modules that go or change may be taken out after their last use. later: modules yet to be rewritten.
    """
    way = seam.way(plan.basis)
    if seam.rest:
        return _close_stream(plan, seam, affines, later)
    if way == "rows":
        return _close_rows(plan, seam, affines, later, read)
    if way == "p":
        return _merge(plan, seam, affines, later, read)
    dtype = dtype_name(coarsest(plan.outputs[f"{name}.weight"].dtype for name in seam.readers))
    outcome = Outcome(seam.kind, seam.layer, way, dtype, {}, {})
    if way == "gain":
        return merge(seam, affines), None, outcome
    (norm,), (table,) = seam.writers, seam.readers
    rows = normalize_rows(affines[table], affines.get(norm), plan.source.norm_type, plan.source.norm_eps)
    return {table: rows}, None, outcome


def _close_stream(plan: Plan, seam: Seam, affines: dict[str, Affine], later: frozenset[str]) -> Closed:
    """Close a stream or head seam by the plan's basis and round it."""
    way = seam.way(plan.basis)
    dtypes = stream_dtypes(plan, seam, later)
    name = dtype_name(coarsest(dtypes.values()))
    opened = OpenStream(seam, affines)
    quick = all(dtype in HALF for dtype in dtypes.values())
    basis = choose(seam, way, opened.readers, opened.weights, torch.float32 if quick else torch.float64)
    stream = opened.close(basis, dtypes)
    opened.release()
    for writer in seam.writers:
        del affines[writer]
    condition = basis.condition
    del basis
    if getattr(torch, name) in HALF:
        stream = round_stream(stream, opened.weights, opened.extra_weights, dtypes)
    outcome = opened.measure(way, condition, stream, dtypes, name).outcome(way, name)
    widths = {name: weight.shape[1] for name, weight in opened.readers.items()}
    return modules(seam, way, stream, widths), column_order(stream), outcome


def _close_rows(plan: Plan, seam: Seam, affines: Mapping[str, Affine], later: frozenset[str], read: Read) -> Closed:
    """Make rows of P, or of each head of V, the identity."""
    weight, mix = affines[seam.writers[0]].weight.double(), None
    if seam.kind == "values":
        mix = _mix(seam, read, weight.new_ones(plan.source.num_attention_heads))
    bases = choose_rows(seam, weight)
    remaining, order = close_rows(seam, affines, bases, mix)
    dtypes = [plan.outputs[f"{name}.weight"].dtype for name in remaining if name not in later]
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


def _merge(plan: Plan, seam: Seam, affines: Mapping[str, Affine], later: frozenset[str], read: Read) -> Closed:
    """Close a P-M seam by merging P."""
    dtypes = {name: kept_dtype(plan, name, later) for name in seam.readers}
    (scale,) = map(read, seam.mixed) if seam.mixed else (None,)
    remaining = merge(seam, affines, dtypes, scale)
    name = dtype_name(coarsest(plan.outputs[f"{name}.weight"].dtype for name in remaining))
    power = merged_power(seam, affines, FEW_PROBES)
    largest = max(max_abs(affine.weight) for affine in remaining.values())
    return remaining, None, merged(seam, affines, [name], power, largest).outcome("p", name)


def kept_dtype(plan: Plan, name: str, later: frozenset[str]) -> torch.dtype:
    """In what a module's weight is kept: as it is stored, or, if it is yet to be rewritten, unrounded."""
    return torch.float64 if name in later else plan.outputs[f"{name}.weight"].dtype


def stream_dtypes(plan: Plan, seam: Seam, later: frozenset[str]) -> dict[str, torch.dtype]:
    """In what a stream seam's writers, duals, followers and, as "rest", its readers are kept (the finest of these)."""
    dtypes = {name: kept_dtype(plan, name, later) for name in (*seam.writers, *seam.duals, *seam.followers)}
    rest = [
        plan.outputs[name].dtype
        for reader in (*seam.readers, seam.rest)
        if (name := f"{reader}.weight") in plan.outputs
    ]
    return {**dtypes, "rest": min(rest, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)}


def _stored(plan: Plan, affines: dict[str, Affine]) -> Iterator[tuple[str, torch.Tensor]]:
    """Modules as the checkpoint stores them, in the output's dtype; each is forgotten."""
    _, after = plan.modules
    for name in list(affines):
        weight, bias = affines[name].weight, affines[name].bias
        del affines[name]
        dtype, turned = plan.outputs[f"{name}.weight"].dtype, not (after[name].table or after[name].diagonal)
        if isinstance(weight, Rows):
            yield from ((f"{name}.weight", part) for part in _made(weight, dtype, turned))
            continue
        weight = (weight.T if turned else weight).to(dtype)
        yield f"{name}.weight", weight
        del weight
        if bias is not None:
            yield f"{name}.bias", bias.to(plan.outputs[f"{name}.bias"].dtype)


def _made(weight: Rows, dtype: torch.dtype, turned: bool) -> Iterator[torch.Tensor]:
    """Rows of a matrix as they are made, or, if stored transposed, all of it, in the place of what it is made of."""
    if not turned:
        yield from (weight[rows].to(dtype) for rows in blocks(weight))
        return
    whole = weight.origin
    assert whole is not None  # only tables are not in memory
    if whole.dtype != dtype:
        whole = torch.empty_like(whole, dtype=dtype)
    for rows in blocks(weight):
        whole[rows] = weight[rows]
    yield whole.T

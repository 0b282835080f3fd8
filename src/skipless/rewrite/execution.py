"""Carry out one task of a plan: read its tensors, close its seams, and hand out what is to be written.

Tensors are held as they were read, and what is made of them as it will be stored or as precisely as that needs; each is
forgotten after its last use.
"""

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass

import torch

from skipless.algebra.affine import Affine
from skipless.algebra.forecast import Outcome
from skipless.algebra.linalg import blocks, slices
from skipless.algebra.rows import Rows
from skipless.checkpoint.canonical import Canonical, keeping, restored
from skipless.checkpoint.digests import Digests
from skipless.checkpoint.opening import Read
from skipless.checkpoint.reader import CheckpointReader, not_finite
from skipless.errors import InputError
from skipless.removals import removal
from skipless.removals.setting import Setting
from skipless.rewrite.modules import read_affine, read_by_rows, scaled
from skipless.rewrite.planning import Plan, Task, in_turn

# Bytes of a tensor that are copied at a time.
COPIED = 2**26
# Tensors by name; closed before its end, it stops the threads that it has begun.
Tensors = Generator[tuple[str, torch.Tensor], None, None]


@dataclass(frozen=True)
class Done:
    """What a task gives: the tensors to write, each whole, or some rows at a time.

    outcomes: what became of its seams. sources: the SHA-256 of each tensor that it read, where that is asked for. Both
    are known once all tensors have been taken.
    confirm: given the SHA-256 of each tensor as it was written, raises StorageError if it is not what was computed.
    """

    tensors: Tensors
    outcomes: list[Outcome]
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    confirm: Callable[[Mapping[str, str]], None] = lambda digests: None


# What each task gives, in any order; closed before its end, it stops what it has begun.
Results = Generator[tuple[int, Done], None, None]


def run_task(plan: Plan, task: Task, read: Read) -> Done:
    """Carry out one task while its tensors are taken: read what a seam needs, close it, hand out what no other needs.

    Taking one raises InputError if casting it to a smaller dtype has overflowed.
    """
    outcomes: list[Outcome] = []
    whole = read if plan.layout is None else keeping(read, plan.layout)
    ours = read if plan.layout is None else Canonical(plan.inputs, whole, plan.layout, not plan.in_place).tensor
    if not task.seams:
        tensors = _copy(plan, task, read if plan.in_place else ours)
    else:
        tensors = _close_all(plan, task, ours, outcomes)
        if plan.layout is not None and plan.in_place:
            tensors = restored(tensors, plan.layout, whole)
    return Done(_finite(tensors), outcomes)


def run_digested(plan: Plan, task: Task, reader: CheckpointReader) -> Done:
    """Carry out one task, as run_task does, and take the SHA-256 of what it reads."""
    digests = Digests(reader, overwritten=task.by_rows)
    done = run_task(plan, task, digests.tensor)

    def tensors() -> Tensors:
        with digests:
            yield from done.tensors
            done.sources.update(digests.finish())

    return dataclasses.replace(done, tensors=tensors())


def _finite(tensors: Iterator[tuple[str, torch.Tensor]]) -> Tensors:
    """Check each tensor on this thread: the writer thread would block on the pool that the next seam uses."""
    for name, tensor in tensors:
        if not_finite(tensor):
            raise InputError(
                f"{name}: expected numbers that {tensor.dtype} can hold, found an overflow; use --dtype float32"
            )
        yield name, tensor
        del tensor


def _copy(plan: Plan, task: Task, read: Read) -> Iterator[tuple[str, torch.Tensor]]:
    (name,) = task.writes
    info, dtype = plan.renamed[name], plan.outputs[name].dtype
    if info.bytes <= COPIED:
        yield name, read(name).to(dtype)
        return
    for rows in slices(info.shape[0], max(1, COPIED // info.row_bytes)):
        yield name, read(name, rows).to(dtype)


def _close_all(plan: Plan, task: Task, read: Read, outcomes: list[Outcome]) -> Iterator[tuple[str, torch.Tensor]]:
    before, after = plan.modules
    affines: dict[str, Affine] = {}
    seen: set[str] = set()
    for seam, earlier, later in in_turn(task.seams):
        for name in seam.modules:
            if name in before and name not in seen:  # once: what an earlier seam has removed is no more
                by_rows = task.by_rows and name in seam.writers
                affines[name] = (
                    read_by_rows(before[name], read) if by_rows else read_affine(before[name], after.get(name), read)
                )
        seen.update(seam.modules)
        own = scaled(seam, {name: affines.pop(name) for name in seam.modules if name in affines}, read)
        remaining, order, outcome = removal(seam).close(seam, own, setting(plan, task, earlier, later), read)
        del own
        outcomes.append(outcome)
        affines |= {name: remaining.pop(name) for name in list(remaining) if name in later}
        yield from _stored(plan, remaining)
        if order is not None and seam.order in plan.outputs:
            yield seam.order, order


def setting(
    plan: Plan, task: Task, earlier: frozenset[str] = frozenset(), later: frozenset[str] = frozenset()
) -> Setting:
    """What a removal is told of a task's tensors. earlier, later: modules that another seam rewrites."""
    modules = plan.modules[0]
    return Setting(plan.source, plan.basis, *plan.canonical, modules, earlier, later, task.by_rows)


def _stored(plan: Plan, affines: dict[str, Affine]) -> Iterator[tuple[str, torch.Tensor]]:
    """Modules as the checkpoint stores them, in the output's dtype; each is forgotten."""
    (_, after), (_, outputs) = plan.modules, plan.canonical
    for name in list(affines):
        weight, bias = affines[name].weight, affines[name].bias
        del affines[name]
        dtype, turned = outputs[f"{name}.weight"].dtype, not (after[name].table or after[name].diagonal)
        if isinstance(weight, Rows):
            yield from ((f"{name}.weight", part) for part in _made(weight, dtype, turned))
            continue
        weight = (weight.T if turned else weight).to(dtype)
        yield f"{name}.weight", weight
        del weight
        if bias is not None:
            yield f"{name}.bias", bias.to(outputs[f"{name}.bias"].dtype)


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

"""Plan a fuse from config.json and headers: which seams are closed, what each task reads and writes, and where to.

A plan is pure (no tensor is read; a basis is chosen before, which may read some); a task is everything that must be in
memory together, and tasks are independent of each other, so that an engine may run them in any order and anywhere.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from skipless.algebra.forecast import Forecast
from skipless.algebra.linalg import HALF
from skipless.architecture.config import Architecture, Module
from skipless.architecture.seams import AUTO, Seam, closed
from skipless.checkpoint import canonical, family
from skipless.checkpoint.opening import AsSkipless, as_skipless, check_config
from skipless.checkpoint.reader import CheckpointReader, TensorInfo
from skipless.checkpoint.writer import plan_shards
from skipless.errors import InputError
from skipless.removals import forecast
from skipless.removals.columns import forecast_memory
from skipless.rewrite.model_files import AUTO_MAP
from skipless.rewrite.modules import read_seam, tables
from skipless.rewrite.request import Request


@dataclass(frozen=True)
class Task:
    """Tensors that are read together, the seams to close on them (none: copy), and the tensors that come out.

    by_rows: whether what the stream's writers become is computed anew for each use, some rows at a time, because it
    does not fit in memory. The result is the same, bit for bit.
    """

    seams: tuple[Seam, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    by_rows: bool = dataclasses.field(default=False, repr=False)


@dataclass(frozen=True)
class Plan:
    """All that a fuse will do.

    basis: how stream seams are closed. reason: why, if the basis was chosen from the weights. inputs, outputs: every
    tensor of source and result. config: the result's. source_config: the source's, or that of a skipless model that
    computes the same. layout: where canonical tensors lie in another family's (None: the model is skipless).
    """

    source: Architecture
    target: Architecture
    basis: str
    reason: str
    tasks: tuple[Task, ...]
    inputs: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]
    config: Mapping[str, object]
    source_config: Mapping[str, object]
    note: str = ""
    layout: family.Layout | None = None

    @cached_property
    def modules(self) -> tuple[dict[str, Module], dict[str, Module]]:
        """The modules of source and target by name."""
        return _modules(self.source), _modules(self.target)

    @property
    def in_place(self) -> bool:
        """Whether the result has the layout of another family, in which numbers move, and no tensor goes."""
        return self.layout is not None and self.config.get("model_type") != "skipless"

    @cached_property
    def canonical(self) -> tuple[Mapping[str, TensorInfo], Mapping[str, TensorInfo]]:
        """Inputs and outputs by our names."""
        if self.layout is None:
            return self.inputs, self.outputs
        outputs = canonical.infos(self.outputs, self.layout) if self.in_place else self.outputs
        return canonical.infos(self.inputs, self.layout), outputs

    @property
    def renamed(self) -> Mapping[str, TensorInfo]:
        """Inputs by the names of the outputs."""
        return self.inputs if self.in_place else self.canonical[0]

    @cached_property
    def kinds(self) -> dict[str, list[Seam]]:
        """The seams that are closed, by kind."""
        seams: dict[str, list[Seam]] = {}
        for seam in (seam for task in self.tasks for seam in task.seams):
            seams.setdefault(seam.kind, []).append(seam)
        return seams

    @property
    def neutral(self) -> int:
        """Where the layout stays a family's, the numbers that become neutral: gains 1, biases 0."""
        return sum(seam.saves for seams in self.kinds.values() for seam in seams) if self.in_place else 0

    @cached_property
    def touched(self) -> frozenset[str]:
        """The modules that closing seams rewrites."""
        return frozenset(name for task in self.tasks for seam in task.seams for name in seam.modules)

    @property
    def parameters(self) -> tuple[int, int]:
        """Numbers stored before and after, biases and gains included, indices not."""
        before, after = (
            sum(info.weights for info in tensors.values() if not info.is_index)
            for tensors in (self.renamed, self.outputs)
        )
        return before, after

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes of all tensors before and after."""
        before, after = (sum(info.bytes for info in tensors.values()) for tensors in (self.renamed, self.outputs))
        return before, after

    @cached_property
    def shards(self) -> dict[str, int]:
        """The files of weights, in order, and the bytes of their tensors."""
        sizes: Counter[str] = Counter()
        for info in self.outputs.values():
            sizes[info.shard] += info.bytes
        return dict(sizes)

    def traffic(self, task: Task) -> tuple[int, int]:
        """Bytes that a task reads, and writes."""
        read = sum(self.inputs[name].bytes for name in task.reads)
        return read, sum(self.outputs[name].bytes for name in task.writes)

    def can_go_by_rows(self, task: Task) -> bool:
        """Whether a task need not hold a stream whole.

        It closes one seam of at most two writers (a MoE has more), without biases and tied tables, and all that it
        writes is in half precision, or nothing is.
        """
        if len(task.seams) != 1 or not task.seams[0].rest or task.seams[0].duals or len(task.seams[0].writers) > 2:
            return False
        biased = any(name.endswith(".bias") for name in (*task.reads, *task.writes))
        written = (self.outputs[name] for name in task.writes)
        return not biased and len({info.dtype in HALF for info in written if not info.is_index}) == 1

    def by_rows(self, chosen: Collection[Task]) -> "Plan":
        """The same plan, with those of these tasks by rows that can be."""
        able = {task for task in chosen if self.can_go_by_rows(task)}
        tasks = (dataclasses.replace(task, by_rows=True) if task in able else task for task in self.tasks)
        return dataclasses.replace(self, tasks=tuple(tasks))

    def moved(self, task: Task) -> int:
        """Bytes that a task reads and writes."""
        return sum(self.traffic(task))

    def summary(self) -> dict[str, object]:
        """The totals, for --json."""
        before, after = self.parameters
        bytes_before, bytes_after = self.bytes
        return {
            "basis": self.basis,
            "reason": self.reason,
            "tasks": len(self.tasks),
            "parameters_before": before,
            "parameters_after": after,
            **({"neutral": self.neutral} if self.in_place else {}),
            **({"stays": self.note.splitlines()} if self.layout else {}),
            "bytes_before": bytes_before,
            "bytes_after": bytes_after,
            "shards": sorted(self.shards),
        }


def prepare(
    reader: CheckpointReader,
    request: Request,
    max_shard_size: int = 5 * 10**9,
    held: int = 0,
    limit: int | None = None,
) -> Plan:
    """Choose the basis, if that is left open (which reads weights: Request.decide), and plan.

    Raises InputError if choosing takes a process that holds `held` bytes already beyond `limit` (None: there is none).
    """
    if request.layout == "family":
        return plan_family(reader, request, max_shard_size)
    opened = as_skipless(reader)
    source, tensors = opened.architecture, opened.tensors
    ways = ("q", "pivoted")

    def foretell(seam: Seam) -> Forecast:
        memory = held + forecast_memory(seam, tensors, tables(source, seam))
        if limit is not None and memory > limit:
            raise InputError(
                f"basis: expected at most {limit / 1e9:.1f} GB of memory, found that choosing one takes "
                f"{memory / 1e9:.1f} GB; use --basis q, --basis pivoted, or a machine that has more"
            )
        dtypes = dict.fromkeys(request.stored(tensors, seam, way) for way in ways)
        affines = read_seam(source, seam, opened.tensor, opened.tensor)
        return forecast(seam, affines, tuple(dtypes), ways, later=later[seam])

    closing = _closing(opened, request)
    later = {seam: after for group in connected(closing) for seam, _, after in in_turn(group)}
    basis, reason = request.decide(source, tensors, closing, foretell)
    return make_plan(reader, dataclasses.replace(request, basis=basis), reason, max_shard_size)


def make_plan(reader: CheckpointReader, request: Request, reason: str = "", max_shard_size: int = 5 * 10**9) -> Plan:
    """Plan from config.json and headers which seams are closed, and what is read and written for each.

    request: with a basis, which was chosen for `reason`. max_shard_size in bytes. Raises InputError for a checkpoint
    that contradicts its config, a blocked seam, or nothing to remove.
    """
    assert request.basis != AUTO
    opened = as_skipless(reader)
    source = opened.architecture
    closing = _closing(opened, request)
    target = closed(source, closing, request.basis)
    if request.rest_dtype is not None:
        target = dataclasses.replace(target, rest_dtype=request.rest_dtype)
    plan = Plan(
        source=source,
        target=target,
        basis=request.basis,
        reason=reason,
        tasks=_tasks(source, target, closing, opened.layout),
        inputs=reader.tensors,
        outputs=plan_shards(_outputs(opened.tensors, target, closing, request.dtype), max_shard_size),
        config=_fused_config(opened.config, target, request.dtype),
        source_config=opened.config,
        note=request.note(source),
        layout=opened.layout,
    )
    _check_smaller(plan, closing, request)
    return plan


def plan_family(reader: CheckpointReader, request: Request, max_shard_size: int = 5 * 10**9) -> Plan:
    """Plan what moves within the layout of another family's model: every tensor keeps its name and shape.

    Raises InputError as make_plan does.
    """
    layout = family.laid_out(reader)
    source = layout.architecture
    closing = request.seams(source)
    if not closing:
        reasons = request.note(source).splitlines()
        raise InputError(f"nothing to move: {reasons[0] if reasons else 'this model has no norms and no biases'}")
    order = (*layout.shapes, *sorted(reader.tensors.keys() - layout.shapes.keys()))
    kept = {
        name: (info.shape, info.dtype if request.dtype is None or info.is_index else getattr(torch, request.dtype))
        for name, info in ((name, reader.tensors[name]) for name in order)
    }
    config = dict(reader.config)
    own = {**config[layout.family.inside]} if layout.family.inside in config else config
    if request.dtype is not None:
        for fields in (config, own):
            for name in {"dtype", "torch_dtype"} & fields.keys() or ({"dtype"} if fields is config else ()):
                fields[name] = request.dtype
    if own is not config:
        config[layout.family.inside] = own
    return Plan(
        source=source,
        target=source,
        basis=request.basis,
        reason="",
        tasks=_family_tasks(layout, closing, order),
        inputs=reader.tensors,
        outputs=plan_shards(kept, max_shard_size),
        config=config,
        source_config=reader.config,
        note=request.note(source),
        layout=layout,
    )


def _family_tasks(layout: family.Layout, closing: Iterable[Seam], order: Iterable[str]) -> tuple[Task, ...]:
    """One task per group of seams that share stored tensors, one per tensor that stays as it is, in this order."""
    modules = _modules(layout.architecture)

    def stored(seam: Seam) -> tuple[str, ...]:
        tensors = (tensor for name in seam.modules for tensor in modules[name].tensors())
        return tuple(dict.fromkeys(each for tensor in tensors for each in layout.locations[tensor].tensors))

    task_of = {name: Task((), (name,), (name,)) for name in order}
    for group in connected(closing, stored):
        names = tuple(dict.fromkeys(name for seam in group for name in stored(seam)))
        task_of.update(dict.fromkeys(names, Task(tuple(group), names, names)))
    return tuple(dict.fromkeys(task_of.values()))


def _check_smaller(plan: Plan, closing: Iterable[Seam], request: Request) -> None:
    """Raise InputError where indices would take more than the blocks they replace, or new biases more than is saved."""
    for seam in closing:
        if reason := request.unpaid(plan.renamed, seam, seam.way(plan.basis)):
            raise InputError(reason)
    before, after = plan.parameters
    if after >= before and not plan.target.first_layer_removed:  # which may be worth it
        raise InputError(
            f"remove: expected fewer than {before:,} weights without {', '.join(request.kinds)}, found {after:,}: the "
            f"biases that matrices gain are more than that saves; leave p out of --remove"
        )


def _modules(architecture: Architecture) -> dict[str, Module]:
    return {module.name: module for module in (*architecture.modules(), *architecture.norm_modules())}


def _closing(opened: AsSkipless, request: Request) -> list[Seam]:
    """The seams to close; in another family's model, if nothing in particular is asked for, those that save bytes.

    Raises InputError if there are none, or if one cannot be closed.
    """
    closing = request.seams(opened.architecture)
    if opened.layout is not None and request.remove is None:
        closing = [seam for seam in closing if not request.unpaid(opened.tensors, seam, seam.way("q"))]
    if not closing:
        why = request.note(opened.architecture).partition("\n")[0]
        raise InputError(
            f"nothing to remove: {why or 'every seam of this model is closed already, or left open on request'}"
        )
    for seam in closing:
        if seam.refusal:
            raise InputError(seam.refusal)
    return closing


def _outputs(
    inputs: Mapping[str, TensorInfo], target: Architecture, closing: Iterable[Seam], dtype: str | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of the result, in the order in which they are written."""
    rest_of = {seam.rest: inputs[f"{seam.readers[0]}.weight"].dtype for seam in closing if seam.rest}
    rest_of |= {seam.kept: inputs[f"{seam.writers[0]}.weight"].dtype for seam in closing if seam.kept}
    indices = target.index_tensors()
    outputs = {}
    for name, shape in target.tensors().items():
        module = name.rpartition(".")[0]
        if name in indices:
            kept = torch.int32
        elif dtype is not None:
            kept = getattr(torch, dtype)
        elif name in inputs:
            kept = inputs[name].dtype
        else:
            kept = rest_of[module] if module in rest_of else inputs[f"{module}.weight"].dtype
        if module.endswith(".rest_proj") and target.rest_dtype is not None:
            kept = torch.promote_types(kept, getattr(torch, target.rest_dtype))
        outputs[name] = (shape, kept)
    return outputs


def _tasks(
    source: Architecture, target: Architecture, closing: Iterable[Seam], layout: family.Layout | None
) -> tuple[Task, ...]:
    """One task per group of seams that share modules, one per tensor that stays as it is, in the output's order."""
    before, after = _modules(source), _modules(target)

    def stored(names: Iterable[str]) -> tuple[str, ...]:
        if layout is None:
            return tuple(names)
        return tuple(dict.fromkeys(each for name in names for each in layout.locations[name].tensors))

    kept, indices = source.tensors(), target.index_tensors()
    writer_of = {name: Task((), stored([name]), (name,)) for name in target.tensors() if name in kept}
    for group in connected(closing):
        by_rows = [seam.kind for seam in group] == ["first_layer"]  # whose table is made of one, row by row
        names = list(dict.fromkeys(name for seam in group for name in seam.modules))
        made = [name for seam in group for name in (seam.rest, seam.kept)]
        left = [name for name in (*names, *made) if name in after]
        reads = tuple(tensor for name in names if name in before for tensor in before[name].tensors())
        reads += tuple(dict.fromkeys(name for seam in group for name in seam.mixed))
        writes = tuple(tensor for name in left for tensor in after[name].tensors())
        writes += tuple(seam.order for seam in group if seam.order in indices)
        writer_of.update(dict.fromkeys(writes, Task(tuple(group), stored(reads), writes, by_rows)))
    return tuple(dict.fromkeys(writer_of[name] for name in target.tensors()))


def connected(
    closing: Iterable[Seam], parts: Callable[[Seam], Iterable[str]] = lambda seam: seam.modules
) -> list[list[Seam]]:
    """Group seams that share a module, in order: they must be closed one after the other on the same tensors.

    parts: of what a seam consists, if not of its modules.
    """
    groups: dict[int, list[Seam]] = {}
    group_of: dict[str, int] = {}
    for number, seam in enumerate(closing):
        touching = sorted({group_of[name] for name in parts(seam) if name in group_of})
        groups[number] = [*(other for key in touching for other in groups.pop(key)), seam]
        group_of.update(dict.fromkeys((name for other in groups[number] for name in parts(other)), number))
    return list(groups.values())


def in_turn(group: Sequence[Seam]) -> Iterator[tuple[Seam, frozenset[str], frozenset[str]]]:
    """The seams of a task in turn, each with those of its modules that an earlier, and that a later one rewrites."""
    first = {name: number for number, seam in reversed([*enumerate(group)]) for name in seam.modules}
    last = {name: number for number, seam in enumerate(group) for name in seam.modules}
    for number, seam in enumerate(group):
        earlier = frozenset(name for name in seam.modules if first[name] < number)
        yield seam, earlier, frozenset(name for name in seam.modules if last[name] > number)


def _fused_config(config: Mapping[str, object], target: Architecture, dtype: str | None) -> dict[str, object]:
    """The source's config.json with what fusing changes.

    Raises InputError naming the field when the model file would refuse it.
    """
    fields: dict[str, object] = {"stream_basis": target.stream_basis, "p_removed": target.p_removed}
    removed = ("values_removed", "keys_removed", "head_removed", "first_layer_removed")
    fields |= {name: True for name in removed if getattr(target, name)}
    fields |= {name: list(names) for name in ("norms_removed", "gains_removed") if (names := getattr(target, name))}
    if target.rest_dtype is not None:
        fields["rest_dtype"] = target.rest_dtype
    fields |= {"layers_open": list(target.layers_open), "folded_biases": list(target.folded_biases)}
    if dtype is not None:
        fields["dtype"] = dtype
    kept = {name: value for name, value in config.items() if not (dtype and name == "torch_dtype")}
    fused = {**kept, "architectures": ["SkiplessForCausalLM"], "auto_map": AUTO_MAP, **fields}
    check_config(fused)
    return fused

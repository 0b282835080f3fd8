"""Rewrite a skipless checkpoint without the weights it does not need: plan from headers, then stream the tensors.

A plan is pure (no tensor is read; a basis is chosen before, which may read some); a task is everything that must be in
memory together, and tasks are independent of each other, so that an engine may run them in any order and anywhere.
"""

import copy
import dataclasses
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from skipless.architecture import Architecture, Module
from skipless.basis import choose, choose_rows
from skipless.checkpoint.reader import CheckpointReader, TensorInfo
from skipless.checkpoint.writer import CheckpointWriter, new_folder, plan_shards, write_json
from skipless.eliminate import Affine, close_rows, column_order, merge, modules, normalize_rows
from skipless.errors import InputError
from skipless.model.configuration_skipless import SkiplessConfig
from skipless.prediction import Forecast, OpenStream, forecast, merged, passed_rows
from skipless.request import AUTO, Request
from skipless.rounding import HALF, round_stream
from skipless.seams import REMOVABLE, Seam, closed
from skipless.source import read_affine, read_architecture, read_seam

logger = logging.getLogger("skipless")

MODEL_FILES = tuple(
    Path(__file__).parent / "model" / name for name in ("configuration_skipless.py", "modeling_skipless.py")
)
AUTO_MAP = {
    "AutoConfig": "configuration_skipless.SkiplessConfig",
    "AutoModel": "modeling_skipless.SkiplessModel",
    "AutoModelForCausalLM": "modeling_skipless.SkiplessForCausalLM",
}


@dataclass(frozen=True)
class Task:
    """Tensors that are read together, the seams to close on them (none: copy), and the tensors that come out."""

    seams: tuple[Seam, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Done:
    """What a task gives: the tensors to write, and where storing them is expected to lose too much."""

    tensors: Iterator[tuple[str, torch.Tensor]]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All that a fuse will do. `inputs`, `outputs`: every tensor of source and result; `config`: the new one.

    basis: how stream seams are closed; reason: why, if it was chosen from the weights.
    """

    source: Architecture
    target: Architecture
    basis: str
    reason: str
    tasks: tuple[Task, ...]
    inputs: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]
    config: Mapping[str, object]
    note: str = ""

    @cached_property
    def modules(self) -> tuple[dict[str, Module], dict[str, Module]]:
        """The modules of source and target by name."""
        return _modules(self.source), _modules(self.target)

    @property
    def weights(self) -> tuple[int, int]:
        """Numbers stored before and after, biases included, indices not."""
        before, after = (
            sum(info.weights for info in tensors.values() if not info.is_index)
            for tensors in (self.inputs, self.outputs)
        )
        return before, after

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes of all tensors before and after."""
        before, after = (sum(info.bytes for info in tensors.values()) for tensors in (self.inputs, self.outputs))
        return before, after

    def summary(self) -> dict[str, object]:
        """The totals, for --json."""
        before, after = self.weights
        bytes_before, bytes_after = self.bytes
        return {
            "basis": self.basis,
            "reason": self.reason,
            "tasks": len(self.tasks),
            "weights_before": before,
            "weights_after": after,
            "bytes_before": bytes_before,
            "bytes_after": bytes_after,
            "shards": sorted({info.shard for info in self.outputs.values()}),
        }


def prepare(reader: CheckpointReader, request: Request, max_shard_size: int = 5 * 10**9) -> Plan:
    """Choose the basis, if that is left open (which reads weights: Request.decide), and plan."""
    source = read_architecture(reader)
    ways = ("q", "pivoted")

    def foretell(seam: Seam) -> Forecast:
        dtypes = dict.fromkeys(request.stored(reader.tensors, seam, way) for way in ways)
        return forecast(seam, read_seam(source, seam, reader.tensor), tuple(dtypes), ways)

    basis, reason = request.decide(source, reader.tensors, _closing(source, request), foretell)
    return make_plan(reader, dataclasses.replace(request, basis=basis), reason, max_shard_size)


def make_plan(reader: CheckpointReader, request: Request, reason: str = "", max_shard_size: int = 5 * 10**9) -> Plan:
    """Plan from config.json and headers which seams are closed, and what is read and written for each.

    request: with a basis, which was chosen for `reason`. max_shard_size in bytes. Raises InputError for a checkpoint
    that contradicts its config, a blocked seam, or nothing to remove.
    """
    assert request.basis != AUTO
    source = read_architecture(reader)
    closing = _closing(source, request)
    target = closed(source, closing, request.basis)
    if request.rest_dtype is not None:
        target = dataclasses.replace(target, rest_dtype=request.rest_dtype)
    plan = Plan(
        source=source,
        target=target,
        basis=request.basis,
        reason=reason,
        tasks=_tasks(source, target, closing),
        inputs=reader.tensors,
        outputs=plan_shards(_outputs(reader.tensors, target, closing, request.dtype), max_shard_size),
        config=_fused_config(reader.config, target, request.dtype),
        note=request.note(source),
    )
    _check_smaller(plan, closing, request)
    return plan


def _check_smaller(plan: Plan, closing: Iterable[Seam], request: Request) -> None:
    """Raise InputError where indices would take more than the blocks they replace, or new biases more than is saved."""
    for seam in closing:
        if seam.kind == "values" and (order := plan.outputs.get(seam.order)) is not None:
            saved = seam.saves * plan.outputs[f"{seam.writers[0]}.weight"].dtype.itemsize
            if order.bytes > saved:
                raise InputError(
                    f"{seam.order}: expected to be smaller than the {saved:,} bytes of the blocks of "
                    f"{seam.writers[0]} that it replaces, found {order.bytes:,}; leave values out of --remove"
                )
    before, after = plan.weights
    if after >= before:
        raise InputError(
            f"remove: expected fewer than {before:,} weights without {', '.join(request.remove)}, found {after:,}: the "
            f"biases that matrices gain are more than that saves; leave p out of --remove"
        )


def _modules(architecture: Architecture) -> dict[str, Module]:
    return {module.name: module for module in (*architecture.modules(), *architecture.norm_modules())}


def _closing(source: Architecture, request: Request) -> list[Seam]:
    """The seams to close, or InputError when there are none or one of them cannot be."""
    closing = request.seams(source)
    if not closing:
        raise InputError("nothing to remove: every seam of this model is closed already, or left open on request")
    for seam in closing:
        if seam.refusal:
            raise InputError(seam.refusal)
    return closing


def _outputs(
    inputs: Mapping[str, TensorInfo], target: Architecture, closing: Iterable[Seam], dtype: str | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of the result, in the order in which they are written."""
    rest_of = {seam.rest: inputs[f"{seam.readers[0]}.weight"].dtype for seam in closing if seam.rest}
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


def _tasks(source: Architecture, target: Architecture, closing: Iterable[Seam]) -> tuple[Task, ...]:
    """One task per group of seams that share modules, one per tensor that stays as it is, in the output's order."""
    before, after = _modules(source), _modules(target)
    writer_of = {name: Task((), (name,), (name,)) for name in target.tensors()}
    for group in _connected(closing):
        names = list(dict.fromkeys(name for seam in group for name in seam.modules))
        left = [name for name in (*names, *(seam.rest for seam in group)) if name in after]
        reads = tuple(tensor for name in names if name in before for tensor in before[name].tensors())
        reads += tuple(dict.fromkeys(name for seam in group for name in seam.mixed))
        writes = tuple(tensor for name in left for tensor in after[name].tensors())
        writes += tuple(seam.order for seam in group if seam.order in writer_of)
        writer_of.update(dict.fromkeys(writes, Task(tuple(group), reads, writes)))
    return tuple(dict.fromkeys(writer_of[name] for name in target.tensors()))


def _connected(closing: Iterable[Seam]) -> list[list[Seam]]:
    """Group seams that share a module, in order: they must be closed one after the other on the same tensors."""
    groups: list[list[Seam]] = []
    for seam in closing:
        touching = [group for group in groups if any(set(seam.modules) & set(other.modules) for other in group)]
        groups = [group for group in groups if group not in touching]
        groups.append([*(other for group in touching for other in group), seam])
    return groups


def run_task(plan: Plan, task: Task, read: Callable[[str], torch.Tensor]) -> Done:
    """Carry out one task: read its tensors, close its seams in fp64, and hand out what is to be written."""
    if not task.seams:
        (name,) = task.writes
        tensor = read(name)
        return Done(iter([(name, tensor.to(plan.outputs[name].dtype))]))
    before, after = plan.modules
    names = dict.fromkeys(name for seam in task.seams for name in seam.modules if name in before)
    affines = {name: read_affine(before[name], after.get(name), read) for name in names}
    indices: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    for number, seam in enumerate(task.seams):
        later = frozenset(name for other in task.seams[number + 1 :] for name in other.modules)
        remaining, order, problem = _close(plan, seam, affines, later, read)
        if order is not None and seam.order in plan.outputs:
            indices[seam.order] = order
        if problem is not None:
            problems.append(problem)
        for name in seam.modules:
            affines.pop(name, None)
        affines |= remaining
    return Done(_stored(plan, affines, indices), tuple(problems))


Closed = tuple[dict[str, Affine], torch.Tensor | None, str | None]


def _close(
    plan: Plan,
    seam: Seam,
    affines: Mapping[str, Affine],
    later: frozenset[str],
    read: Callable[[str], torch.Tensor],
) -> Closed:
    """Close one seam: the modules that remain, their order, and what is wrong. later: modules yet to be rewritten."""
    way = seam.way(plan.basis)
    if seam.rest:
        return _close_stream(plan, seam, affines, later)
    if way == "rows":
        return _close_rows(plan, seam, affines, later, read)
    if way == "p":
        return _merge(plan, seam, affines)
    if way == "gain":
        return merge(seam, affines), None, None
    (norm,), (table,) = seam.writers, seam.readers
    rows = normalize_rows(affines[table], affines.get(norm), plan.source.norm_type, plan.source.norm_eps)
    return {table: rows}, None, None


def _close_stream(plan: Plan, seam: Seam, affines: Mapping[str, Affine], later: frozenset[str]) -> Closed:
    """Close a stream or head seam by the plan's basis and round it."""
    way = seam.way(plan.basis)
    opened = OpenStream(seam, affines)
    basis = choose(seam, way, opened.readers, opened.weights)
    stream = opened.close(basis)
    dtypes = _dtypes(plan, seam, later)
    name = _coarsest(dtypes.values())
    if getattr(torch, name) in HALF:
        stream = round_stream(stream, opened.weights, opened.extra_weights, dtypes)
    problem = opened.measure(way, basis, stream, dtypes, name).problem(way, name)
    widths = {name: weight.shape[1] for name, weight in opened.readers.items()}
    return modules(seam, way, stream, widths), column_order(stream), problem


def _close_rows(
    plan: Plan, seam: Seam, affines: Mapping[str, Affine], later: frozenset[str], read: Callable[[str], torch.Tensor]
) -> Closed:
    """Make rows of P, or of each head of V, the identity."""
    weight, mix = affines[seam.writers[0]].weight, None
    if seam.kind == "values":
        mix = weight.new_full((plan.source.num_attention_heads,), not seam.mixed)
        for name in seam.mixed:
            mix += read(name) * (-1 if name.endswith(".gamma") else 1)
    bases = choose_rows(seam, weight)
    remaining, order = close_rows(seam, affines, bases, mix)
    dtypes = [plan.outputs[f"{name}.weight"].dtype for name in remaining if name not in later]
    name = _coarsest(dtypes or [torch.float64])
    problem = passed_rows(seam, affines, remaining, bases, [name]).problem("rows", name)
    return remaining, (order if seam.kind == "values" else order[0]).to(torch.int32), problem


def _coarsest(dtypes: Iterable[torch.dtype]) -> str:
    return str(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch.")


def _merge(plan: Plan, seam: Seam, affines: Mapping[str, Affine]) -> Closed:
    """Close a P-M seam by merging P."""
    remaining = merge(seam, affines)
    weights = [affine.weight for affine in remaining.values()]
    name = _coarsest(plan.outputs[f"{name}.weight"].dtype for name in remaining)
    power = sum(torch.linalg.vector_norm(weight).item() ** 2 for weight in weights)
    largest = max(torch.linalg.vector_norm(weight, math.inf).item() for weight in weights)
    return remaining, None, merged(seam, affines, [name], power, largest).problem("p", name)


def _dtypes(plan: Plan, seam: Seam, later: frozenset[str]) -> dict[str, torch.dtype]:
    """In what a stream seam's writers, duals, followers and, as "rest", its readers are stored (the finest of these).

    What is yet to be rewritten is not rounded now.
    """
    dtypes = {
        name: torch.float64 if name in later else plan.outputs[f"{name}.weight"].dtype
        for name in (*seam.writers, *seam.duals, *seam.followers)
    }
    rest = [
        plan.outputs[name].dtype
        for reader in (*seam.readers, seam.rest)
        if (name := f"{reader}.weight") in plan.outputs
    ]
    return {**dtypes, "rest": min(rest, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)}


def _stored(
    plan: Plan, affines: Mapping[str, Affine], indices: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Modules as the checkpoint stores them, in the output's dtype, and index tensors."""
    _, after = plan.modules
    for name, affine in affines.items():
        weight = affine.weight if after[name].table or after[name].diagonal else affine.weight.T
        yield f"{name}.weight", weight.to(plan.outputs[f"{name}.weight"].dtype)
        if affine.bias is not None:
            yield f"{name}.bias", affine.bias.to(plan.outputs[f"{name}.bias"].dtype)
    yield from indices.items()


def _run_local(plan: Plan, reader: CheckpointReader, writer: CheckpointWriter) -> Iterator[tuple[Task, Done]]:
    """One task after the other in this process: memory holds one task's tensors in fp64."""
    for task in plan.tasks:
        done = run_task(plan, task, reader.tensor)
        for name, tensor in done.tensors:
            writer.write(name, tensor)
        yield task, done


Engine = Callable[[Plan, CheckpointReader, CheckpointWriter], Iterator[tuple[Task, Done]]]
ENGINES: dict[str, Engine] = {"local": _run_local}


def fuse(
    source: str | Path,
    destination: str | Path,
    *,
    basis: str = AUTO,
    dtype: str | None = None,
    rest_dtype: str | None = None,
    layers_open: Iterable[int] = (),
    remove: Iterable[str] = REMOVABLE,
    parallel_removes: str = "readers",
    max_shard_size: int = 5 * 10**9,
    engine: str = "local",
    device: str = "cpu",
    progress: Callable[[Plan, Task | None], None] = lambda plan, task: None,
) -> Plan:
    """Write `source` without Q (or K, V) and P into the new folder `destination`, and return what was done.

    basis, dtype, rest_dtype, layers_open, remove, parallel_removes: what is asked for (request.Request). max_shard_size
    in bytes. device: where the algebra is done, "cpu" or a CUDA device (their results differ in the last bits).
    `progress` is called with None once the plan is made and then with each finished task. The result computes the same
    function (identities: arXiv:2404.12362, Fig. 1). Raises InputError for anything that stands in the way;
    `destination` then does not exist.
    """
    source, destination = Path(source), Path(destination)
    if engine not in ENGINES:
        raise InputError(f"engine: expected one of {', '.join(ENGINES)}, found {engine!r}")
    if Path(os.path.realpath(destination)).is_relative_to(os.path.realpath(source)):
        raise InputError(f"{destination}: expected a folder outside the source {source}, which stays as it is")
    request = Request(basis, dtype, rest_dtype, tuple(layers_open), tuple(remove), parallel_removes)
    reader = CheckpointReader(source, device)
    problems: list[str] = []
    with new_folder(destination) as folder:
        plan = prepare(reader, request, max_shard_size)
        needed, free = plan.bytes[1], shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(f"{destination}: expected {needed:,} bytes of free disk space, found {free:,}")
        progress(plan, None)
        for file in reader.other_files():
            (folder / file.parent).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, folder / file)
        writer = CheckpointWriter(folder, plan.outputs)
        for task, done in ENGINES[engine](plan, reader, writer):
            problems += done.problems
            progress(plan, task)
        writer.finish()
        for model_file in MODEL_FILES:
            shutil.copyfile(model_file, folder / model_file.name)
        write_json(folder / "config.json", plan.config)
    if problems:
        logger.warning(
            "%s%s; run skipless verify, and if it says no, use --basis pivoted or a finer --dtype, or leave it open",
            problems[0],
            f" (and {len(problems) - 1} more layers)" if len(problems) > 1 else "",
        )
    return plan


def _fused_config(config: Mapping[str, object], target: Architecture, dtype: str | None) -> dict[str, object]:
    """The source's config.json with what fusing changes.

    Raises InputError naming the field when the model file would refuse it.
    """
    fields: dict[str, object] = {"stream_basis": target.stream_basis, "p_removed": target.p_removed}
    fields |= {name: True for name in ("values_removed", "head_removed") if getattr(target, name)}
    fields |= {name: list(names) for name in ("norms_removed", "gains_removed") if (names := getattr(target, name))}
    if target.rest_dtype is not None:
        fields["rest_dtype"] = target.rest_dtype
    fields |= {"layers_open": list(target.layers_open), "folded_biases": list(target.folded_biases)}
    if dtype is not None:
        fields["dtype"] = dtype
    kept = {name: value for name, value in config.items() if not (dtype and name == "torch_dtype")}
    fused = {**kept, "architectures": ["SkiplessForCausalLM"], "auto_map": AUTO_MAP, **fields}
    try:
        SkiplessConfig.from_dict(copy.deepcopy(fused))
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise InputError(f"config.json: {' '.join(str(error.__cause__ or error).split())}") from error
    return fused

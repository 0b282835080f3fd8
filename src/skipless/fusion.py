"""Rewrite a skipless checkpoint without the weights it does not need: plan from headers, then stream the tensors.

The plan is pure (no tensor is read); a task is everything that must be in memory together, and tasks are independent
of each other, so that an engine may run them in any order and anywhere.
"""

import copy
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from skipless.architecture import Architecture, Module
from skipless.basis import choose
from skipless.checkpoint.reader import CheckpointReader, TensorInfo
from skipless.checkpoint.writer import CheckpointWriter, new_folder, plan_shards, write_json
from skipless.dtypes import DTYPE_NAMES
from skipless.eliminate import Affine, close
from skipless.errors import InputError
from skipless.model.configuration_skipless import SkiplessConfig
from skipless.seams import Seam, closed, seams

logger = logging.getLogger("skipless")

BASES = ("q", "k", "v")
# Relative error of k and v above which a layer's result is visibly not the original's.
LOSS_TO_WARN_OF = 1e-2
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
    """What a task gives: the tensors to write, and the condition numbers of the modules it turned into the identity."""

    tensors: Iterator[tuple[str, torch.Tensor]]
    conditions: Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """All that a fuse will do. `inputs`, `outputs`: every tensor of source and result; `config`: the new one."""

    source: Architecture
    target: Architecture
    basis: str
    tasks: tuple[Task, ...]
    inputs: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]
    config: Mapping[str, object]

    @cached_property
    def modules(self) -> tuple[dict[str, Module], dict[str, Module]]:
        """The modules of source and target by name."""
        before, after = (
            {module.name: module for module in architecture.modules()} for architecture in (self.source, self.target)
        )
        return before, after

    @property
    def weights(self) -> tuple[int, int]:
        """Numbers stored before and after, biases included."""
        before, after = (sum(info.weights for info in tensors.values()) for tensors in (self.inputs, self.outputs))
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
            "tasks": len(self.tasks),
            "weights_before": before,
            "weights_after": after,
            "bytes_before": bytes_before,
            "bytes_after": bytes_after,
            "shards": sorted({info.shard for info in self.outputs.values()}),
        }


def make_plan(
    reader: CheckpointReader,
    *,
    basis: str = "q",
    dtype: str | None = None,
    layers_open: Iterable[int] = (),
    max_shard_size: int = 5 * 10**9,
) -> Plan:
    """Plan from config.json and headers alone which seams are closed, and what is read and written for each.

    basis: the projection that becomes the identity, "q", "k" or "v" (Fig. 1 b, c, d). dtype: that of every output
    tensor (None: each keeps its own). layers_open: layers that keep theirs. max_shard_size in bytes.
    Raises InputError for a checkpoint that contradicts its config, a blocked seam, or nothing to remove.
    """
    source = Architecture.from_config(reader.config)
    if source.num_hidden_layers > len(reader.tensors):
        raise InputError(
            f"config.json: num_hidden_layers: expected at most {len(reader.tensors)}, the number of tensors, found "
            f"{source.num_hidden_layers}"
        )
    reader.check(source.tensors())
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPE_NAMES)}, found {dtype!r}")
    closing = _choose(source, basis, frozenset(layers_open))
    target = closed(source, closing, basis)

    outputs = {}
    for name, shape in target.tensors().items():
        kept = reader.tensors.get(name) or reader.tensors[name.removesuffix("bias") + "weight"]
        outputs[name] = (shape, kept.dtype if dtype is None else getattr(torch, dtype))
    return Plan(
        source=source,
        target=target,
        basis=basis,
        tasks=_tasks(source, target, closing),
        inputs=reader.tensors,
        outputs=plan_shards(outputs, max_shard_size),
        config=_fused_config(reader.config, target, dtype),
    )


def _tasks(source: Architecture, target: Architecture, closing: Iterable[Seam]) -> tuple[Task, ...]:
    """One task per group of seams that share modules, one per tensor that stays as it is, in the output's order."""
    before, after = ({module.name: module for module in side.modules()} for side in (source, target))
    writer_of = {name: Task((), (name,), (name,)) for name in target.tensors()}
    for group in _connected(closing):
        names = list(dict.fromkeys(name for seam in group for name in seam.modules))
        reads = tuple(tensor for name in names for tensor in before[name].tensors())
        writes = tuple(tensor for name in names if name in after for tensor in after[name].tensors())
        writer_of.update(dict.fromkeys(writes, Task(tuple(group), reads, writes)))
    return tuple(dict.fromkeys(writer_of[name] for name in target.tensors()))


def _choose(source: Architecture, basis: str, layers_open: frozenset[int]) -> list[Seam]:
    """The seams to close, or InputError when one of them cannot be."""
    if basis not in BASES:
        raise InputError(f"basis: expected one of {', '.join(BASES)}, found {basis!r}")
    if beyond := sorted(layer for layer in layers_open if not 0 <= layer < source.num_hidden_layers):
        raise InputError(f"layers_open: expected layers 0..{source.num_hidden_layers - 1}, found {beyond[0]}")
    if source.stream_basis not in (None, basis):
        raise InputError(
            f"basis: expected {source.stream_basis!r}, in which this model is already fused; found {basis!r}"
        )
    closing = [seam for seam in seams(source) if not (seam.kind == "stream" and seam.layer in layers_open)]
    if not closing:
        raise InputError("nothing to remove: every seam of this model is closed already, or left open on request")
    for seam in closing:
        if seam.blocked:
            raise InputError(f"the {seam.kind} seam of layer {seam.layer} is blocked by {seam.blocked}")
    for seam in closing:
        if seam.kind == "stream" and basis not in seam.identities:
            square = " or ".join(f"--basis {name}" for name in seam.identities) or (
                f"none is, so leave the stream seams open with --layers-open "
                f"{','.join(map(str, range(source.num_hidden_layers)))}"
            )
            raise InputError(
                f"basis: expected a square projection, found {basis}_proj ({source.projections[basis]}, "
                f"{source.hidden_size}) in layer {seam.layer}; use one that is square: {square}"
            )
    return closing


def _connected(closing: Iterable[Seam]) -> list[list[Seam]]:
    """Group seams that share a module, in order: they must be closed one after the other on the same tensors."""
    groups: list[list[Seam]] = []
    for seam in closing:
        touching = [group for group in groups if any(set(seam.modules) & set(other.modules) for other in group)]
        groups = [group for group in groups if group not in touching]
        groups.append([*(other for group in touching for other in group), seam])
    return groups


def run_task(plan: Plan, task: Task, read: Callable[[str], torch.Tensor]) -> Done:
    """Carry out one task: read its tensors, close its seams in fp64, and hand out what is to be written, cast once."""
    if not task.seams:
        (name,) = task.writes
        return Done(iter([(name, read(name).to(plan.outputs[name].dtype))]), {})
    before, after = plan.modules
    names = dict.fromkeys(name for seam in task.seams for name in seam.modules)
    affines = {name: _load(before[name], after.get(name), read) for name in names}
    conditions = {}
    for seam in task.seams:
        gone = seam.removed(plan.basis)
        basis = None
        if gone in seam.readers:
            basis = choose(seam, gone, {name: affines[name].weight for name in seam.readers})
            conditions[gone] = basis.condition
        remaining = close(seam, gone, affines, basis)
        for name in seam.modules:
            affines.pop(name, None)
        affines |= remaining
    return Done(_stored(plan, affines), conditions)


def _stored(plan: Plan, affines: Mapping[str, Affine]) -> Iterator[tuple[str, torch.Tensor]]:
    """Modules as the checkpoint stores them, in the output's dtype."""
    _, after = plan.modules
    for name, affine in affines.items():
        weight = affine.weight if after[name].table else affine.weight.T
        yield f"{name}.weight", weight.to(plan.outputs[f"{name}.weight"].dtype)
        if affine.bias is not None:
            yield f"{name}.bias", affine.bias.to(plan.outputs[f"{name}.bias"].dtype)


def _load(module: Module, closed: Module | None, read: Callable[[str], torch.Tensor]) -> Affine:
    """A module's map in fp64. A table without a bias of its own afterwards takes biases into its rows."""
    # Always a copy: read from the file, its address and so the last bits of a product would depend on the sharding.
    weight = read(f"{module.name}.weight").to(torch.float64, copy=True)
    bias = read(f"{module.name}.bias").to(torch.float64) if module.bias else None
    one_hot = module.table and closed is not None and not closed.bias
    return Affine(weight if module.table else weight.T, bias, one_hot)


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
    basis: str = "q",
    dtype: str | None = None,
    layers_open: Iterable[int] = (),
    max_shard_size: int = 5 * 10**9,
    engine: str = "local",
    progress: Callable[[Plan, Task | None], None] = lambda plan, task: None,
) -> Plan:
    """Write `source` without Q (or K, V) and P into the new folder `destination`, and return what was done.

    Arguments as for make_plan; `progress` is called with None once the plan is made and then with each finished task.
    The result computes the same function (identities: arXiv:2404.12362, Fig. 1). Raises InputError for anything that
    stands in the way; `destination` then does not exist.
    """
    source, destination = Path(source), Path(destination)
    if engine not in ENGINES:
        raise InputError(f"engine: expected one of {', '.join(ENGINES)}, found {engine!r}")
    if Path(os.path.realpath(destination)).is_relative_to(os.path.realpath(source)):
        raise InputError(f"{destination}: expected a folder outside the source {source}, which stays as it is")
    reader = CheckpointReader(source)
    plan = make_plan(reader, basis=basis, dtype=dtype, layers_open=layers_open, max_shard_size=max_shard_size)
    conditions: dict[str, float] = {}
    with new_folder(destination) as folder:
        needed, free = plan.bytes[1], shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(f"{destination}: expected {needed:,} bytes of free disk space, found {free:,}")
        progress(plan, None)
        for file in reader.other_files():
            (folder / file.parent).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, folder / file)
        writer = CheckpointWriter(folder, plan.outputs)
        for task, done in ENGINES[engine](plan, reader, writer):
            conditions |= done.conditions
            progress(plan, task)
        writer.finish()
        for model_file in MODEL_FILES:
            shutil.copyfile(model_file, folder / model_file.name)
        write_json(folder / "config.json", plan.config)
    _warn(plan, conditions)
    return plan


def _warn(plan: Plan, conditions: Mapping[str, float]) -> None:
    """Say when storing the result rounds too much: the dtype's rounding times the worst condition number."""
    worst = max(conditions, key=conditions.__getitem__, default=None)
    rounding = max(torch.finfo(info.dtype).eps for info in plan.outputs.values()) / 2
    if worst is not None and conditions[worst] * rounding > LOSS_TO_WARN_OF:
        logger.warning(
            "%s has a condition number of %.1e, which multiplies the rounding of what is stored: run skipless verify, "
            "and if it says no, store in a finer dtype or leave that layer open",
            worst,
            conditions[worst],
        )


def _fused_config(config: Mapping[str, object], target: Architecture, dtype: str | None) -> dict[str, object]:
    """The source's config.json with what fusing changes.

    Raises InputError naming the field when the model file would refuse it.
    """
    fields: dict[str, object] = {"stream_basis": target.stream_basis, "p_removed": target.p_removed}
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

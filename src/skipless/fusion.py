"""Rewrite a skipless checkpoint without the weights it does not need: plan from headers, then stream the tensors."""

import dataclasses
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch

from skipless import __version__
from skipless.checkpoint.manifest import Record
from skipless.checkpoint.reader import CheckpointReader
from skipless.checkpoint.staging import Staging, check_destination, previous, staged
from skipless.checkpoint.writer import CheckpointWriter, write_json
from skipless.engines import ENGINES
from skipless.errors import InputError
from skipless.planning import Plan, Task, prepare
from skipless.request import AUTO, Request
from skipless.seams import REMOVABLE

logger = logging.getLogger("skipless")

MODEL_FILES = tuple(
    Path(__file__).parent / "model" / name for name in ("configuration_skipless.py", "modeling_skipless.py")
)


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
    resume: bool = False,
    progress: Callable[[Plan, Task | None], None] = lambda plan, task: None,
) -> Plan:
    """Write `source` without Q (or K, V) and P into the new folder `destination`, and return what was done.

    basis, dtype, rest_dtype, layers_open, remove, parallel_removes: what is asked for (request.Request). max_shard_size
    in bytes. device: where the algebra is done, "cpu" or a CUDA device (their results differ in the last bits).
    resume: go on where an earlier call with the same arguments was stopped; the result is the same, bit for bit.
    `progress` is called with None once the plan is made and then with each task that is done. The result computes the
    same function (identities: arXiv:2404.12362, Fig. 1). Raises InputError for anything that stands in the way;
    `destination` then does not exist. What is on disk when the disk fails or the process is stopped is kept.
    """
    source, destination = Path(source), Path(destination)
    request = Request(basis, dtype, rest_dtype, tuple(layers_open), tuple(remove), parallel_removes)
    plan, reader = plan_fuse(source, destination, request, max_shard_size, engine, device, resume)
    problems: list[str] = []
    with staged(destination, _job(plan, reader, request, max_shard_size), resume) as staging:
        progress(plan, None)
        _copy_others(reader, staging.folder)
        problems = _execute(plan, reader, staging, engine, progress)
        for model_file in MODEL_FILES:
            shutil.copyfile(model_file, staging.folder / model_file.name)
        write_json(staging.folder / "config.json", plan.config)
        reader.check_unchanged()
    if problems:
        logger.warning(
            "%s%s; run skipless verify, and if it says no, use --basis pivoted or a finer --dtype, or leave it open",
            problems[0],
            f" (and {len(problems) - 1} more layers)" if len(problems) > 1 else "",
        )
    return plan


def plan_fuse(
    source: Path,
    destination: Path,
    request: Request,
    max_shard_size: int,
    engine: str = "local",
    device: str = "cpu",
    resume: bool = False,
) -> tuple[Plan, CheckpointReader]:
    """All that a fuse will do, and everything refused that can be before the first write; arguments as for fuse."""
    if engine not in ENGINES:
        raise InputError(f"engine: expected one of {', '.join(ENGINES)}, found {engine!r}")
    if Path(os.path.realpath(destination)).is_relative_to(os.path.realpath(source)):
        raise InputError(f"{destination}: expected a folder outside the source {source}, which stays as it is")
    check_destination(destination)
    reader = CheckpointReader(source, device)
    begun = previous(destination) if resume else None
    if begun is not None and request.basis == AUTO:  # decided before, from the same weights (staged sees to that)
        request = dataclasses.replace(request, basis=begun.job["basis"])
        plan = dataclasses.replace(prepare(reader, request, max_shard_size), reason=begun.job["reason"])
    else:
        plan = prepare(reader, request, max_shard_size)
    needed = plan.bytes[1] + sum((source / file).stat().st_size for file in reader.other_files())
    free = shutil.disk_usage(destination.parent).free
    if begun is None and needed > free:
        raise InputError(f"{destination}: expected {needed:,} bytes of free disk space, found {free:,}")
    return plan, reader


def _job(plan: Plan, reader: CheckpointReader, request: Request, max_shard_size: int) -> dict[str, Any]:
    """What must be the same for two runs to write the same bytes."""
    return {
        "source": str(reader.folder.resolve()),
        "files": reader.fingerprint(),
        "options": {**dataclasses.asdict(request), "max_shard_size": max_shard_size},
        "device": str(reader.device),
        "basis": plan.basis,
        "reason": plan.reason,
        "versions": {"skipless": __version__, "torch": torch.__version__, "numpy": numpy.__version__}
        | {"scipy": scipy.__version__, "cpu": torch.backends.cpu.get_cpu_capability()},
        "threads": torch.get_num_threads(),
        "outputs": hashlib.sha256(repr((plan.tasks, dict(plan.outputs), plan.config)).encode()).hexdigest(),
    }


def _copy_others(reader: CheckpointReader, folder: Path) -> None:
    for file in reader.other_files():
        (folder / file.parent).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(reader.folder / file, folder / file)


def _execute(
    plan: Plan,
    reader: CheckpointReader,
    staging: Staging,
    engine: str,
    progress: Callable[[Plan, Task | None], None],
) -> list[str]:
    """Carry out the tasks that are not done, writing behind them, and check what was written; what is wrong with it."""
    manifest = staging.manifest
    writer = CheckpointWriter(staging.folder, plan.outputs)
    for number, record in list(manifest.done.items()):
        if all(writer.digest(name) == digest for name, digest in record.digests.items()):
            progress(plan, plan.tasks[number])
        else:
            del manifest.done[number]
    todo = [number for number in range(len(plan.tasks)) if number not in manifest.done]
    with ThreadPoolExecutor(1, "writing") as behind:
        writing: Future[object] = behind.submit(int)
        for number, done in ENGINES[engine](plan, reader, todo):
            digests: dict[str, str] = {}
            for name, tensor in done.tensors:
                writing.result()  # one tensor is written while the next is computed
                writing = behind.submit(_write, writer, name, tensor, digests)
                del tensor
            writing.result()
            writing = behind.submit(manifest.record, number, Record(digests, done.problems))
            progress(plan, plan.tasks[number])
        writing.result()
    writer.finish({name: digest for record in manifest.done.values() for name, digest in record.digests.items()})
    return [problem for _, record in sorted(manifest.done.items()) for problem in record.problems]


def _write(writer: CheckpointWriter, name: str, tensor: torch.Tensor, digests: dict[str, str]) -> None:
    digests[name] = writer.write(name, tensor)

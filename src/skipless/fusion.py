"""Rewrite a skipless checkpoint without the weights it does not need: plan from headers, then stream the tensors."""

import dataclasses
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skipless.behind import Behind
from skipless.casting import underflows
from skipless.checkpoint.digests import Digests
from skipless.checkpoint.manifest import Entry, Manifest
from skipless.checkpoint.reader import CheckpointReader
from skipless.checkpoint.remote import RemotePlace, located, open_reader, shown
from skipless.checkpoint.staging import LocalPlace, Place, Staging, staged
from skipless.checkpoint.writer import CheckpointWriter, write_json
from skipless.closing import Done
from skipless.cost import waiting
from skipless.engines import Engine, choose_engine, environment
from skipless.errors import BugError, InputError
from skipless.estimate import Estimate, estimate, within_memory
from skipless.machine import available_memory, measure, resident_memory
from skipless.model_files import MODEL_FILES, copy_model_files
from skipless.planning import Plan, Task, prepare
from skipless.prediction import Outcome
from skipless.probe import Difference, check_fused
from skipless.record import RECORD, write_record
from skipless.request import AUTO, Request
from skipless.seams import REMOVABLE

logger = logging.getLogger("skipless")


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
    max_memory: int | None = None,
    engine: str = "local",
    address: str | None = None,
    device: str = "cpu",
    resume: bool = False,
    progress: Callable[[Plan, Task | None], None] = lambda plan, task: None,
) -> Plan:
    """Write `source` without Q (or K, V) and P into the new folder `destination`, and return what was done.

    basis, dtype, rest_dtype, layers_open, remove, parallel_removes: what is asked for (request.Request). max_shard_size
    in bytes; max_memory: of this process, if it computes, in bytes (None: what is free). engine: "local", or "ray" with
    the cluster at `address` (None: one on this machine). device: where the algebra is done, "cpu" or a CUDA device
    (their results differ in the last bits). resume: go on where an earlier call with the same arguments was stopped;
    the result is the same, bit for bit. `progress` is called with None once the plan is made and then with each task
    that is done. The result computes the same function (identities: arXiv:2404.12362, Fig. 1). Raises InputError for
    anything that stands in the way; `destination` then does not exist. What is on disk when the disk fails or the
    process is stopped is kept.
    """
    request = Request(basis, dtype, rest_dtype, tuple(layers_open), tuple(remove), parallel_removes)
    job = plan_fuse(source, destination, request, max_shard_size, max_memory, engine, address, device, resume)
    plan, reader = job.plan, job.reader
    with staged(job.place, job.manifest(), resume) as staging:
        progress(plan, None)
        _copy_others(reader, staging.folder)
        shards = _execute(job, staging, progress)
        copy_model_files(staging.folder)
        write_json(staging.folder / "config.json", plan.config)
        entries = [entry for _, entry in sorted(staging.manifest.done.items())]
        outcomes = [Outcome(**outcome) for entry in entries for outcome in entry.outcomes]
        sources = _sources(entry.sources for entry in entries)
        differences = _check(plan, reader, CheckpointReader(staging.folder), outcomes, sources)
        reader.check_unchanged()
        made = job.made() | {"check": {each.name: [each.error, each.limit] for each in differences}}
        write_record(staging.folder, reader, made, sources, outcomes, shards)
    problems = [outcome.problem for outcome in outcomes if outcome.problem is not None]
    if problems:
        logger.warning(
            "%s%s; run skipless verify, and if it says no, use --basis pivoted or a finer --dtype, or leave it open",
            problems[0],
            f" (and {len(problems) - 1} more layers)" if len(problems) > 1 else "",
        )
    return plan


@dataclass(frozen=True)
class Job:
    """A fuse that nothing stands in the way of: what was asked for, who does it, from where, to where, and how."""

    request: Request
    max_shard_size: int
    engine: Engine
    place: Place
    reader: CheckpointReader
    plan: Plan

    def estimate(self) -> Estimate:
        """What it will cost, by rates that are measured now."""
        rates = measure(self.reader.sample, self.reader.device)
        return estimate(self.plan, rates, resident_memory())

    def made(self) -> dict[str, Any]:
        """By what and how the result is made."""
        return {
            "options": {**dataclasses.asdict(self.request), "max_shard_size": self.max_shard_size},
            "device": str(self.reader.device),
            "basis": self.plan.basis,
            "reason": self.plan.reason,
            "environment": environment(),
        }

    def manifest(self) -> dict[str, Any]:
        """What must be the same for two runs to write the same bytes."""
        plan = self.plan
        return {
            "source": self.reader.name,
            "files": self.reader.fingerprint(),
            **self.made(),
            "outputs": hashlib.sha256(repr((plan.tasks, dict(plan.outputs), plan.config)).encode()).hexdigest(),
        }


def plan_fuse(
    source: str | Path,
    destination: str | Path,
    request: Request,
    max_shard_size: int,
    max_memory: int | None = None,
    engine: str = "local",
    address: str | None = None,
    device: str = "cpu",
    resume: bool = False,
) -> Job:
    """All that a fuse will do, and everything refused that can be before the first write; arguments as for fuse."""
    chosen = choose_engine(engine, address)
    place = destination_place(destination)
    if _is_within(place, located(source)):
        raise InputError(f"{place}: expected a folder outside the source {shown(source)}, which stays as it is")
    place.check()
    reader = open_reader(source, device)
    here = reader.device.type == "cpu" and engine == "local"
    if max_memory is not None and not here:
        raise InputError("max_memory: expected none with another engine or device than local and cpu; leave it out")
    limit = resident_memory() + available_memory() if max_memory is None else max_memory
    begun = Manifest.load(place.unfinished) if resume else None
    if begun is not None and request.basis == AUTO:  # decided before, from the same weights (staged sees to that)
        decided = dataclasses.replace(request, basis=begun.job["basis"])
        plan = dataclasses.replace(prepare(reader, decided, max_shard_size), reason=begun.job["reason"])
    else:
        plan = prepare(reader, request, max_shard_size, resident_memory(), limit if here else None)
    needed = plan.bytes[1] + sum((reader.folder / file).stat().st_size for file in reader.other_files())
    free = shutil.disk_usage(place.disk).free
    if begun is None and needed > free:
        raise InputError(f"{place}: expected {needed:,} bytes of free disk space, found {free:,}")
    if here:
        plan = within_memory(plan, resident_memory(), limit)
    for found in underflows(plan.inputs, _copied(plan), reader.tensor):
        raise InputError(str(found))
    return Job(request, max_shard_size, chosen, place, reader, plan)


def destination_place(destination: str | Path) -> Place:
    """Where DST is to be: at a path or a URL."""
    found = located(destination)
    return RemotePlace(found) if isinstance(found, str) else LocalPlace(found)


def _is_within(place: Place, source: str | Path) -> bool:
    """Whether what is to be at a place would be written into the source."""
    if isinstance(source, str):
        return f"{place}/".startswith(f"{shown(source).rstrip('/')}/")
    written = place.path if isinstance(place, LocalPlace) else place.unfinished
    return Path(os.path.realpath(written)).is_relative_to(os.path.realpath(source))


def _copied(plan: Plan) -> dict[str, torch.dtype]:
    """Tensors that no seam rewrites, and the dtypes that they are cast to."""
    names = (name for task in plan.tasks if not task.seams for name in task.writes)
    return {name: plan.outputs[name].dtype for name in names if not plan.outputs[name].is_index}


def _sources(read: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The SHA-256 of each tensor of the source that was read. Raises InputError for one that has two."""
    found: dict[str, str] = {}
    for name, digest in (item for each in read for item in each.items()):
        if found.setdefault(name, digest) != digest:
            raise InputError(
                f"{name}: expected the bytes that were read of it before, found others: the source has changed "
                f"meanwhile; let nothing write to it, and begin anew"
            )
    return found


def _check(
    plan: Plan,
    source: CheckpointReader,
    fused: CheckpointReader,
    outcomes: Sequence[Outcome],
    sources: Mapping[str, str],
) -> list[Difference]:
    """As check_fused; what biases or gains that became zero have spoiled is no bug, nor what a changed source has."""
    with Digests(source, overwritten=True) as digests:  # so that nothing waits in memory
        try:
            return check_fused(plan, source.config, digests, fused, outcomes)
        except BugError:
            for found in underflows(plan.inputs, _copied(plan), source.tensor, vectors=True):
                raise InputError(str(found)) from None
            raise
        finally:
            _sources([sources, digests.finish()])


def _copy_others(reader: CheckpointReader, folder: Path) -> None:
    ours = {RECORD, *(file.name for file in MODEL_FILES)}
    files = [file for file in reader.other_files() if str(file) not in ours]
    if code := [str(file) for file in files if file.suffix == ".py"]:
        logger.warning("copied %s: code of the source's, which trust_remote_code=True may run", ", ".join(code))
    for file in files:
        (folder / file.parent).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(reader.fetch(file), folder / file)


def _execute(job: Job, staging: Staging, progress: Callable[[Plan, Task | None], None]) -> dict[str, str]:
    """Carry out the tasks that are not done, writing behind them, and read what was written again; SHA-256 by file."""
    plan = job.plan
    manifest = staging.manifest
    writer = CheckpointWriter(staging.folder, plan.outputs)
    for number, entry in list(manifest.done.items()):
        if all(writer.digest(name) == digest for name, digest in entry.digests.items()):
            progress(plan, plan.tasks[number])
        else:
            del manifest.done[number]
    todo = [number for number in range(len(plan.tasks)) if number not in manifest.done]
    behind = Behind("writing", waiting(plan))
    try:
        with closing(job.engine(plan, job.reader, todo)) as results:
            for number, done in results:
                digests: dict[str, str] = {}
                for name, tensor in done.tensors:
                    behind.add(tensor.nbytes, _write, writer, name, tensor, digests)
                    del tensor
                behind.add(0, _journal, manifest, number, plan.tasks[number], digests, done)
                progress(plan, plan.tasks[number])
            behind.finish()
    finally:
        behind.close()
    return writer.finish({name: digest for entry in manifest.done.values() for name, digest in entry.digests.items()})


def _write(writer: CheckpointWriter, name: str, tensor: torch.Tensor, digests: dict[str, str]) -> None:
    digest = writer.write(name, tensor)
    if digest is not None:
        digests[name] = digest


def _journal(manifest: Manifest, number: int, task: Task, digests: dict[str, str], done: Done) -> None:
    if digests.keys() == set(task.writes):  # else a write has failed, which is about to be noticed
        manifest.add(number, Entry(digests, done.sources, tuple(map(dataclasses.asdict, done.outcomes))))

"""Rewrite a skipless checkpoint without the weights it does not need: plan from headers, then stream the tensors."""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skipless.algebra.forecast import Outcome
from skipless.algebra.linalg import slices
from skipless.algebra.rounding import rounding_error
from skipless.algebra.tolerances import tolerance
from skipless.architecture.seams import AUTO
from skipless.checkpoint import files
from skipless.checkpoint.digests import Behind, Digests
from skipless.checkpoint.family import family_of
from skipless.checkpoint.headers import INDEX
from skipless.checkpoint.manifest import JOURNAL, Entry, Manifest
from skipless.checkpoint.opening import RowReader, by_our_names
from skipless.checkpoint.others import tell_left_out, unused
from skipless.checkpoint.reader import CheckpointReader
from skipless.checkpoint.remote import RemoteDestination, located, open_reader, shown
from skipless.checkpoint.staging import Destination, LocalDestination, Staging, staged
from skipless.checkpoint.writer import CheckpointWriter, write_json
from skipless.errors import BugError, InputError
from skipless.log import logger
from skipless.rewrite.card import CARD, MOST, card, named
from skipless.rewrite.casting import CAST, underflows
from skipless.rewrite.cost import Estimate, estimate, waiting, within_memory
from skipless.rewrite.execution import Done
from skipless.rewrite.executors import Executor, choose_executor
from skipless.rewrite.machine import available_memory, environment, measure, resident_memory
from skipless.rewrite.maps import check_moved
from skipless.rewrite.model_files import MODEL_FILES, OURS
from skipless.rewrite.planning import Plan, Task, prepare
from skipless.rewrite.probe import Checked, Difference, check_fused
from skipless.rewrite.record import RECORD, write_record
from skipless.rewrite.request import Request

# Of a table that are compared at a time.
TABLE_ROWS = 4096


def fuse(
    source: str | Path,
    destination: str | Path,
    *,
    basis: str = AUTO,
    dtype: str | None = None,
    rest_dtype: str | None = None,
    layers_open: Iterable[int] = (),
    remove: Iterable[str] | None = None,
    parallel_removes: str = "readers",
    layout: str | None = None,
    max_shard_size: int = 5 * 10**9,
    max_memory: int | None = None,
    engine: str = "local",
    address: str | None = None,
    device: str = "cpu",
    copy: Iterable[str] = (),
    resume: bool = False,
    progress: Callable[[Plan, Task | None], None] = lambda plan, task: None,
) -> Plan:
    """Write `source` without Q (or K, V) and P into the new folder `destination`, and return what was done.

    The result computes the same function (identities: arXiv:2404.12362, Fig. 1). In a model with skips and norms, of
    any family that is described, norms' gains and biases are moved instead (architecture/folds.py).

    basis, dtype, rest_dtype, layers_open, remove, parallel_removes, layout: what is asked for (request.Request).
    max_shard_size: in bytes. max_memory: of this process, if it computes, in bytes (None: what is free). engine:
    "local", or "ray" with the cluster at `address` (None: one on this machine). device: where the algebra is done,
    "cpu" or a CUDA device (their results differ in the last bits). copy: shell patterns of files of `source` that are
    copied along beside tokenizer, licence and the like (checkpoint/others.py). resume: go on where an earlier call with
    the same arguments was stopped; the result is the same, bit for bit. progress: called with None once the plan is
    made, and then with each task that is done.
    Raises InputError for anything that stands in the way; `destination` then does not exist. When the disk fails or the
    process is stopped, what is done is kept.
    """
    kinds = None if remove is None else tuple(remove)
    request = Request(basis, dtype, rest_dtype, tuple(layers_open), kinds, parallel_removes, layout)
    job = plan_fuse(
        source, destination, request, max_shard_size, max_memory, engine, address, device, resume, tuple(copy)
    )
    plan, reader = job.plan, job.reader
    _check_tied(plan, reader)
    with _resuming(job), staged(job.destination, job.manifest(), job.files(), resume) as staging:
        progress(plan, None)
        _copy_others(job, staging.folder)
        shards = _execute(job, staging, progress)
        write_json(staging.folder / "config.json", plan.config)
        entries = [entry for _, entry in sorted(staging.manifest.done.items())]
        outcomes = [Outcome(**outcome) for entry in entries for outcome in entry.outcomes]
        sources = _sources(entry.sources for entry in entries)
        checked = _check(plan, reader, CheckpointReader(staging.folder), outcomes, sources)
        reader.check_unchanged()
        made = job.made() | {"check": _errors(checked.differences), "losses": _errors(checked.losses)}
        write_record(staging.folder, reader, made, sources, outcomes, shards, job.copy)
    _warn(plan, outcomes, checked.losses)
    return plan


def _warn(plan: Plan, outcomes: Iterable[Outcome], losses: Sequence[Difference]) -> None:
    """Of what loses more than it may: of seams by their forecasts, or, if none of these says so, as it was found."""
    problems = [outcome.problem for outcome in outcomes if outcome.problem is not None]
    problems = problems or [
        f"{each.name} is off by {each.error:.1e}, above the {each.limit:.1e} that storing the source so may cost"
        for each in losses
    ]
    if problems:
        logger.warning(
            "%s%s; run skipless verify, and if it says no, use %s",
            problems[0],
            f" (and {len(problems) - 1} more)" if len(problems) > 1 else "",
            "--basis pivoted or a finer --dtype, or leave it open" if "stream" in plan.kinds else "a finer --dtype",
        )


def _errors(differences: Iterable[Difference]) -> dict[str, list[float]]:
    """As JSON has them: of each output what it is off by, and what it may be."""
    return {each.name: [each.error, each.limit] for each in differences}


@dataclass(frozen=True)
class Job:
    """A fuse that can start: all checks that need no tensor have passed.

    copy: patterns of what is copied along beside the usual; copied: files of the source, all that is copied along.
    begun: whether an earlier process has done some of its tasks.
    """

    request: Request
    max_shard_size: int
    executor: Executor
    destination: Destination
    reader: CheckpointReader
    plan: Plan
    copy: tuple[str, ...]
    copied: tuple[Path, ...]
    begun: bool

    def estimate(self) -> Estimate:
        """What it will cost, by rates that are measured now."""
        rates = measure(self.reader.sample, self.reader.device)
        return estimate(self.plan, rates, resident_memory())

    def made(self) -> dict[str, Any]:
        """By what and how the result is made."""
        return {
            "options": {
                **dataclasses.asdict(self.request),
                "max_shard_size": self.max_shard_size,
                "copy": self.copy,
            },
            "device": str(self.reader.device),
            "basis": self.plan.basis,
            "reason": self.plan.reason,
            "environment": environment(),
        }

    def files(self) -> tuple[Path, ...]:
        """All that is written, relative to the new folder."""
        shards = [*self.plan.shards, INDEX] if len(self.plan.shards) > 1 else [*self.plan.shards]
        own = (RECORD, *(file.name for file in model_files(self.plan)))
        return (*map(Path, ("config.json", *shards, *sorted(own))), *{*self.copied, Path(CARD)})

    def manifest(self) -> dict[str, Any]:
        """What must be the same for two runs to write the same bytes."""
        plan = self.plan
        return {
            "source": self.reader.name,
            "files": self.reader.fingerprint(self.copy),
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
    copy: tuple[str, ...] = (),
) -> Job:
    """All that a fuse will do, and everything refused that can be before the first write; arguments as for fuse."""
    chosen = choose_executor(engine, address)
    dst = destination_at(destination)
    location = located(source)
    if _is_within(dst, location):
        raise InputError(f"{dst}: expected a folder outside the source {shown(source)}, which stays as it is")
    if isinstance(location, Path):
        _check_outside(dst, [location])
    dst.check()
    reader = open_reader(source, device)
    request = request.of(family_of(reader.config))
    copied = [file for file in reader.other_files(copy) if str(file) not in OURS]
    _check_outside(dst, map(reader.path, ("config.json", *reader.shards, *map(str, copied))))
    for pattern in unused(copy, copied):
        raise InputError(f"copy: expected a pattern that names a file to copy, found {pattern!r}, which names none")
    here = reader.device.type == "cpu" and engine == "local"
    if max_memory is not None and not here:
        raise InputError("max_memory: expected none with another engine or device than local and cpu; leave it out")
    limit = resident_memory() + available_memory() if max_memory is None else max_memory
    begun = Manifest.load(dst.unfinished) if resume else None
    if begun is not None and request.basis == AUTO:  # decided before, from the same weights (staged sees to that)
        decided = dataclasses.replace(request, basis=begun.job["basis"])
        plan = dataclasses.replace(prepare(reader, decided, max_shard_size), reason=begun.job["reason"])
    else:
        plan = prepare(reader, request, max_shard_size, resident_memory(), limit if here else None)
    needed = plan.bytes[1] + sum(
        file.stat().st_size for file in (*model_files(plan), *(reader.folder / each for each in copied))
    )
    free = shutil.disk_usage(dst.disk).free
    if begun is None and needed > free:
        raise InputError(f"{dst}: expected {needed:,} bytes of free disk space, found {free:,}")
    if here:
        plan = within_memory(plan, resident_memory(), limit)
    for lost in underflows(plan.renamed, _copied(plan), _renamed(plan, reader).tensor):
        raise InputError(str(lost))
    tell_left_out([name for name in reader.left_out(copy) if name not in OURS])
    return Job(request, max_shard_size, chosen, dst, reader, plan, copy, tuple(copied), bool(begun and begun.done))


def _check_tied(plan: Plan, reader: CheckpointReader) -> None:
    """Raise InputError for a head that is stored beside the table it is tied to, and another, which runs untied."""
    layout = None if plan.in_place else plan.layout
    if layout is None or (head := layout.tied_head) is None or head not in reader.tensors:
        return
    (table,) = layout.locations["model.embed_tokens.weight"].tensors
    shape = reader.tensors[table].shape
    same = reader.tensors[head].shape == shape and all(
        torch.equal(reader.tensor(head, rows), reader.tensor(table, rows)) for rows in slices(shape[0], TABLE_ROWS)
    )
    if not same:
        raise InputError(
            f"{head}: expected the numbers of {table}, to which config.json ties it, found others, with which "
            f"transformers runs it untied; set tie_word_embeddings to false, or remove {head}"
        )


def model_files(plan: Plan) -> tuple[Path, ...]:
    """The files of code that a plan's result carries: a skipless model's; of another family none."""
    return () if plan.in_place else MODEL_FILES


def destination_at(place: str | Path) -> Destination:
    """Where DST is to be: at a path or a URL."""
    location = located(place)
    return RemoteDestination(location) if isinstance(location, str) else LocalDestination(location)


def _is_within(destination: Destination, source: str | Path) -> bool:
    """Whether a destination would be written into the source."""
    if isinstance(source, str):
        return f"{destination}/".startswith(f"{shown(source).rstrip('/')}/")
    written = destination.path if isinstance(destination, LocalDestination) else destination.unfinished
    return Path(os.path.realpath(written)).is_relative_to(os.path.realpath(source))


def _check_outside(destination: Destination, paths: Iterable[Path]) -> None:
    """Raise InputError for a source, or a file of it, that lies where DST is in the making."""
    unfinished = os.path.realpath(destination.unfinished)
    for path in paths:
        if Path(os.path.realpath(path)).is_relative_to(unfinished):
            raise InputError(
                f"{path}: expected a source outside {destination.unfinished}, where {destination} is in the making; "
                f"move it elsewhere, or choose another name for the new folder"
            )


def _copied(plan: Plan) -> dict[str, torch.dtype]:
    """Tensors that no seam rewrites, and the dtypes that they are cast to."""
    names = (name for task in plan.tasks if not task.seams for name in task.writes)
    return {name: plan.outputs[name].dtype for name in names}


def _renamed(plan: Plan, reader: RowReader) -> RowReader:
    """The source's tensors by the names of the result."""
    return reader if plan.layout is None or plan.in_place else by_our_names(reader, plan.layout)


def _sources(read: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The SHA-256 of each tensor of the source that was read. Raises InputError for one that has two."""
    digests: dict[str, str] = {}
    for name, digest in (item for each in read for item in each.items()):
        if digests.setdefault(name, digest) != digest:
            raise InputError(
                f"{name}: expected the bytes that were read of it before, found others: the source has changed "
                f"meanwhile; let nothing write to it, and begin anew"
            )
    return digests


def _check(
    plan: Plan,
    source: CheckpointReader,
    fused: CheckpointReader,
    outcomes: Sequence[Outcome],
    sources: Mapping[str, str],
) -> Checked:
    """As check_fused; but InputError, no BugError, where underflow of biases or gains, or a changed source, is why."""
    with Digests(source, overwritten=True) as digests:  # so that nothing waits in memory
        try:
            if plan.in_place:
                return check_moved(plan, digests, fused)
            return check_fused(plan, _renamed(plan, digests), fused, outcomes)
        except BugError:
            for underflow in underflows(plan.renamed, _copied(plan), _renamed(plan, source).tensor, vectors=True):
                raise InputError(str(underflow)) from None
            raise
        finally:
            _sources([sources, digests.finish()])


def _copy_others(job: Job, folder: Path) -> None:
    copied = {*map(Path.as_posix, job.copied), "config.json"}
    text = card(job.plan, dataclasses.asdict(job.request), named(job.reader.name), _source_card(job), copied)
    files.write(folder / CARD, [text.encode()])
    for file in (each for each in job.copied if each != Path(CARD)):
        for parent in reversed(file.parents):
            files.make_folder(folder / parent)
        files.copy(job.reader.fetch(file), folder / file)
    for file in model_files(job.plan):
        files.copy(file, folder / file.name)


def _source_card(job: Job) -> str | None:
    """The source's card, if it has one that can be read."""
    if Path(CARD) not in job.copied:
        return None
    with files.opened(job.reader.fetch(Path(CARD))) as file:
        text = file.read(MOST + 1)
    return None if len(text) > MOST else text.decode(errors="replace")


@contextmanager
def _resuming(job: Job) -> Iterator[None]:
    """Call a BugError by its likelier cause, if what an earlier process has left was gone on with."""
    try:
        yield
    except BugError as error:
        if not job.begun:
            raise
        raise InputError(
            f"{error}; nor is anything kept: what was gone on with, or its journal, may not be what a fuse has "
            f"written; begin anew"
        ) from error


def _execute(job: Job, staging: Staging, progress: Callable[[Plan, Task | None], None]) -> dict[str, str]:
    """Carry out the tasks that are not done, writing behind them, and read what was written again; SHA-256 by file."""
    plan = job.plan
    manifest = staging.manifest
    writer = CheckpointWriter(staging.folder, plan.outputs)
    doubtful = manifest.unread
    for number, entry in list(manifest.done.items()):
        if number < len(plan.tasks) and _is_done(job, plan.tasks[number], entry, writer):
            progress(plan, plan.tasks[number])
        else:
            del manifest.done[number]
            doubtful += 1
    if doubtful:
        logger.warning("%d lines of %s do not agree with what is on disk: done again", doubtful, JOURNAL)
    todo = [number for number in range(len(plan.tasks)) if number not in manifest.done]
    behind = Behind("writing", waiting(plan))
    try:
        with closing(job.executor(plan, job.reader, todo)) as results:
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


def _is_done(job: Job, task: Task, entry: Entry, writer: CheckpointWriter) -> bool:
    """Whether the journal has all of a task, and of the right one, and the disk agrees.

    Of a remote source its files' versions were compared, and its tensors are not read again.
    """
    try:
        outcomes = [Outcome.read(outcome) for outcome in entry.outcomes]
    except ValueError:
        return False
    return (
        [(outcome.kind, outcome.layer, outcome.way) for outcome in outcomes]
        == [(seam.kind, seam.layer, seam.way(job.plan.basis)) for seam in task.seams]
        and all(map(_is_ordinary, outcomes))
        and (set(entry.digests), set(entry.sources)) == (set(task.writes), set(task.reads))
        and all(writer.digest(name) == digest for name, digest in entry.digests.items())
        and (
            isinstance(located(job.reader.place), str)
            or all(job.reader.digest(name) == digest for name, digest in entry.sources.items())
        )
    )


def _is_ordinary(outcome: Outcome) -> bool:
    """Whether a seam loses no more than what a sound one does: the self-check must not be told to let more pass."""
    dtype = getattr(torch, outcome.dtype)
    most = tolerance(dtype, CAST * rounding_error(dtype))
    return outcome.problem is None and all(error <= most for error in outcome.errors.values())


def _write(writer: CheckpointWriter, name: str, tensor: torch.Tensor, digests: dict[str, str]) -> None:
    digest = writer.write(name, tensor)
    if digest is not None:
        digests[name] = digest


def _journal(manifest: Manifest, number: int, task: Task, digests: dict[str, str], done: Done) -> None:
    if digests.keys() == set(task.writes):  # else a write has failed, which is about to be noticed
        done.confirm(digests)
        manifest.add(number, Entry(digests, done.sources, tuple(map(dataclasses.asdict, done.outcomes))))

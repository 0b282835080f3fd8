"""Rewrite a skipless checkpoint without the weights it does not need: plan from headers, then stream the tensors."""

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from skipless.checkpoint.reader import CheckpointReader
from skipless.checkpoint.writer import CheckpointWriter, new_folder, write_json
from skipless.closing import Done, run_task
from skipless.errors import InputError
from skipless.planning import Plan, Task, prepare
from skipless.request import AUTO, Request
from skipless.seams import REMOVABLE

logger = logging.getLogger("skipless")

MODEL_FILES = tuple(
    Path(__file__).parent / "model" / name for name in ("configuration_skipless.py", "modeling_skipless.py")
)


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

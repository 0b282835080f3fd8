"""Carry out a plan's tasks on the machines of a Ray cluster: each reads the source itself, and hands its tensors back.

One process, the driver, writes them, as it does its own (fusion.py): no two machines write one file, and what is on
disk is known in one place. Workers say what SHA-256 they have computed, and what is written must have it, too. Some
tasks, drawn by lot, are carried out by two workers, who must agree. It needs Ray (the extra "ray").
"""

import hashlib
import logging
import math
import os
import platform
import signal
import socket
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from random import SystemRandom
from typing import Any, ClassVar

import numpy as np
import ray
import torch
from ray._private import services
from ray._private import worker as ray_worker
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from skipless.algebra.forecast import Outcome
from skipless.checkpoint.reader import CheckpointReader, TensorInfo
from skipless.checkpoint.remote import open_reader
from skipless.errors import DisagreementError, InputError, StorageError
from skipless.rewrite.cost import cost, least
from skipless.rewrite.execution import Done, Results, Tensors, run_digested
from skipless.rewrite.machine import environment, freed_memory_kept, resident_memory
from skipless.rewrite.planning import Plan

# How often a task is run again when its worker is lost.
RETRIES = 3
# One task in so many, and at least one, is carried out by two workers.
CHECKED = 100
# Seconds until an address does not answer, and after which we look whether there still is a machine for a task.
PATIENCE = 10.0
# Bytes that a worker holds before it does anything: Python, torch, scipy and Ray (0.44 GB).
WORKER = 2**29
# Nobody can foresee what it draws.
LOTS = SystemRandom()
# How much of Ray's object store the tensors of tasks in flight may take; what does not fit there goes to a disk.
SHARE = 0.5


@dataclass(frozen=True)
class Input:
    """What a worker must know. place, device, files: the source, where to read it to, and its fingerprint."""

    plan: Plan
    place: str
    device: str
    files: Mapping[str, Any]


def run(plan: Plan, reader: CheckpointReader, todo: Sequence[int], address: str | None = None) -> Results:
    """Carry out the tasks of these numbers, as many at a time as there is memory for, the largest first.

    address: the cluster's (host:port), "auto" (the one this machine is part of), or None: Ray as it is connected
    already, else RAY_ADDRESS, else a cluster of this machine alone for as long as it takes. Raises what the workers
    raise; InputError where there is no cluster, no machine in it that a task fits on, or one with other software or
    another source; StorageError where workers are lost again and again, or what they gave arrives as something else;
    DisagreementError where two workers give different tensors for one task.
    """
    if not todo:
        return
    running: list[Submission] = []
    device = reader.device.type
    with _connected(address):
        plan, tasks = _placed(plan, todo, device)
        waiting = deque(sorted(tasks, key=lambda task: task.cost.total, reverse=True))
        for task in LOTS.sample(tasks, math.ceil(len(tasks) / CHECKED)):
            waiting.remove(task)
            waiting.appendleft(SpotCheck(plan, task.number, device))
        room = SHARE * ray.cluster_resources().get("object_store_memory", 0)
        job = ray.put(Input(plan, reader.place, device, reader.shared_fingerprint()))
        try:
            while waiting or running:
                while waiting and (not running or sum(task.gives for task in (*running, waiting[0])) <= room):
                    running.append(waiting.popleft())
                    running[-1].submit(job)
                task = _first(running)
                if isinstance(task, SpotCheck):
                    waiting.appendleft(Submission(plan, task.number, device, checked=task.next()))
                else:
                    yield task.number, task.done()
                running.remove(task)
        finally:
            for task in running:
                task.cancel()


def _placed(plan: Plan, todo: Sequence[int], device: str) -> tuple[Plan, list["Submission"]]:
    """The tasks of these numbers, by rows where no machine has room for one otherwise, and the plan that says so.

    Raises StorageError for one that no machine has room for even then.
    """
    tasks = [Submission(plan, number, device) for number in todo]
    large = [task.number for task in tasks if task.lack()]
    if large:
        smaller = least(plan).tasks
        plan = plan.by_rows([plan.tasks[number] for number in large if smaller[number].by_rows])
        tasks = [Submission(plan, number, device) for number in todo]
    for lack in filter(None, (task.lack() for task in tasks)):
        raise StorageError(lack)
    return plan, tasks


class Submission:
    """A task of the plan as a task of Ray. cost: what it costs; gives: bytes of its tensors.

    checked: if two workers carry it out, what the first one has reported.
    """

    _variables: ClassVar[dict[str, str]] = {}

    def __init__(self, plan: Plan, number: int, device: str, checked: "WorkerReport | None" = None):
        self.number, self._checked = number, checked
        self.cost = cost(plan, plan.tasks[number])
        self._outputs = {name: plan.outputs[name] for name in plan.tasks[number].writes}
        self.gives = sum(info.bytes for info in self._outputs.values())
        self._environment = environment()
        self._cpus, self._gpus = torch.get_num_threads(), int(device == "cuda")
        self._memory = WORKER + self.cost.memory

    def _work(self) -> Callable[..., Iterator[Any]]:
        """The function that a worker runs."""
        return carry_out

    @property
    def name(self) -> str:
        """Its name in messages: the first tensor that it gives."""
        return next(iter(self._outputs))

    def submit(self, job: "ray.ObjectRef[Input]") -> None:
        """Let Ray run it where there is room, and again, up to RETRIES times, if its worker is lost."""
        # OpenBLAS reads its number of threads when it is loaded; the last bits of a product depend on it.
        threads = {
            "OMP_NUM_THREADS": str(self._environment["threads"]),
            "OPENBLAS_NUM_THREADS": str(self._environment["blas_threads"]),
        }
        remote = ray.remote(self._work()).options(
            name=self.name,
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            memory=self._memory,
            max_retries=RETRIES,
            scheduling_strategy=self._where(),
            runtime_env={"env_vars": threads | self._variables},
        )
        # In a list, it is not unpacked before carry_out has found that its software is the same.
        self.results: ray.ObjectRefGenerator = remote.remote(self._environment, [job], self.number)

    def lack(self) -> str:
        """Why no machine of the cluster can run it; empty if one can."""
        if self._machines():
            return ""
        machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
        most = {kind: max((machine.get(kind, 0) for machine in machines), default=0) for kind in self._needs}
        return (
            f"{self.name}: expected a machine in the Ray cluster with {_listed(self._needs)} for its task, found "
            f"{len(machines)} with at most {_listed(most)}; add one, or set OMP_NUM_THREADS lower"
        )

    def _machines(self) -> list[str]:
        """The cluster's nodes with enough memory for it."""
        return [
            machine["NodeID"]
            for machine in ray.nodes()
            if machine["Alive"] and all(machine["Resources"].get(kind, 0) >= need for kind, need in self._needs.items())
        ]

    def _where(self) -> Any:
        """Where Ray should run it: if another worker has, on another node, should there be one."""
        others = [node for node in self._machines() if self._checked and node != self._checked.node]
        return NodeAffinitySchedulingStrategy(LOTS.choice(others), soft=True) if others else "DEFAULT"

    @property
    def _needs(self) -> Mapping[str, float]:
        return {"CPU": self._cpus, "memory": self._memory} | ({"GPU": self._gpus} if self._gpus else {})

    def done(self) -> Done:
        """Its tensors, as they arrive."""
        outcomes: list[Outcome] = []
        sources: dict[str, str] = {}
        return Done(self._tensors(outcomes, sources), outcomes, sources, self._confirm)

    def _tensors(self, outcomes: list[Outcome], sources: dict[str, str]) -> Tensors:
        left = {name: info.bytes for name, info in self._outputs.items()}
        while isinstance(result := self.next(), tuple):
            name, data = result
            if len(data) > left.get(name, 0) or len(data) % self._outputs[name].row_bytes:
                raise _changed(name, "its worker", f"{len(data):,} bytes that have no place")
            left[name] -= len(data)
            yield name, _tensor(data, self._outputs[name])
            del result, data
        self._report: WorkerReport = result
        for name in filter(left.get, left):
            raise _changed(name, self._report.worker, f"{left[name]:,} bytes too few")
        if self._checked:
            self._report.compare(self._checked, self.number)
        outcomes += self._report.outcomes
        sources.update(self._report.sources)

    def _confirm(self, digests: Mapping[str, str]) -> None:
        """Raise StorageError if tensors of these SHA-256 are not what the worker has computed."""
        for name, digest in digests.items():
            if (expected := self._report.digests.get(name)) != digest:
                raise _changed(name, self._report.worker, f"SHA-256 {digest} instead of {expected}")

    def next(self) -> Any:
        """Wait for the worker's next result."""
        _first([self])
        try:
            return ray.get(next(self.results))
        except RayTaskError as error:
            raise _cause(error) from error
        except RayError as error:
            cause = " ".join(str(error).split())
            raise StorageError(
                f"{self.name}: expected Ray to finish its task, at the latest on attempt {RETRIES + 1}, found: {cause}"
            ) from error

    def cancel(self) -> None:
        """Cancel it between two steps."""
        with suppress(RayError):
            ray.cancel(self.results)


class SpotCheck(Submission):
    """A task that two workers carry out, for the first of them, which hands out its WorkerReport alone.

    The other one is asked as for any other task, and cannot know.
    """

    # Ray gives tasks of different environments different processes: this is how no worker checks itself.
    _variables: ClassVar[dict[str, str]] = {"SKIPLESS_WORKER": "spot check"}

    def __init__(self, plan: Plan, number: int, device: str):
        super().__init__(plan, number, device)
        self.gives = 0

    def _work(self) -> Callable[..., Iterator[Any]]:
        return carry_out_unsent


def _first(running: Sequence[Submission]) -> Submission:
    """The first one whose next result is there. Raises StorageError when no machine is left that could give it."""
    while True:
        ready, _ = ray.wait([task.results for task in running], timeout=PATIENCE, fetch_local=False)
        if ready:
            return next(task for task in running if task.results is ready[0])
        for task in running:
            if lack := task.lack():
                raise StorageError(lack)


def _changed(name: str, worker: str, what: str) -> StorageError:
    """The error for a tensor that arrived with other bytes than were sent."""
    return StorageError(
        f"{name}: expected to get what {worker} has computed, got {what}; check the memory of both machines and the "
        f"network between them"
    )


def _cause(error: RayTaskError) -> Exception:
    """The error of a worker, as this process would have raised it."""
    if isinstance(error.cause, RuntimeError) and "failed to import on the worker" in str(error.cause):
        cause = str(error.cause).strip().splitlines()[-1]
        return StorageError(
            f"engine: expected skipless {environment()['skipless']} to be installed on all machines of the Ray "
            f"cluster, found on one: {cause}"
        )
    return error.cause


def _listed(resources: Mapping[str, float]) -> str:
    return ", ".join(
        f"{value / 1e9:.1f} GB of memory" if kind == "memory" else f"{value:g} {kind}s"
        for kind, value in resources.items()
    )


def _tensor(data: np.ndarray, info: TensorInfo) -> torch.Tensor:
    """A tensor, or some of its rows, over these bytes of Ray's shared memory. It is read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(data).view(info.dtype).reshape(-1, *info.shape[1:])


# What a worker does.


@dataclass(frozen=True)
class WorkerReport:
    """What a worker says at the end of a task.

    outcomes, sources: as in execution.Done. digests: the SHA-256 of each tensor that it has computed. worker, node: who
    it is, for people and for Ray.
    """

    outcomes: list[Outcome]
    sources: Mapping[str, str]
    digests: Mapping[str, str]
    worker: str
    node: str

    def compare(self, other: "WorkerReport", task: int) -> None:
        """Raise DisagreementError if another worker has computed something else for the task of this number."""
        for name, own in self.digests.items():
            if (expected := other.digests.get(name)) != own:
                raise DisagreementError(
                    f"{name}: expected two workers to compute the same for task {task}, found SHA-256 {expected} by "
                    f"{other.worker} and {own} by {self.worker}; one of them is wrong, or they are of two kinds, and "
                    f"nothing that was done is kept: begin anew without the wrong machine, or with machines of one kind"
                )


def carry_out(expected: Mapping[str, object], job: Sequence["ray.ObjectRef[Input]"], number: int) -> Iterator[Any]:
    """Run one task; hand out names and bytes of tensors, or of rows of them, then a WorkerReport.

    expected: the driver's environment. Raises StorageError if this machine's, or the source as this machine sees it,
    differs: on another machine the task may succeed.
    """
    torch.set_num_threads(int(str(expected["threads"])))
    for name, found in environment().items():
        if found != expected[name]:
            raise StorageError(
                f"{name}: expected {expected[name]!r}, as where fuse was called, found {found!r} on {platform.node()}; "
                f"the result would not be the same, bit for bit"
            )
    plan, reader = _opened(job[0])
    done = run_digested(plan, plan.tasks[number], reader)
    digests = {name: hashlib.sha256() for name in plan.tasks[number].writes}
    with closing(done.tensors), freed_memory_kept(resident_memory() + cost(plan, plan.tasks[number]).memory):
        for name, tensor in done.tensors:
            data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digests[name].update(data.data)
            yield name, data
            del tensor, data
    yield WorkerReport(
        done.outcomes,
        done.sources,
        {name: digest.hexdigest() for name, digest in digests.items()},
        f"{platform.node()} (process {os.getpid()})",
        ray.get_runtime_context().get_node_id(),
    )


def carry_out_unsent(
    expected: Mapping[str, object], job: Sequence["ray.ObjectRef[Input]"], number: int
) -> Iterator[Any]:
    """Run one task and hand out the WorkerReport alone."""
    for given in carry_out(expected, job, number):
        if isinstance(given, WorkerReport):
            yield given
        del given


@lru_cache(1)
def _opened(reference: "ray.ObjectRef[Input]") -> tuple[Plan, CheckpointReader]:
    """The plan, and the source as opened by this worker."""
    job = ray.get(reference)
    try:
        reader = open_reader(job.place, job.device)
    except InputError as error:
        raise StorageError(f"{error} (on {platform.node()}; all machines must see the same folder)") from error
    for name, found in reader.shared_fingerprint().items():
        if found != job.files.get(name):
            raise StorageError(
                f"{reader.name}: {name}: expected size and time {job.files.get(name)}, as where fuse was called, found "
                f"{found} on {platform.node()}; share one folder, or copy it with the times of its files"
            )
    return job.plan, reader


# Ray itself.


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """With Ray: as it is connected already, if no address is given, or for as long as the block lasts."""
    if address is None and ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    printing, ray_worker._worker_logs_enabled = ray_worker._worker_logs_enabled, False  # on stdout, what it has lost
    try:
        _connect(address)
        yield
    finally:
        ray.shutdown()
        ray_worker._worker_logs_enabled = printing


def _connect(address: str) -> None:
    """Join the cluster at an address, or ("local") begin one on this machine. Raises InputError if that fails."""
    if address != "local":
        _check_answers(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    dashboard = {"include_dashboard": False} if address == "local" else {}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **dashboard)
    except (RayError, OSError, ValueError, RuntimeError) as error:
        cause = " ".join(str(error).split())
        raise InputError(
            f"address: expected a Ray cluster to join at {address!r}, found: {cause}; it must be of the same version, "
            f"and if it asks for a token, RAY_AUTH_MODE=token must be set here, too"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own


def _check_answers(address: str) -> None:
    """Raise InputError if there is no cluster at an address; Ray would try for minutes."""
    if "://" in address:
        raise InputError(f"address: expected host:port or auto, found {address!r}; call fuse on one of its machines")
    try:
        host, _, port = services.canonicalize_bootstrap_address_or_die(address).rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"address: expected that of a Ray cluster, found nothing that answers at {address!r} ({error}); begin one "
            f"with: ray start --head"
        ) from error

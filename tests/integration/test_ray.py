"""Ray's workers write the same bytes as this process does, even if one is killed; what they find wrong is said here,
and what one of them does wrong is noticed.
"""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from skipless import InputError, fuse
from skipless.checkpoint.reader import CheckpointReader
from skipless.checkpoint.staging import LocalDestination
from skipless.checkpoint.writer import CheckpointWriter
from skipless.errors import DisagreementError, StorageError
from skipless.rewrite import executors, machine
from skipless.rewrite.cost import cost
from tests.models import MANY_FILES, build, contents, edit_tensors, save

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'skipless[ray]'")

from skipless.rewrite import cluster  # noqa: E402


@pytest.fixture(scope="module")
def two_workers():
    """A cluster of this machine with room for two tasks."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    yield
    ray.shutdown()


def wrap(monkeypatch, before):
    """Let workers call `before(number, outputs)` before each thing they hand out; outputs: how many there were."""
    carry_out = cluster.carry_out

    def wrapped(expected, job, number):
        for outputs, output in enumerate(carry_out(expected, job, number)):
            before(number, outputs)
            yield output

    monkeypatch.setattr(cluster, "carry_out", wrapped)


def change_sent(monkeypatch, change):
    """Let what workers hand out go through `change(name, data)` once they have hashed it."""
    carry_out = cluster.carry_out

    def wrapped(expected, job, number):
        for output in carry_out(expected, job, number):
            yield change(*output) if isinstance(output, tuple) else output

    monkeypatch.setattr(cluster, "carry_out", wrapped)


def change_computed(monkeypatch, wrong):
    """Let workers compute something else for the tasks of which `wrong(number)` is true, unless they only check."""

    def wrapped(expected, job, number):
        honest = cluster.run_digested

        def lying(plan, task, reader):
            done = honest(plan, task, reader)
            return dataclasses.replace(done, tensors=((name, tensor + 1) for name, tensor in done.tensors))

        cluster.run_digested = lying if wrong(number) else honest
        try:
            yield from cluster.carry_out(expected, job, number)  # in a worker, where it is not wrapped
        finally:
            cluster.run_digested = honest

    monkeypatch.setattr(cluster, "carry_out", wrapped)


def watch_checks(monkeypatch):
    """The reports that are compared, in pairs."""
    compare, pairs = cluster.WorkerReport.compare, []
    monkeypatch.setattr(
        cluster.WorkerReport,
        "compare",
        lambda one, other, task: pairs.append((one, other)) or compare(one, other, task),
    )
    return pairs


def stop_at_write(monkeypatch, number, once):
    """Ctrl-C at the `number`-th tensor that is to be written, once a file is there."""
    write, written = CheckpointWriter.write, []

    def stopped(writer, name, tensor):
        written.append(name)
        if len(written) == number:
            while not once.exists():
                time.sleep(0.01)
            raise KeyboardInterrupt
        return write(writer, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "write", stopped)


@pytest.mark.slow
def test_two_workers_write_the_same_bytes(source, tmp_path, two_workers, whole, monkeypatch):
    seen = tmp_path / "seen"
    seen.mkdir()

    def meet(number, outputs):  # the first task of each worker waits for the other's
        (seen / str(os.getpid())).touch()
        while len(list(seen.iterdir())) < 2:
            time.sleep(0.01)

    wrap(monkeypatch, meet)
    done = []
    plan = fuse(source, tmp_path / "fused", engine="ray", progress=lambda plan, task: done.append(task), **MANY_FILES)
    assert contents(tmp_path / "fused") == whole
    assert len(list(seen.iterdir())) == 2
    assert not (seen / str(os.getpid())).exists()
    assert sorted(done[1:], key=plan.tasks.index) == list(plan.tasks)
    assert ray.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [0, 2])
def test_a_killed_workers_task_runs_again(source, tmp_path, two_workers, whole, monkeypatch, outputs):
    """SIGKILL, when the task has given nothing yet, and when it has given its first tensor."""
    seen, at = tmp_path / "seen", outputs
    seen.mkdir()

    def kill_once(number, outputs):
        if number == 1 and outputs == at:
            (seen / str(os.getpid())).touch()
            if len(list(seen.iterdir())) == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    wrap(monkeypatch, kill_once)
    fuse(source, tmp_path / "fused", engine="ray", **MANY_FILES)
    assert len(list(seen.iterdir())) == 2  # two processes came to this point of the task: the first was killed
    assert contents(tmp_path / "fused") == whole


@pytest.mark.slow
def test_what_no_machine_has_room_for_goes_by_rows(tmp_path, two_workers, monkeypatch):
    source = save(build(dtype=torch.bfloat16, vocab_size=50_000), tmp_path / "source")
    plan = fuse(source, tmp_path / "whole", basis="q")
    task, *_ = plan.tasks
    room = int(ray.cluster_resources()["memory"])
    monkeypatch.setattr(cluster, "WORKER", room - cost(plan, task).memory + 10**5)
    seen = tmp_path / "seen"
    seen.mkdir()
    wrap(monkeypatch, lambda number, outputs: (seen / f"{number}-{outputs}").touch())
    fuse(source, tmp_path / "fused", basis="q", engine="ray")
    assert len(list(seen.glob("0-*"))) > 10 > len(task.writes) + 1
    assert contents(tmp_path / "fused") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_task_that_kills_every_worker(source, tmp_path, two_workers, whole, monkeypatch):
    journal = LocalDestination(tmp_path / "fused").unfinished / "journal.jsonl"

    def kill(number, outputs):
        if number == 0:
            while not journal.exists():  # until another task is done
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(cluster, "RETRIES", 0)
        wrap(patch, kill)
        message = "expected Ray to finish its task, at the latest on attempt 1, found: .*; what is done is kept"
        with pytest.raises(StorageError, match=message):
            fuse(source, tmp_path / "fused", engine="ray", **MANY_FILES)
    assert not (tmp_path / "fused").exists()
    fuse(source, tmp_path / "fused", engine="ray", resume=True, **MANY_FILES)
    assert contents(tmp_path / "fused") == whole


@pytest.mark.slow
def test_a_stopped_driver_stops_its_workers_and_goes_on(source, tmp_path, two_workers, whole, monkeypatch):
    asleep = tmp_path / "asleep"

    def sleep(number, outputs):
        if number == 4:
            asleep.touch()
            while True:
                time.sleep(0.1)

    with monkeypatch.context() as patch:
        stop_at_write(patch, 8, asleep)
        wrap(patch, sleep)
        with pytest.raises(KeyboardInterrupt):
            fuse(source, tmp_path / "fused", engine="ray", **MANY_FILES)
    journal = LocalDestination(tmp_path / "fused").unfinished / "journal.jsonl"
    lines = journal.read_text().splitlines()
    assert lines
    ran = []
    run = cluster.Submission.submit
    monkeypatch.setattr(cluster.Submission, "submit", lambda task, job: ran.append(task) or run(task, job))
    plan = fuse(source, tmp_path / "fused", engine="ray", resume=True, **MANY_FILES)
    left = len(plan.tasks) - len(lines)
    assert sorted(type(task).__name__ for task in ran) == ["SpotCheck", *["Submission"] * left]
    assert contents(tmp_path / "fused") == whole
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)


WRONG = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda data: data ^ (data == data[0]), r"SHA-256 \w{64} instead of \w{64}"),
        (lambda data: data[: len(data) // 2], r"1,536 bytes too few"),
        (lambda data: data.repeat(2), r"6,144 bytes that have no place"),
        (lambda data: data[1:], r"3,071 bytes that have no place"),
    ],
    ids=["other", "half", "twice", "shifted"],
)
def test_what_arrives_is_not_what_a_worker_sent(source, tmp_path, two_workers, whole, monkeypatch, change, found):
    with monkeypatch.context() as patch:
        change_sent(patch, lambda name, data: (name, change(data) if name == WRONG else data))
        message = rf"^{WRONG}: expected to get what .* has computed, got {found}; check the memory"
        with pytest.raises(StorageError, match=message):
            fuse(source, tmp_path / "fused", engine="ray", **MANY_FILES)
    assert not (tmp_path / "fused").exists()
    resume = LocalDestination(tmp_path / "fused").unfinished.exists()
    fuse(source, tmp_path / "fused", engine="ray", resume=resume, **MANY_FILES)
    assert contents(tmp_path / "fused") == whole


def test_a_tensor_that_nobody_asked_for(source, tmp_path, two_workers, monkeypatch):
    change_sent(monkeypatch, lambda name, data: ("model.evil.weight", data))
    with pytest.raises(StorageError, match=r"^model\.evil\.weight: expected to get what .* that have no place"):
        fuse(source, tmp_path / "fused", engine="ray", **MANY_FILES)
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize(
    ("checked", "wrong"), [(cluster.CHECKED, lambda number: True), (1, lambda number: number == 3)], ids=["all", "one"]
)
def test_a_worker_that_computes_something_else(source, tmp_path, two_workers, monkeypatch, checked, wrong):
    """By default all that is wrong is noticed by one task's being checked; one wrong task by its own."""
    monkeypatch.setattr(cluster, "CHECKED", checked)
    change_computed(monkeypatch, wrong)
    with pytest.raises(DisagreementError) as error:
        fuse(source, tmp_path / "fused", engine="ray", **MANY_FILES)
    found = re.match(
        r"[\w.]+: expected two workers to compute the same for task (\d+), found SHA-256 (\w{64}) by .+ "
        r"\(process (\d+)\) and (\w{64}) by .+ \(process (\d+)\); one of them is wrong",
        str(error.value),
    )
    task, one, process, other, another = found.groups()
    assert wrong(int(task))
    assert one != other
    assert process != another
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nothing_is_kept_that_a_wrong_worker_may_have_done(source, tmp_path, two_workers, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_write(patch, 8, source)
        with pytest.raises(KeyboardInterrupt):
            fuse(source, tmp_path / "fused", engine="ray", **MANY_FILES)
    assert (LocalDestination(tmp_path / "fused").unfinished / "journal.jsonl").read_bytes()
    change_computed(monkeypatch, lambda number: True)
    with pytest.raises(DisagreementError):
        fuse(source, tmp_path / "fused", engine="ray", resume=True, **MANY_FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("checked", [cluster.CHECKED, 3, 1])
def test_one_task_in_so_many_is_checked_by_another_worker(source, tmp_path, two_workers, whole, monkeypatch, checked):
    pairs = watch_checks(monkeypatch)
    monkeypatch.setattr(cluster, "CHECKED", checked)
    plan = fuse(source, tmp_path / "fused", engine="ray", **MANY_FILES)
    assert len(pairs) == -(-len(plan.tasks) // checked)
    assert all(one.worker != other.worker for one, other in pairs)
    assert contents(tmp_path / "fused") == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__layers__1__self_attn__q_proj__weight": torch.zeros(32, 32)},
            "layers.1.*q_proj.weight: expected an invertible matrix",
        ),
        ({"model__layers__1__mlp__up_proj__weight": torch.full((48, 32), torch.nan)}, "found 1536 of 1536 NaN"),
    ],
    ids=["singular", "NaN"],
)
def test_what_a_worker_finds_wrong(source, tmp_path, two_workers, changes, message):
    edit_tensors(source, **changes)
    found = []
    for engine in executors.EXECUTORS:
        with pytest.raises(InputError, match=message) as error:
            fuse(source, tmp_path / "fused", engine=engine, basis="q", **MANY_FILES)
        found.append((type(error.value), str(error.value)))
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert found[0] == found[1]


def test_what_a_worker_cannot_read(source, tmp_path, two_workers, monkeypatch):
    def broken(number, outputs):
        raise StorageError("x: could not be read from y: Input/output error")

    wrap(monkeypatch, broken)
    with pytest.raises(StorageError, match=r"^x: could not be read from y: Input/output error$"):
        fuse(source, tmp_path / "fused", engine="ray", **MANY_FILES)


def test_workers_that_are_not_the_same(source, tmp_path, two_workers, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(machine, "__version__", "0.0.0")
        with pytest.raises(InputError, match=r"skipless: expected '0\.0\.0', as where fuse was called, found '"):
            fuse(source, tmp_path / "fused", engine="ray", **MANY_FILES)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointReader, "fingerprint", lambda *_: {"config.json": [1, 2]})
        with pytest.raises(
            InputError, match=r"source: config.json: expected size and time \[1, 2\], as where .* found"
        ):
            fuse(source, tmp_path / "fused", engine="ray", **MANY_FILES)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointReader, "place", "/nowhere")
        with pytest.raises(InputError, match=r"^/nowhere.* \(on .*; all machines must see the same folder\)$"):
            fuse(source, tmp_path / "fused", engine="ray", **MANY_FILES)
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "WORKER", 10**15)
        message = (
            r"expected a machine in the Ray cluster with 1 CPUs, 1000000.* GB of memory .* found 1 with at most 2 CPU"
        )
        with pytest.raises(InputError, match=message):
            fuse(source, tmp_path / "fused", engine="ray", **MANY_FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.slow
def test_a_cluster_that_is_not_there(source, tmp_path, monkeypatch):
    def message(address, engine="ray"):
        with pytest.raises(InputError) as error:
            fuse(source, tmp_path / "fused", engine=engine, address=address, **MANY_FILES)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        return str(error.value)

    assert message("127.0.0.1:1").startswith("address: expected that of a Ray cluster, found nothing that answers at")
    assert message("here").startswith("address: expected that of a Ray cluster, found nothing that answers at 'here'")
    assert message("ray://127.0.0.1:1").startswith("address: expected host:port or auto, found 'ray://127.0.0.1:1'")
    assert message("auto", "local") == "address: expected none with engine local, found 'auto'; use --engine ray"
    monkeypatch.setitem(sys.modules, "ray", None)
    assert message(None) == "engine: expected Ray for 'ray', found none installed; pip install 'skipless[ray]'"


@pytest.mark.slow
def test_a_cluster_of_its_own(source, tmp_path, whole):
    """From the command line, with no cluster: one is begun, and ended, even by Ctrl-C."""
    arguments = ["fuse", str(source), str(tmp_path / "fused"), "--dtype", "bfloat16", "--max-shard-size", "0.02MB"]
    command = [sys.executable, "-c", "from skipless.cli import main; main()", *arguments, "--engine", "ray"]
    journal = LocalDestination(tmp_path / "fused").unfinished / "journal.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (journal.exists() and journal.read_bytes()):
            time.sleep(0.001)
        begun = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert process.returncode == 130
    assert output == ""
    assert "--resume" in errors
    assert begun
    assert not psutil.wait_procs(begun, timeout=30)[1]
    fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    assert contents(tmp_path / "fused") == whole


@pytest.mark.slow
def test_a_task_is_checked_on_another_machine(source, tmp_path, whole, monkeypatch):
    """A cluster of two nodes, both of them processes of this machine."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    pairs = watch_checks(monkeypatch)
    monkeypatch.setattr(cluster, "CHECKED", 1)
    nodes = {"num_cpus": 1, "object_store_memory": 10**8, "include_dashboard": False}
    machines = Cluster(initialize_head=True, head_node_args=nodes)
    try:
        machines.add_node(num_cpus=1, object_store_memory=10**8)
        plan = fuse(source, tmp_path / "fused", engine="ray", address=machines.address, **MANY_FILES)
    finally:
        ray.shutdown()
        machines.shutdown()
    assert len(pairs) == len(plan.tasks)
    assert all(one.node != other.node for one, other in pairs)
    assert contents(tmp_path / "fused") == whole

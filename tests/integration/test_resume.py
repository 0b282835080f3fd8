"""Stopped at any point, a fuse goes on where it was, and the result is that of an uninterrupted run, bit for bit."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock

from skipless import InputError, cli, fuse, verify
from skipless.checkpoint import files
from skipless.checkpoint import reader as reader_module
from skipless.checkpoint.manifest import Manifest
from skipless.checkpoint.reader import CheckpointReader
from skipless.checkpoint.staging import LocalDestination
from skipless.checkpoint.writer import CheckpointWriter
from skipless.errors import StorageError
from skipless.rewrite import execution, fusion
from tests.models import MANY_FILES, contents, edit_config, edit_tensors


def stop_at_write(monkeypatch, number, error):
    """The `number`-th tensor is not written."""
    write, written = CheckpointWriter.write, []

    def stopped(writer, name, tensor):
        written.append(name)
        if len(written) == number:
            raise error
        return write(writer, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "write", stopped)


def count_tasks(monkeypatch):
    ran = []
    run = execution.run_task
    monkeypatch.setattr(execution, "run_task", lambda plan, task, read: ran.append(task) or run(plan, task, read))
    return ran


@pytest.mark.parametrize("number", [5, 8, 14])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
def test_a_stopped_fuse_goes_on(source, tmp_path, monkeypatch, whole, number, error):
    with monkeypatch.context() as patch:
        stop_at_write(patch, number, error)
        with pytest.raises((KeyboardInterrupt, StorageError)):
            fuse(source, tmp_path / "fused", **MANY_FILES)
    assert not (tmp_path / "fused").exists()
    lines = (LocalDestination(tmp_path / "fused").unfinished / "journal.jsonl").read_text().splitlines()
    assert lines
    ran = count_tasks(monkeypatch)
    plan = fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    assert len(ran) == len(plan.tasks) - len(lines)
    assert contents(tmp_path / "fused") == whole
    assert not LocalDestination(tmp_path / "fused").unfinished.exists()


def test_a_full_disk_says_what_to_do(source, tmp_path, monkeypatch):
    stop_at_write(monkeypatch, 8, OSError(errno.ENOSPC, "No space left on device"))
    result = CliRunner().invoke(cli.main, ["fuse", str(source), str(tmp_path / "fused")])
    assert result.exit_code == 2
    assert "fused: could not be written: No space left on device; what is done is kept: go on with --resume" in (
        result.stderr.replace("\n", " ")
    )


@pytest.mark.parametrize("number", [1, 4, 8])
def test_its_threads_end_with_it(source, tmp_path, monkeypatch, number):
    """Whoever keeps the error keeps no thread: one that the garbage collector ends can wait for itself."""
    stop_at_write(monkeypatch, number, OSError(errno.ENOSPC, "full"))
    before = set(threading.enumerate())
    with pytest.raises(StorageError) as kept:
        fuse(source, tmp_path / "fused", **MANY_FILES)
    assert kept.value.__traceback__ is not None
    assert {thread.name for thread in set(threading.enumerate()) - before} == set()


def test_nothing_done_leaves_nothing_behind(source, tmp_path, monkeypatch):
    stop_at_write(monkeypatch, 1, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(StorageError, match="nothing was left behind"):
        fuse(source, tmp_path / "fused")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_read_error_is_resumable(source, tmp_path, monkeypatch, whole):
    read = CheckpointReader.tensor

    def broken(reader, name, *arguments):
        if name.startswith("model.layers.2"):
            raise StorageError(f"{name}: could not be read from x: Input/output error")
        return read(reader, name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointReader, "tensor", broken)
        with pytest.raises(StorageError, match="Input/output error; what is done is kept: go on with --resume"):
            fuse(source, tmp_path / "fused", basis="q", **MANY_FILES)
    fuse(source, tmp_path / "fused", basis="q", resume=True, **MANY_FILES)
    found = contents(tmp_path / "fused")
    assert b'"basis": "auto"' in whole["skipless.json"]  # which chose q
    assert b'"basis": "auto"' not in found["skipless.json"]
    told = {"skipless.json", "README.md"}  # with which options
    assert {name: found[name] for name in found.keys() - told} == {name: whole[name] for name in whole.keys() - told}


def test_the_disk_reports_an_error(source, monkeypatch):
    reader = CheckpointReader(source)

    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fstat", broken)
    try:
        reader.tensor("lm_head.weight")
    except StorageError as error:
        message = str(error)
    finally:
        monkeypatch.undo()
    assert message.startswith("lm_head.weight: could not be read from ")
    assert message.endswith("model.safetensors: Input/output error")


def test_ctrl_c_says_how_to_resume(source, tmp_path, monkeypatch):
    stop_at_write(monkeypatch, 8, KeyboardInterrupt())
    monkeypatch.setattr(sys, "argv", ["skipless", "fuse", "a b", "c"])
    result = CliRunner().invoke(cli.main, ["fuse", str(source), str(tmp_path / "fused")])
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted; go on with: skipless fuse 'a b' c --resume"


@pytest.mark.slow
@pytest.mark.parametrize("hit", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda hit: hit.name)
def test_a_killed_process_goes_on(source, tmp_path, whole, hit):
    command = [sys.executable, "-c", "from skipless.cli import main; main()", "fuse", str(source)]
    command += [str(tmp_path / "fused"), "--dtype", "bfloat16", "--max-shard-size", "0.02MB"]
    journal = LocalDestination(tmp_path / "fused").unfinished / "journal.jsonl"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (journal.exists() and journal.read_bytes()):
        time.sleep(0.001)
    process.send_signal(hit)
    assert process.wait() == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[hit]
    assert not (tmp_path / "fused").exists()
    fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    assert contents(tmp_path / "fused") == whole


@pytest.fixture
def stopped(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_write(patch, 8, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            fuse(source, tmp_path / "fused", **MANY_FILES)
    return LocalDestination(tmp_path / "fused").unfinished


def test_without_resume_nothing_is_lost(source, tmp_path, stopped):
    with pytest.raises(InputError, match=r"found an unfinished fuse in .*; go on with --resume, or remove it"):
        fuse(source, tmp_path / "fused", **MANY_FILES)
    assert (stopped / "journal.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "options.dtype: expected .bfloat16., as when this fuse was begun, found .float16."),
        ({"basis": "pivoted"}, "options.basis: expected .auto., as when this fuse was begun, found .pivoted."),
        (
            {"max_shard_size": 30_000},
            "options.max_shard_size: expected 20000, as when this fuse was begun, found 30000",
        ),
        ({"copy": ["generation*"]}, r"options.copy: expected \[\], as when .* found \[.generation\*.\]"),
    ],
    ids=str,
)
def test_other_options_are_refused(source, tmp_path, stopped, change, message):
    with pytest.raises(InputError, match=message):
        fuse(source, tmp_path / "fused", resume=True, **{**MANY_FILES, **change})
    assert (stopped / "journal.jsonl").exists()


def test_another_source_and_other_versions_are_refused(source, tmp_path, stopped, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("skipless.rewrite.machine.__version__", "0.0.0")
        with pytest.raises(InputError, match=r"environment\.skipless: expected "):
            fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    edit_tensors(source, lm_head__weight=torch.ones(61, 32))
    with pytest.raises(InputError, match=r"files\.model\.safetensors: expected "):
        fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    assert (stopped / "journal.jsonl").exists()


def test_what_was_damaged_meanwhile_is_done_again(source, tmp_path, stopped, whole):
    shard = sorted((stopped / "model").glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    assert contents(tmp_path / "fused") == whole


@pytest.mark.parametrize("harm", ["a line half written", "no shard", "nothing begun"])
def test_states_in_which_a_kill_can_leave_it(source, tmp_path, stopped, whole, harm):
    journal = stopped / "journal.jsonl"
    if harm == "a line half written":
        journal.write_bytes(journal.read_bytes()[:-9])
    elif harm == "no shard":
        for shard in (stopped / "model").iterdir():
            shard.unlink()
    else:
        for path in (stopped / "job.json", journal):
            path.unlink()
        shutil.rmtree(stopped / "model")
    fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    assert contents(tmp_path / "fused") == whole


@pytest.mark.parametrize("place", ["", "model/config.json", "model/SHARD", "journal.jsonl"])
def test_a_link_out_of_the_folder_is_not_followed(source, tmp_path, stopped, place):
    other = tmp_path / "other"
    place = place.replace("SHARD", min(path.name for path in (stopped / "model").glob("*.safetensors")))
    if place:
        other.write_text("untouched")
        (stopped / place).unlink(missing_ok=True)
    else:
        stopped.rename(other)
    (stopped / place).symlink_to(other)
    with pytest.raises(InputError, match=r"expected no symbolic link there, found one to .*other; remove "):
        fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    assert not place or other.read_text() == "untouched"


@pytest.mark.parametrize("text", ['{"task": [}\n', "[]\n", "{}\n", "[" * 100_000 + "\n"], ids=lambda text: text[:4])
def test_a_job_that_is_none(source, tmp_path, stopped, text):
    (stopped / "job.json").write_text(text)
    with pytest.raises(InputError, match=r"job\.json: expected what a fuse writes there, found .*; remove "):
        fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)


def test_what_could_not_be_removed_is_gone_on_with(source, tmp_path, stopped, whole):
    (stopped / "journal.jsonl").unlink()  # and the rest was about to be
    (stopped / "model" / "config.json").write_bytes(b"another fuse's")
    fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    assert contents(tmp_path / "fused") == whole


def test_a_wrong_input_of_a_later_call_loses_nothing(source, tmp_path, monkeypatch, stopped, whole):
    def wrong(*_):
        raise InputError("something is wrong on a machine that has joined")

    with monkeypatch.context() as patch:
        patch.setattr(execution, "run_task", wrong)
        with pytest.raises(InputError, match="something is wrong"):
            fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    assert (stopped / "journal.jsonl").exists()
    fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    assert contents(tmp_path / "fused") == whole


def test_other_files_are_part_of_the_source(source, tmp_path, stopped):
    (source / "generation_config.json").unlink()
    with pytest.raises(InputError, match=r"files\.generation_config\.json: expected .* found null"):
        fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)


def test_looking_at_an_unfinished_folder_changes_nothing(tmp_path, stopped):
    journal = stopped / "journal.jsonl"
    journal.write_bytes(torn := journal.read_bytes() + b'{"task": 9')
    assert Manifest.load(stopped).done
    assert journal.read_bytes() == torn


def test_a_name_that_is_too_long(source, tmp_path):
    with pytest.raises(InputError, match="expected a name that a folder can have, found: File name too long"):
        fuse(source, tmp_path / ("x" * 250), **MANY_FILES)


def test_finished_but_for_the_cleaning_up(source, tmp_path, stopped):
    fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    stopped.mkdir()
    (stopped / "job.json").write_text("{}")
    with pytest.raises(InputError, match="fused: expected a new folder, found it complete already; remove "):
        fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)


def test_resume_with_nothing_there_begins(source, tmp_path, whole):
    fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    assert contents(tmp_path / "fused") == whole


def test_what_was_written_is_read_again_before_it_gets_its_name(source, tmp_path, monkeypatch):
    finish = CheckpointWriter.finish

    def damaged(writer, digests):
        with (writer.folder / writer.shards[0]).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
        return finish(writer, digests)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "finish", damaged)
        with pytest.raises(StorageError, match=r"expected in model-00001.* what was written, found other bytes"):
            fuse(source, tmp_path / "fused", **MANY_FILES)
    assert not (tmp_path / "fused").exists()
    fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)


def test_two_fuses_to_one_place(source, tmp_path):
    folder = LocalDestination(tmp_path / "fused").unfinished
    folder.mkdir()
    with FileLock(folder / "lock"):
        with pytest.raises(InputError, match="fused: expected no other process at it, found one that is writing"):
            fuse(source, tmp_path / "fused", **MANY_FILES)
        assert folder.exists()


@pytest.mark.parametrize("change", ["touched", "cut", "config"])
def test_a_source_that_changes_meanwhile(source, tmp_path, monkeypatch, change):
    run = execution.run_task
    file = source / ("config.json" if change == "config" else "model.safetensors")

    def changing(plan, task, read):
        if "model.layers.2.mlp.down_proj.weight" in task.reads:
            if change == "cut":
                os.truncate(file, file.stat().st_size - 1)
            elif change == "touched":
                os.utime(file)
            else:
                edit_config(source, eos_token_id=5)
        return run(plan, task, read)

    monkeypatch.setattr(execution, "run_task", changing)
    with pytest.raises(InputError, match=rf"{file.name}: expected the file as it was .* found it changed meanwhile"):
        fuse(source, tmp_path / "fused", **MANY_FILES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def edit_in_place(file, offset):
    """Change a byte of a file and set its times to what they were: size, time and place are the same."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(offset)
        (byte,) = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def last_byte(source, name):
    reader = CheckpointReader(source)
    return reader.headers[name].start + reader.tensors[name].bytes - 8


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_source_edited_in_place_between_two_runs(source, tmp_path, stopped, name):
    data = (source / name).read_bytes()
    edit_in_place(source / name, len(data) - 1 if name == "model.safetensors" else data.rindex(b'0"'))  # a version
    with pytest.raises(InputError, match=rf"files\.{name}: expected .*, as when this fuse was begun, found "):
        fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    assert (stopped / "journal.jsonl").exists()


def test_a_source_edited_in_place_while_it_is_read(source, tmp_path, monkeypatch):
    run, edited = execution.run_task, []

    def changing(plan, task, read):
        if not edited:
            edited.append(edit_in_place(source / "model.safetensors", last_byte(source, "lm_head.weight")))
        return run(plan, task, read)

    monkeypatch.setattr(execution, "run_task", changing)
    with pytest.raises(InputError, match=r"model\.safetensors: expected the file as it was when its header was read"):
        fuse(source, tmp_path / "fused", **MANY_FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tensor_that_tasks_have_read_differently():
    assert fusion._sources([{"a": "1", "b": "2"}, {"b": "2", "c": "3"}]) == {"a": "1", "b": "2", "c": "3"}
    with pytest.raises(InputError, match=r"^b: expected the bytes that were read of it before, found others"):
        fusion._sources([{"a": "1", "b": "2"}, {"b": "3"}])


@pytest.fixture
def mixed(source, tmp_path, monkeypatch):
    """A fuse whose source is changed before it goes on, where a file system keeps no times, and nobody reads again what
    was read before. Gives the tensor's name.
    """
    monkeypatch.setattr(reader_module, "_stamped", lambda found: (found.st_size,))
    monkeypatch.setattr(fusion, "_is_done", lambda *_: True)
    name = "model.layers.0.mlp.down_proj.weight"
    with monkeypatch.context() as patch:
        stop_at_write(patch, 14, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            fuse(source, tmp_path / "fused", **MANY_FILES)
    edit_in_place(source / "model.safetensors", last_byte(source, name))
    return name


def test_what_was_read_before_is_read_again(source, tmp_path, monkeypatch):
    """Where a file system keeps no times: the task whose source has changed is done again, of what is there now."""
    monkeypatch.setattr(reader_module, "_stamped", lambda found: (found.st_size,))
    with monkeypatch.context() as patch:
        stop_at_write(patch, 14, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            fuse(source, tmp_path / "fused", **MANY_FILES)
    edit_in_place(source / "model.safetensors", last_byte(source, "model.layers.0.mlp.down_proj.weight"))
    fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    fuse(source, tmp_path / "anew", **MANY_FILES)
    assert contents(tmp_path / "fused") == contents(tmp_path / "anew")


def test_verify_tells_a_mixture(source, tmp_path, monkeypatch, mixed):
    with monkeypatch.context() as patch:
        patch.setattr(fusion, "_sources", lambda read: {name: digest for each in read for name, digest in each.items()})
        fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    report = verify(source, tmp_path / "fused", tokens=8)
    assert f"by its skipless.json, B was made of another source than A: {mixed}" in report.data.notes


@pytest.mark.parametrize("much", [False, True])
def test_a_mixture_is_noticed_by_the_last_check(source, tmp_path, mixed, much):
    """And not taken for a bug, even if it is large."""
    name = mixed
    if much:
        edit_in_place(source / "model.safetensors", last_byte(source, name) + 7)
    with pytest.raises(InputError, match=rf"{name}: expected the bytes that were read of it before, found others"):
        fuse(source, tmp_path / "fused", resume=True, **MANY_FILES)
    assert not (tmp_path / "fused").exists()


def test_the_cli_resumes(source, tmp_path, stopped, whole):
    arguments = ["fuse", str(source), str(tmp_path / "fused"), "--dtype", "bfloat16", "--max-shard-size", "0.02MB"]
    result = CliRunner().invoke(cli.main, [*arguments, "--resume"])
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "fused") == whole


def test_a_device_that_is_full(source, tmp_path, monkeypatch):
    """The first write beyond what fits fails, as a full disk's does, whichever it is."""
    limit = 150_000
    monkeypatch.setattr(files.os, "fsync", lambda _: limit or 0)
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(StorageError, match="File too large"):
            fuse(source, tmp_path / "fused", dtype="float64")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert not (tmp_path / "fused").exists()
    assert json.loads((source / "config.json").read_text())["model_type"] == "skipless"

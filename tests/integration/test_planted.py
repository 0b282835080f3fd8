"""What somebody has put where DST is in the making: nothing of it is believed, published, written through or removed,
and the source stays, wherever it is.
"""

import hashlib
import json
import os
import shutil
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from skipless import cli, fuse
from skipless.checkpoint.staging import LocalDestination
from skipless.errors import InputError
from skipless.rewrite import execution
from tests.models import SMALL, SMALL_FILES, build, contents, edit_tensors, save, stop_fuse

TWO_LAYERS = {**SMALL, "num_hidden_layers": 2}

pytestmark = pytest.mark.timeout(60)  # seconds; what hangs, hangs on opening


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A source, what an uninterrupted fuse of it gives, and one that was stopped after three tasks."""
    folder = tmp_path_factory.mktemp("made")
    source = save(build(dtype=torch.float32, attention_bias=True, **TWO_LAYERS), folder / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "sub").mkdir()
    (source / "sub" / "notes.md").write_text("notes")
    fuse(source, folder / "whole", **SMALL_FILES)
    return source, contents(folder / "whole"), stop_fuse(source, folder / "fused", 3, **SMALL_FILES)


@pytest.fixture
def source(made):
    return made[0]


@pytest.fixture
def whole(made):
    return made[1]


@pytest.fixture
def stopped(made, tmp_path):
    return shutil.copytree(made[2], LocalDestination(tmp_path / "fused").unfinished)


def everything(folder):
    """All that is in a folder: kinds, inodes, and the bytes of regular files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        seen = path.lstat()
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[str(path.relative_to(folder))] = seen.st_mode, seen.st_ino, seen.st_nlink, data
    return found


def resume(source, stopped):
    return fuse(source, stopped.parent / "fused", resume=True, **SMALL_FILES)


def resumed(source, stopped, whole, monkeypatch):
    """Go on; how many tasks were carried out."""
    ran, run = [], execution.run_task
    monkeypatch.setattr(execution, "run_task", lambda plan, task, read: ran.append(task) or run(plan, task, read))
    plan = resume(source, stopped)
    assert contents(stopped.parent / "fused") == whole
    assert not stopped.exists()
    return len(ran), len(plan.tasks)


def command(source, destination, *options):
    """What fuse says on the command line: one line of stderr."""
    options = ["--basis", "q", "--max-shard-size", "0.001MB", *options]
    result = CliRunner().invoke(cli.main, ["fuse", str(source), str(destination), *options])
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    line = result.stderr.removesuffix("\n")
    assert line.startswith("skipless: ")
    assert line.isprintable()
    return line


# 1. The source, and other people's files.


@pytest.mark.parametrize("name", ["mymodel", "model", "."])
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_source_where_the_new_folder_is_in_the_making(source, stopped, tmp_path, name, linked, begun):
    inside = stopped / name
    if not begun or name != "mymodel":
        shutil.rmtree(stopped)
    shutil.copytree(source, inside, dirs_exist_ok=True)
    given = inside
    if linked:
        given = tmp_path / "link"
        given.symlink_to(inside)
    before = everything(tmp_path)
    for options in ([], ["--resume"], ["--dry-run"]):
        line = command(given, tmp_path / "fused", *options)
        assert "expected a source outside" in line
        assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_of_the_source_that_lies_there(source, tmp_path, name):
    copy = shutil.copytree(source, tmp_path / "copy")
    unfinished = LocalDestination(tmp_path / "fused").unfinished
    unfinished.mkdir()
    (copy / name).rename(unfinished / "lock")
    (copy / name).symlink_to(unfinished / "lock")
    before = everything(tmp_path)
    with pytest.raises(InputError, match=f"{name}: expected "):
        fuse(copy, tmp_path / "fused", **SMALL_FILES)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "names",
    [["mymodel/model.safetensors"], ["notes.txt"], ["lock", "notes.txt"], ["model/config.json"], ["x/"]],
    ids=str,
)
@pytest.mark.parametrize("options", [[], ["--resume"]], ids=str)
def test_a_folder_that_no_fuse_has_made(source, tmp_path, names, options):
    unfinished = LocalDestination(tmp_path / "fused").unfinished
    for name in names:
        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / name).mkdir() if name.endswith("/") else (unfinished / name).write_text("mine")
    before = everything(tmp_path)
    line = command(source, tmp_path / "fused", *options)
    assert "expected an unfinished fuse, with its job.json, found none, but " in line
    assert everything(tmp_path) == before


def test_a_folder_whose_job_is_somebody_elses(source, tmp_path):
    unfinished = LocalDestination(tmp_path / "fused").unfinished
    (unfinished / "model").mkdir(parents=True)
    (unfinished / "job.json").write_text('{"format": "mine"}')
    (unfinished / "model" / "model.safetensors").write_text("mine")
    before = everything(tmp_path)
    for options in ([], ["--resume"]):
        assert "job.json: expected what a fuse writes there, found another format" in command(
            source, tmp_path / "fused", *options
        )
        assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "folder/notes.txt"])
def test_other_files_beside_it_stay(source, stopped, whole, name, caplog):
    (stopped / name).parent.mkdir(exist_ok=True)
    (stopped / name).write_text("mine")
    resume(source, stopped)
    assert contents(stopped.parent / "fused") == whole
    assert [path for path in stopped.rglob("*") if path.is_file()] == [stopped / name]
    assert f"{stopped}: could not be removed, or holds files of others; remove it" in caplog.text


def test_a_fuse_that_fails_removes_what_it_has_written_and_no_more(source, tmp_path, monkeypatch):
    copy = shutil.copytree(source, tmp_path / "copy")
    unfinished = LocalDestination(tmp_path / "fused").unfinished

    def planting(plan, task):
        (unfinished / "notes.txt").write_text("mine")
        (unfinished / "model" / "sub" / "mine.txt").write_text("mine") if task else None

    edit_tensors(copy, model__layers__1__self_attn__q_proj__weight=torch.ones(8, 8))  # singular
    with pytest.raises(InputError, match=r"singular|condition"):
        fuse(copy, tmp_path / "fused", progress=planting, **SMALL_FILES)
    left = [path for path in unfinished.rglob("*") if path.is_file()]
    assert {path.name for path in left} <= {"notes.txt", "mine.txt", "job.json", "lock"}
    assert (unfinished / "notes.txt").read_text() == "mine"


# 2. The journal.


def lines(stopped):
    return [json.loads(line) for line in (stopped / "journal.jsonl").read_text().splitlines()]


def rewrite(stopped, found):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in found)
    (stopped / "journal.jsonl").write_text(text)


def changed(**changes):
    return lambda line, other: {**line, **changes}


def part(name, change):
    return lambda line, other: {**line, name: change(line[name])}


def swapped_digests(tensors):
    names = list(tensors)
    return dict(zip(names, [tensors[name] for name in [*names[1:], names[0]]], strict=True))


def outcome(**changes):
    return part("outcomes", lambda found: [{**found[0], **changes}])


LIES = {
    "no tensors": changed(tensors={}),
    "tensors: a list": changed(tensors=[]),
    "tensors: null": changed(tensors=None),
    "an unknown tensor": part("tensors", lambda found: {**found, "x": "0" * 64}),
    "a tensor too few": part("tensors", lambda found: dict(list(found.items())[1:])),
    "another's digest": part("tensors", swapped_digests),
    "another task's tensors": lambda line, other: {**line, "tensors": other["tensors"]},
    "another task's line": lambda line, other: {**other, "task": line["task"]},
    "a digest: a number": part("tensors", lambda found: dict.fromkeys(found, 3)),
    "a digest: short": part("tensors", lambda found: dict.fromkeys(found, "0" * 63)),
    "a digest: capitals": part("tensors", lambda found: {name: digest.upper() for name, digest in found.items()}),
    "a task out of range": changed(task=10**6),
    "a task out of int": changed(task=10**30),
    "a task below": changed(task=-1),
    "a task: true": changed(task=True),
    "a task: a float": changed(task=1.0),
    "a task: text": changed(task="1"),
    "a task: a list": changed(task=[1]),
    "no sources": changed(sources={}),
    "sources: text": changed(sources="x"),
    "another source": part("sources", lambda found: dict.fromkeys(found, "0" * 64)),
    "no outcomes": changed(outcomes=[]),
    "outcomes: an object": changed(outcomes={}),
    "outcomes: a list": changed(outcomes=[[]]),
    "outcomes: other fields": changed(outcomes=[{"a": 1}]),
    "an outcome's dtype": outcome(dtype="nn"),
    "an outcome's dtype: a list": outcome(dtype=[]),
    "an outcome's layer": outcome(layer=7),
    "an outcome's kind": outcome(kind="head"),
    "an outcome's way": outcome(way="\x1b[2J"),
    "an outcome's errors": outcome(errors=[]),
    "an outcome's errors: text": outcome(errors={"q": "0"}),
    "an outcome's errors: NaN": outcome(errors={"q": float("nan")}),
    "an outcome's errors: negative": outcome(errors={"q": -1.0}),
    "an outcome's errors: large": outcome(errors={"q": 1e-3}),
    "an outcome's errors: infinite": outcome(errors={"q": float("inf")}),
    "an outcome's problem": outcome(problem="\x1b]0;title\x07"),
    "an outcome's problem, in words": outcome(problem="layer 0 cannot be rewritten"),
    "another field": changed(evil=1),
    "a field too few": lambda line, other: {name: line[name] for name in ("task", "tensors", "outcomes")},
    "a list": lambda line, other: "[]",
    "nothing": lambda line, other: "",
    "no JSON": lambda line, other: '{"task": [}',
    "deep": lambda line, other: "[" * 100_000,
    "a number of many digits": lambda line, other: "9" * 5000,
    "twice": lambda line, other: json.dumps(line)[:-1] + ', "task": 1}',
}


@pytest.mark.parametrize("lie", LIES)
def test_a_line_that_does_not_vouch_for_its_task_costs_that_task(source, stopped, whole, monkeypatch, caplog, lie):
    found = lines(stopped)
    at = next(number for number, line in enumerate(found) if line["outcomes"] and len(line["tensors"]) > 1)
    other = found[(at + 1) % len(found)]
    found[at] = LIES[lie](found[at], other)
    rewrite(stopped, found)
    ran, tasks = resumed(source, stopped, whole, monkeypatch)
    assert ran == tasks - len(found) + 1
    assert "1 lines of journal.jsonl do not agree with what is on disk: done again" in caplog.text


def test_the_last_good_line_of_a_task_counts(source, stopped, whole, monkeypatch):
    found = lines(stopped)
    rewrite(stopped, [{**found[0], "tensors": dict.fromkeys(found[0]["tensors"], "0" * 64)}, *found, "[]"])
    ran, tasks = resumed(source, stopped, whole, monkeypatch)
    assert ran == tasks - len(found)


def test_bytes_that_are_no_text(source, stopped, whole, monkeypatch):
    journal, count = stopped / "journal.jsonl", len(lines(stopped))
    journal.write_bytes(b"\xff\xfe\x00\n" + journal.read_bytes() + bytes(1000))
    ran, tasks = resumed(source, stopped, whole, monkeypatch)
    assert ran == tasks - count


def test_a_journal_of_100_gb(source, stopped, whole, monkeypatch):
    count = len(lines(stopped))
    os.truncate(stopped / "journal.jsonl", 10**11)
    ran, tasks = resumed(source, stopped, whole, monkeypatch)
    assert ran == tasks - count


def shard_of(stopped, name):
    """The shard that has a tensor, and the places of its bytes there."""
    for shard in sorted((stopped / "model").glob("*.safetensors")):
        data = shard.read_bytes()
        length = int.from_bytes(data[:8], "little")
        fields = json.loads(data[8 : 8 + length])
        if name in fields:
            start, stop = fields[name]["data_offsets"]
            return shard, 8 + length + start, 8 + length + stop
    raise AssertionError(name)


def test_a_task_that_was_never_done_is_not_believed(source, stopped, whole, monkeypatch):
    """Its tensors are zeros, as the file was made; the line has the hash of just these."""
    found = lines(stopped)
    for line in found:
        for name in line["tensors"]:
            shard, start, stop = shard_of(stopped, name)
            with shard.open("r+b") as file:
                file.seek(start)
                file.write(bytes(stop - start))
            line["tensors"][name] = hashlib.sha256(bytes(stop - start)).hexdigest()
    rewrite(stopped, found)
    ran, tasks = resumed(source, stopped, whole, monkeypatch)
    assert ran == tasks


def forge(stopped, name, scale):
    """Another tensor than was written, and its hash in the journal."""
    found = lines(stopped)
    line = next(line for line in found if name in line["tensors"])
    shard, start, stop = shard_of(stopped, name)
    data = bytearray(shard.read_bytes())
    tensor = torch.frombuffer(data, dtype=torch.float32, offset=start, count=(stop - start) // 4)
    tensor *= scale
    shard.write_bytes(data)
    line["tensors"][name] = hashlib.sha256(data[start:stop]).hexdigest()
    rewrite(stopped, found)


def test_a_forged_tensor_with_its_hash_is_another_function(source, stopped, whole, tmp_path):
    """Nothing is published and nothing of it kept: the next call begins anew."""
    name = next(name for line in lines(stopped) if line["outcomes"] for name in line["tensors"] if "k_proj.w" in name)
    forge(stopped, name, 3)
    line = command(source, tmp_path / "fused", "--resume")
    assert "expected to differ from the source's by at most " in line
    assert line.endswith("may not be what a fuse has written; begin anew")
    assert not stopped.exists()
    assert not (tmp_path / "fused").exists()
    fuse(source, tmp_path / "fused", **SMALL_FILES)
    assert contents(tmp_path / "fused") == whole


def test_a_source_that_was_edited_meanwhile_with_its_times_restored(source, stopped, whole, tmp_path, monkeypatch):
    """As far as stat tells it is the same; the tasks that have read other bytes are done again."""
    name = next(name for line in lines(stopped) for name in line["sources"] if "k_proj.weight" in name)
    with safe_open(source / "model.safetensors", "pt") as file:
        tensor = file.get_tensor(name)
    monkeypatch.setattr(
        "skipless.checkpoint.reader.CheckpointReader.fingerprint",
        lambda reader, copy=(): json.loads((stopped / "job.json").read_text() if stopped.exists() else "{}")["files"],
    )
    copy = shutil.copytree(source, tmp_path / "copy")
    edit_tensors(copy, **{name.replace(".", "__"): tensor * 2})
    job = json.loads((stopped / "job.json").read_text())
    (stopped / "job.json").write_text(json.dumps({**job, "source": str(copy.resolve())}))
    resume(copy, stopped)
    again = tmp_path / "again"
    monkeypatch.undo()
    fuse(copy, again, **SMALL_FILES)
    assert contents(tmp_path / "fused") == contents(again)
    assert contents(again) != whole


def fifo(path):
    os.mkfifo(path)


def listening(path):
    with socket.socket(socket.AF_UNIX) as end:
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            end.bind(path.name)
        finally:
            os.chdir(here)


def hard_link(path):
    path.with_name("other").write_text("theirs")
    os.link(path.with_name("other"), path.parent.parent / "precious")
    path.with_name("other").rename(path)


def symlink(path):
    precious = path.parent.parent / "precious"
    precious.write_text("theirs")
    path.symlink_to(precious)


KINDS = {
    "fifo": (fifo, "found a FIFO; remove it"),
    "socket": (listening, "found a socket; remove it"),
    "folder": (lambda path: path.mkdir(), "found a folder; remove it"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "expected no symbolic link there, found one to /dev/zero"),
    "symlink": (symlink, "expected no symbolic link there, found one to "),
    "hard link": (hard_link, "found one that has 2 names (hard links); remove this one"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["job.json", "journal.jsonl", "lock", "model/SHARD", "model/config.json", "model/skipless.json"]
)
def test_what_is_no_file_of_ours(source, stopped, whole, name, kind):
    make, message = KINDS[kind]
    name = name.replace("SHARD", min(path.name for path in (stopped / "model").glob("*.safetensors")))
    kept = {path: path.read_bytes() for path in [stopped / name] if path.exists()}
    (stopped / name).unlink(missing_ok=True)
    make(stopped / name)
    before = everything(stopped)
    for options in (["--resume"], [] if name in ("job.json", "lock", "journal.jsonl") else ["--resume"]):
        line = command(source, stopped.parent / "fused", *options)
        assert f"{name}: expected " in line
        assert message in line
        assert everything(stopped) == before
    planted = stopped / name
    planted.rmdir() if planted.is_dir() and not planted.is_symlink() else planted.unlink()
    for path, data in kept.items():
        path.write_bytes(data)
    precious = next(iter(stopped.rglob("precious")), None)
    if precious is not None:
        assert precious.read_text() == "theirs"
        precious.rename(stopped.parent / "precious")
    resume(source, stopped)
    assert contents(stopped.parent / "fused") == whole


@pytest.mark.parametrize("make", [symlink, hard_link])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "skipless.json", "modeling_skipless.py"])
def test_a_link_that_is_put_there_meanwhile_is_not_written_through(source, tmp_path, whole, make, name):
    unfinished = LocalDestination(tmp_path / "fused").unfinished

    def planting(plan, task):
        (unfinished / "model" / name).unlink(missing_ok=True)
        if task is plan.tasks[0]:
            make(unfinished / "model" / name)

    copied = name in ("tokenizer.json", "modeling_skipless.py")  # before, so that the link is found at the end
    with pytest.raises(InputError, match=f"{name}: expected ") if copied else nullcontext():
        fuse(source, tmp_path / "fused", progress=planting, **SMALL_FILES)
    assert copied or contents(tmp_path / "fused") == whole
    assert next(unfinished.rglob("precious")).read_text() == "theirs"


@pytest.mark.parametrize("name", ["evil.py", "zz.safetensors", "sub/evil.py", "new/evil.py", ".DS_Store", "empty/"])
@pytest.mark.parametrize("early", [True, False])
def test_what_is_planted_is_not_published(source, stopped, whole, name, early):
    planted = stopped / "model" / name

    def plant():
        planted.parent.mkdir(exist_ok=True)
        planted.mkdir() if name.endswith("/") else planted.write_text("evil")

    def planting(plan, task):
        if task is plan.tasks[-1] and not planted.exists():
            plant()

    if early:
        plant()
    with pytest.raises(
        InputError, match="expected only what this fuse writes there, found another file or folder; move"
    ):
        fuse(source, stopped.parent / "fused", resume=True, progress=planting, **SMALL_FILES)
    assert planted.exists()
    assert not (stopped.parent / "fused").exists()
    elsewhere = stopped.parent / "elsewhere"
    (planted.parent if name.startswith("new/") else planted).rename(elsewhere)
    resume(source, stopped)
    assert contents(stopped.parent / "fused") == whole


@pytest.mark.parametrize(
    "changes",
    [
        {"basis": []}, {"basis": "\x1b[2J"}, {"basis": "x"}, {"basis": None}, {"reason": "\x1b]0;x\x07"}, {"reason": 3},
        {"reason": "x" * 10**5}, {"format": "2"}, {"files": "\ud800"}, {"files": {}}, {"source": "\x1b[2J"},
        {"options": [0] * 10**5}, {"new\nfield": 1},
    ],
    ids=lambda changes: ascii(changes)[:30],
)  # fmt: skip
def test_a_job_of_other_values(source, stopped, changes):
    job = json.loads((stopped / "job.json").read_text())
    (stopped / "job.json").write_text(json.dumps({**job, **changes}))
    before = everything(stopped)
    options = ["--resume", *(["--basis", "auto"] if "basis" in changes else [])]
    line = command(source, stopped.parent / "fused", *options)
    assert len(line) < 7000
    assert everything(stopped) == before


def test_weights_that_are_all_zero_are_only_done_again(tmp_path):
    """A bias of zeros, as many a model has, looks like one that was never written."""
    source = save(build(dtype=torch.float32, attention_bias=True, **TWO_LAYERS), tmp_path / "source")
    zero = {
        f"model__layers__{layer}__self_attn__{name}_proj__bias": torch.zeros(size)
        for layer in (0, 1)
        for name, size in (("k", 4), ("v", 4))
    }
    edit_tensors(source, **zero)
    fuse(source, tmp_path / "whole", **SMALL_FILES)

    def stop(plan, task):
        if task is plan.tasks[-1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fuse(source, tmp_path / "fused", progress=stop, **SMALL_FILES)
    fuse(source, tmp_path / "fused", resume=True, **SMALL_FILES)
    assert contents(tmp_path / "fused") == contents(tmp_path / "whole")

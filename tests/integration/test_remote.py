"""Folders at URLs: read some megabytes at a time, written whole, checked, and as good as local ones."""

import importlib.util
import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
import torch
from click.testing import CliRunner

import skipless
from skipless import InputError, cli, fuse
from skipless.checkpoint import store
from skipless.checkpoint.reader import CheckpointReader
from skipless.checkpoint.remote import RemoteDestination, RemoteReader, shown
from skipless.errors import StorageError
from skipless.rewrite.fusion import plan_fuse
from skipless.rewrite.model_files import OURS
from skipless.rewrite.request import Request
from tests.http_server import hang, serving
from tests.models import MANY_FILES, build, save
from tests.models import contents as files

SOURCE, FUSED = "memory://models/source", "memory://models/fused"
BUNDLED = Path(skipless.__file__).parent / "bundled" / "stdlib"

needs_http = pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="fsspec reads http with aiohttp")


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """Whatever is tried again is tried at once."""
    monkeypatch.setattr(store, "POLICY", store.Policy(pause=0.01))


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    system = fsspec.filesystem("memory")
    save(build(dtype=torch.float32), tmp_path / "source", max_shard_size="30KB")
    (tmp_path / "source" / "LICENSE").write_text("free")
    system.put(str(tmp_path / "source"), "/models/source", recursive=True)
    yield system
    system.rm("/models", recursive=True)


def contents(system):
    return {path.rpartition("/")[2]: system.cat_file(path) for path in system.find("/models/fused")}


def test_from_a_url_to_a_url_is_from_a_folder_to_a_folder(memory, tmp_path):
    fuse(tmp_path / "source", tmp_path / "local", max_shard_size=30_000)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    result = CliRunner().invoke(cli.main, ["fuse", SOURCE, FUSED, "--max-shard-size", "0.03MB"])
    assert result.exit_code == 0, result.output
    assert contents(memory) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "source"]
    fuse(SOURCE, tmp_path / "downloaded", max_shard_size=30_000)
    assert {path.name: path.read_bytes() for path in (tmp_path / "downloaded").iterdir()} == expected


def test_only_headers_are_fetched_before_a_tensor_is_read(memory, monkeypatch):
    fetched = []
    cat = type(memory).cat_file
    monkeypatch.setattr(
        type(memory),
        "cat_file",
        lambda self, path, start=None, end=None: fetched.append(end - start) or cat(self, path, start, end),
    )
    reader = RemoteReader(SOURCE)
    before = sum(fetched)
    assert before < sum(info.bytes for info in reader.tensors.values()) / 10
    shard = reader.tensors["lm_head.weight"].shard
    reader.tensor("lm_head.weight")
    assert sum(fetched) - before == (reader.folder / shard).stat().st_size < store.RANGE


def test_a_source_that_changes_and_a_folder_that_exists(memory, tmp_path):
    reader = RemoteReader(SOURCE)
    shard = f"/models/source/{reader.shards[0]}"
    memory.pipe_file(shard, memory.cat_file(shard) + b"x")
    name = next(name for name, info in reader.tensors.items() if info.shard == reader.shards[0])
    with pytest.raises(InputError, match="expected the file as it was when its header was read"):
        reader.tensor(name)
    with pytest.raises(InputError, match="memory://models/source: expected a new folder, found one that exists"):
        fuse(tmp_path / "source", SOURCE)


def test_a_range_that_comes_back_short_can_be_tried_again(memory, monkeypatch):
    reader = RemoteReader(SOURCE)
    cat = type(memory).cat_file
    monkeypatch.setattr(type(memory), "cat_file", lambda self, path, start, end: cat(self, path, start, end)[:-1])
    with pytest.raises(StorageError, match="the connection was cut, or the server reads no ranges"):
        reader.tensor("lm_head.weight")


def test_whatever_a_store_raises_is_one_line(memory, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("no credentials\nfound")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "ls", refused)
        with pytest.raises(StorageError, match="memory://models/source: could not be read: no credentials found"):
            fuse(SOURCE, tmp_path / "fused")


def test_pickles_and_large_configs_are_not_fetched(memory, monkeypatch):
    memory.pipe_file("/models/source/pytorch_model.bin", b"pickle")
    assert (RemoteReader(SOURCE).folder / "pytorch_model.bin").stat().st_size == 0
    monkeypatch.setattr("skipless.checkpoint.remote.BOUNDS", {"config.json": 10})
    with pytest.raises(InputError, match=r"memory://models/source/config\.json: expected at most 10 bytes, found"):
        RemoteReader(SOURCE)


def test_errors_name_the_url(memory):
    memory.pipe_file("/models/source/config.json", b"{")
    with pytest.raises(InputError, match=r"memory://models/source/config\.json: expected JSON"):
        RemoteReader(SOURCE)


def test_nothing_there_and_no_such_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"config.json: expected a JSON file, found no such file"):
        fuse("memory://nowhere", tmp_path / "fused")
    with pytest.raises(InputError, match="nonsense://x: expected a URL that fsspec opens"):
        fuse("nonsense://x", tmp_path / "fused")
    assert not list(tmp_path.iterdir())


def test_a_store_that_loses_bytes_and_another_attempt(memory, tmp_path, monkeypatch):
    put = type(memory).put_file

    def lossy(self, local, remote, **options):
        put(self, local, remote, **options)
        self.pipe_file(remote, self.cat_file(remote)[:-1])

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put_file", lossy)
        with pytest.raises(StorageError, match="expected what was sent, found other bytes there; what is done is"):
            fuse(tmp_path / "source", FUSED)
    assert "config.json" not in contents(memory)
    fuse(tmp_path / "source", FUSED, resume=True)
    assert "config.json" in contents(memory)
    assert not RemoteDestination(FUSED).unfinished.exists()


@pytest.fixture
def requests(memory, monkeypatch):
    """What was asked of the store: (kind, path, bytes)."""
    asked = []
    for kind in ("ls", "info", "cat_file"):
        function = getattr(type(memory), kind)

        def counted(self, path, *args, kind=kind, function=function, **kwargs):
            asked.append((kind, path, args[1] - args[0] if kind == "cat_file" else 0))
            return function(self, path, *args, **kwargs)

        monkeypatch.setattr(type(memory), kind, counted)
    return asked


def test_a_fuse_is_a_few_requests(memory, requests, tmp_path):
    """One for some megabytes, and one to see that they are of the same version; not one for each row of a table."""
    memory.put(str(BUNDLED), "/models/bundled", recursive=True)
    requests.clear()
    fuse("memory://models/bundled", tmp_path / "fused")
    kinds = [kind for kind, *_ in requests]
    assert kinds.count("ls") == 1
    ranges = -(-(BUNDLED / "model.safetensors").stat().st_size // store.RANGE)
    others = len({file.name for file in BUNDLED.iterdir()} - OURS - {"config.json", "model.safetensors"})
    assert kinds.count("cat_file") == ranges + others + 3  # config.json, a header and its length
    assert len(requests) < 1313 / 10  # as many as it once took
    fuse(BUNDLED, tmp_path / "local")
    assert files(tmp_path / "fused").keys() == files(tmp_path / "local").keys()
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_ranges_that_are_shorter_than_tensors(memory, tmp_path, monkeypatch):
    fuse(tmp_path / "source", tmp_path / "local", max_shard_size=30_000)
    for size in (1000, 7808, 10_001):
        monkeypatch.setattr("skipless.checkpoint.remote.RANGE", size)
        fuse(SOURCE, tmp_path / str(size), max_shard_size=30_000)
        assert files(tmp_path / str(size)) == files(tmp_path / "local")


def test_other_files_are_listed_for_the_plan_and_fetched_when_they_are_copied(memory, requests, tmp_path):
    memory.pipe_file("/models/source/templates/chat.jinja", b"x" * 1000)
    requests.clear()
    job = plan_fuse(SOURCE, tmp_path / "fused", Request(), 10**9)
    others = {str(file) for file in job.reader.other_files()}
    assert {"LICENSE", "templates/chat.jinja"} <= others
    assert (job.reader.folder / "templates/chat.jinja").stat().st_size == 1000
    read = {path.removeprefix("/models/source/") for kind, path, _ in requests if kind == "cat_file"}
    assert not read & others
    fuse(SOURCE, tmp_path / "fused")
    assert (tmp_path / "fused/templates/chat.jinja").read_bytes() == b"x" * 1000
    record = json.loads((tmp_path / "fused/skipless.json").read_text())
    assert record["source"]["files"]["templates/chat.jinja"] == record["files"]["templates/chat.jinja"]["sha256"]


@pytest.mark.parametrize(("most", "all_of_them"), [(999, 10**6), (10**5, 1500)])
def test_other_files_that_are_too_large(memory, requests, tmp_path, monkeypatch, most, all_of_them):
    monkeypatch.setattr("skipless.checkpoint.remote.MOST_OTHER", most)
    monkeypatch.setattr("skipless.checkpoint.remote.MOST_OTHERS", all_of_them)
    for name in ("LICENSE", "configuration_skipless.py", "modeling_skipless.py", "generation_config.json"):
        memory.rm(f"/models/source/{name}")
    for name in "ab":
        memory.pipe_file(f"/models/source/{name}.txt", b"x" * 1000)
    requests.clear()
    file = "a.txt" if most < 1000 else "b.txt"
    with pytest.raises(InputError, match=rf"source/{file}: expected files beside the weights of at most {most:,} by"):
        fuse(SOURCE, tmp_path / "fused", copy=("*.txt",))
    assert not any(path.endswith(".txt") for kind, path, _ in requests if kind == "cat_file")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../../x", "a//b", "a\\..\\b", "a\x1b[2J", "a\x00", "x" * 300, "\ud800", "."],
    ids=ascii,
)
def test_names_that_a_store_makes_up(memory, tmp_path, monkeypatch, name):
    path = name if name.startswith("/") else f"/models/source/{name}"
    made_up = [{"name": path, "size": 1, "type": "file"}]
    before = sorted(tmp_path.parent.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "ls", lambda self, path, detail: made_up)
        result = CliRunner().invoke(cli.main, ["fuse", SOURCE, "fused"])
    assert result.exit_code == 2
    assert "memory://models/source: expected names of files in this folder, found" in result.stderr
    assert result.stderr.strip().isprintable()
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_more_files_than_any_model_and_folders_without_end(memory, monkeypatch):
    entry = {"size": 0, "type": "directory"}
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "ls", lambda self, path, detail: [{**entry, "name": f"{path}/a"}])
        with pytest.raises(InputError, match="expected at most 100,000 files in this folder, 64 folders within each"):
            RemoteReader(SOURCE)
    monkeypatch.setattr(store, "MOST_FILES", 5)
    with pytest.raises(InputError, match="expected at most 5 files in this folder"):
        RemoteReader(SOURCE)


@pytest.mark.parametrize("size", [None, -1, "many", 10**30])
def test_sizes_that_a_store_makes_up(memory, tmp_path, monkeypatch, size):
    info = type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda self, path: {**info(self, path), "size": size})
    found = "could not be put into" if size == 10**30 else "expected a file whose size the store tells"
    with pytest.raises(InputError, match=found if size != 10**30 else "expected at most 16,000,000 bytes, found 1"):
        fuse(SOURCE, tmp_path / "fused")


def test_a_store_that_gives_other_bytes_from_now_on(memory, monkeypatch):
    reader = RemoteReader(SOURCE)
    cat = type(memory).cat_file

    def changing(self, path, start, end):
        data = cat(self, path, start, end)
        self.pipe_file(path, cat(self, path, None, None))
        return data

    monkeypatch.setattr(type(memory), "cat_file", changing)
    with pytest.raises(InputError, match="expected the file as it was when its header was read"):
        reader.tensor("lm_head.weight")


def test_a_store_that_tells_no_version(memory, tmp_path, monkeypatch, caplog):
    info = type(memory).info
    fuse(SOURCE, tmp_path / "fused")
    assert not caplog.records
    monkeypatch.setattr(
        type(memory), "info", lambda self, path: {name: info(self, path)[name] for name in ("name", "size", "type")}
    )
    fuse(SOURCE, tmp_path / "again")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "memory://models/source/config.json: its store tells a size, and no version" in record.getMessage()


# Requests: how long, how often, and what is said of them.


def failing(monkeypatch, memory, function, *errors):
    """Let a function of the file system raise these, one a call, and then work. What was called is noted."""
    works, called = getattr(type(memory), function), []

    def broken(self, *args, **kwargs):
        called.append(args)
        if len(called) <= len(errors):
            error = errors[len(called) - 1]
            if isinstance(error, float):
                time.sleep(error)
            else:
                raise error
        return works(self, *args, **kwargs)

    monkeypatch.setattr(type(memory), function, broken)
    return called


class AnswerError(Exception):
    """As packages for http raise it."""

    def __init__(self, status):
        super().__init__(f"status {status}")
        self.status = status


@pytest.mark.parametrize("function", ["ls", "info", "cat_file"])
@pytest.mark.parametrize(
    "error", [ConnectionResetError("reset"), TimeoutError("late"), OSError("?"), AnswerError(503), 5.0]
)
def test_what_may_pass_is_tried_again(memory, monkeypatch, function, error):
    monkeypatch.setattr(store, "POLICY", store.Policy(wait=0.2, slowest=2.0**30, pause=0.01))
    called = failing(monkeypatch, memory, function, error, error)
    RemoteReader(SOURCE)
    assert called[0] == called[1] == called[2]
    failing(monkeypatch, memory, function, *[error] * 3)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"memory://models/source.*: could not be read: .* \(tried 3 times\)$"):
        RemoteReader(SOURCE)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "error", [PermissionError("no"), AnswerError(403), ValueError("no"), FileNotFoundError("gone")]
)
def test_what_will_not_pass_is_not_tried_again(memory, monkeypatch, error):
    called = failing(monkeypatch, memory, "cat_file", error)
    with pytest.raises(StorageError, match=r"memory://models/source/config.json: could not be read: [^()]*$"):
        RemoteReader(SOURCE)
    assert len(called) == 1


@pytest.mark.parametrize("function", ["exists", "put_file", "makedirs"])
def test_a_destination_that_hangs(memory, tmp_path, monkeypatch, function):
    monkeypatch.setattr(store, "POLICY", store.Policy(wait=0.2, slowest=2.0**30, pause=0.01))
    failing(monkeypatch, memory, function, *[30.0] * 3)
    with pytest.raises(StorageError, match=r"memory://models/fused.*: no answer within 0 s \(tried 3 times\)"):
        fuse(tmp_path / "source", FUSED)


def test_a_request_for_more_bytes_may_take_longer(monkeypatch, memory):
    monkeypatch.setattr(store, "POLICY", store.Policy(wait=0.1, slowest=1000.0, tries=1))
    memory.pipe_file("/models/large", bytes(1000))
    failing(monkeypatch, memory, "cat_file", 0.5)
    assert store.Store("memory://models").read("large", 0, 1000) == bytes(1000)


# Secrets.

SECRET = "memory://me5:pass:word7@models/source?token=t0ken%2F9&sig=s1g#fr4g"


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("s3://bucket/model", "s3://bucket/model"),
        ("s3://key:secret@bucket/model", "s3://bucket/model"),
        ("https://me:pw@host:8080/a/b?X-Amz-Signature=1#x", "https://host:8080/a/b"),
        ("https://me:p@w@host/a@b", "https://host/a@b"),
        ("https://me:p/w@host/a", "https://..."),
        ("https://me:p?w@host/a", "https://..."),
        ("https://me:a::b@host/a", "https://host/a"),
        ("http://me:pw@[::1]:80/a?x", "http://[::1]:80/a"),
        ("hf://org/model@main", "hf://org/model@main"),
        ("abfs://container@account.dfs.core.windows.net/a?sig=1", "abfs://container@account.dfs.core.windows.net/a"),
        ("simplecache::https://me:pw@host/a?t=1", "https://host/a"),
        ("file:///a?b", "file:///a"),
        ("/a/b", "/a/b"),
    ],
)
def test_what_a_url_is_called(url, found):
    assert shown(url) == found


def test_no_secret_is_said_or_written(memory, tmp_path, monkeypatch, caplog):
    memory.put(str(tmp_path / "source"), "/me5:pass:word7@models/source?token=t0ken%2F9&sig=s1g#fr4g", recursive=True)
    said = []

    def command(*arguments):
        result = CliRunner().invoke(cli.main, ["fuse", *arguments])
        said.append(result.output)
        return result.exit_code

    def quoting(self, path, *_):
        raise RuntimeError(f"GET https://me5:pass:word7@host{path} t0ken/9: 500 at {SECRET!r}")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "cat_file", quoting)
        assert command(SECRET, "fused") == 2
        with pytest.raises(StorageError) as raised:
            fuse(SECRET, "fused")
        said.append("".join(skipless_lines(raised.value)))
    assert said[0].startswith("skipless: memory://models/source/config.json: could not be read: GET https://host/")
    assert command(SECRET, "fused", "--dry-run") == 0
    with monkeypatch.context() as patch:
        patch.setattr("skipless.rewrite.execution.run_task", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr("skipless.checkpoint.staging._discard", lambda *_: None)
        patch.setattr(sys, "argv", ["skipless", "fuse", SECRET, "fused"])
        assert command(SECRET, "fused") == 130
    said.append((tmp_path / ".fused.unfinished/job.json").read_text())
    assert '"source": "memory://models/source"' in said[-1]
    assert command(SECRET, "fused", "--resume") == 0
    assert "wrote fused; check it with: skipless verify memory://models/source fused" in said[-1]
    said.append((tmp_path / "fused/skipless.json").read_text())
    assert json.loads(said[-1])["source"]["name"] == "source"
    assert command(str(tmp_path / "source"), SECRET) == 2
    assert "memory://models/source: expected a new folder, found one that exists" in said[-1]
    assert command(f"simplecache::{SECRET}", "other") == 2
    assert command(SECRET.replace("memory", "nonsense"), "other") == 2
    said.append(str(RemoteDestination(SECRET).unfinished))
    said.append(caplog.text)
    for secret in ("me5", "word7", "t0ken", "s1g", "fr4g"):
        for text in said:
            assert secret not in text
    memory.rm("/me5:pass:word7@models", recursive=True)


def skipless_lines(error):
    """A traceback of what was raised, with whatever it says it came from."""
    import traceback

    return traceback.format_exception(error, chain=True)


def test_the_same_folder_with_another_token_goes_on(memory, tmp_path, monkeypatch):
    """What a job is of is told by the place and by what the store says of its files."""
    first, second = (f"memory://me:{token}@models/source" for token in ("first", "second"))
    for url in (first, second):
        memory.put(str(tmp_path / "source"), url.removeprefix("memory:/"), recursive=True)
    times = {"created": "now"}
    info = type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda self, path: {**info(self, path), **times})
    ls = type(memory).ls
    with monkeypatch.context() as outer:
        outer.setattr(
            type(memory), "ls", lambda self, path, detail: [{**one, **times} for one in ls(self, path, detail)]
        )
        with monkeypatch.context() as patch:
            patch.setattr("skipless.rewrite.fusion._check", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                fuse(first, tmp_path / "fused", **MANY_FILES)
        fuse(second, tmp_path / "fused", resume=True, **MANY_FILES)
    for url in (first, second):
        memory.rm(url.removeprefix("memory:/"), recursive=True)


# Whose files they are.


@pytest.mark.parametrize("kind", ["file://", "local://"])
def test_urls_of_this_machines_files_are_paths(source, tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuse(source, tmp_path / "local")
    plan_fuse(f"{kind}{source}", "x", Request(), 10**9)
    job = plan_fuse(f"{kind}{source}", f"{kind}{tmp_path}/fused", Request(), 10**9)
    assert (type(job.reader), job.reader.name) == (CheckpointReader, str(source))
    fuse(f"{kind}{source}", f"{kind}{tmp_path}/fused")
    assert files(tmp_path / "fused") == files(tmp_path / "local")
    with pytest.raises(InputError, match=r"expected a folder outside the source .*, which stays as it is"):
        fuse(f"{kind}{source}", f"{kind}{source}/fused")
    (source / "passwd.md").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match=r"passwd.md: expected a file in this folder, found a symlink to /etc/passwd"):
        fuse(f"{kind}{source}", tmp_path / "other")
    for wrapped in (f"simplecache::{kind}{source}", f"dir::{kind}{source}"):
        with pytest.raises(InputError, match="expected one URL, found several in each other"):
            fuse(wrapped, tmp_path / "other")


def test_a_url_within_the_source(memory, tmp_path):
    for within in (f"{SOURCE}/fused", SOURCE):
        with pytest.raises(InputError, match=f"{within}: expected a folder outside the source {SOURCE}, which stays"):
            fuse(SOURCE, within)


# http.


@needs_http
def test_over_http(source, tmp_path):
    fuse(source, tmp_path / "local", **MANY_FILES)
    with serving(tmp_path) as server:
        fuse(f"{server.url}/source", tmp_path / "fused", **MANY_FILES)
        assert len(server.requests) < 40
    assert files(tmp_path / "fused") == files(tmp_path / "local")


@pytest.mark.slow
@needs_http
def test_a_server_that_hangs(source, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "POLICY", store.Policy(wait=0.5, pause=0.01))
    with serving(tmp_path) as server:
        server.fault = hang(500)
        with pytest.raises(StorageError, match=rf"^{server.url}/source: could not be read: .* \(tried 3 times\)$"):
            fuse(f"{server.url}/source", tmp_path / "fused")
        program = "from skipless.checkpoint import store; store.POLICY = store.Policy(wait=1, tries=1)\n"
        program += "from skipless.cli import main; main()"
        found = subprocess.run(
            [sys.executable, "-c", program, "fuse", f"{server.url}/source", str(tmp_path / "fused")],
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert (found.returncode, found.stdout) == (2, "")
        assert found.stderr == f"skipless: {server.url}/source: could not be read: no answer within 1 s\n"


@needs_http
def test_a_server_that_hangs_within_an_answer(source, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "POLICY", store.Policy(wait=0.5, pause=0.01))

    def half(handler):
        if handler.command != "GET" or not handler.path.endswith("config.json"):
            return False
        handler.send_response(206)
        handler.send_header("Content-Length", str((source / "config.json").stat().st_size))
        handler.end_headers()
        handler.wfile.write(b"{")
        handler.wfile.flush()
        time.sleep(10)
        return True

    with serving(tmp_path) as server:
        server.fault = half
        with pytest.raises(StorageError, match=r"source/config.json: could not be read: .* \(tried 3 times\)$"):
            fuse(f"{server.url}/source", tmp_path / "fused")


@needs_http
@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_is_busy(source, tmp_path, status):
    def busy(handler):
        if len(server.requests) % 3 == 1:
            handler.send_error(status)
            return True
        return False

    with serving(tmp_path) as server:
        server.fault = busy
        RemoteReader(f"{server.url}/source").tensor("lm_head.weight")


@needs_http
def test_a_server_that_refuses_a_user(source, tmp_path):
    with serving(tmp_path) as server:
        server.fault = lambda handler: handler.send_error(401) or True
        url = server.url.replace("http://", "http://me5:word7@")
        with pytest.raises(StorageError) as raised:
            fuse(f"{url}/source", tmp_path / "fused")
        assert len(server.requests) == 1
    text = "".join(skipless_lines(raised.value))
    assert "401" in text
    assert "me5" not in text
    assert "word7" not in text


@needs_http
def test_a_server_that_reads_no_ranges(source, tmp_path):
    """Is not asked for the whole of each file again and again."""
    with serving(tmp_path) as server:
        server.ranges = False
        with pytest.raises(
            StorageError, match=r"model.safetensors: .* expected 8 bytes, found 1.*: the server reads no"
        ):
            fuse(f"{server.url}/source", tmp_path / "fused")


@needs_http
def test_a_server_that_tells_no_version(source, tmp_path, caplog):
    with serving(tmp_path) as server:
        server.marks = False
        RemoteReader(f"{server.url}/source")
    assert "config.json: its store tells a size, and no version" in caplog.text

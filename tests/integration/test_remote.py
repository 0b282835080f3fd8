"""Folders at URLs: read a range at a time, written whole, checked, and as good as local ones."""

import fsspec
import pytest
import torch
from click.testing import CliRunner

from skipless import InputError, cli, fuse
from skipless.checkpoint.remote import RemotePlace, RemoteReader
from skipless.errors import StorageError
from tests.models import build, save

SOURCE, FUSED = "memory://models/source", "memory://models/fused"


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
    reader.tensor("lm_head.weight")
    assert sum(fetched) - before == reader.tensors["lm_head.weight"].bytes


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
        patch.setattr(type(memory), "find", refused)
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
    assert not RemotePlace(FUSED).unfinished.exists()

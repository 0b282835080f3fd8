"""Text from files of every kind."""

import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from skipless.errors import InputError
from skipless.train import texts
from skipless.train.data import Blocks
from skipless.train.texts import documents, kind_of, matching, read_tokens

TEXTS = ["one\ntwo\n", "ünïcödé 🦜", "three"]


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, kind: str) -> str:
    """TEXTS and an empty one as files of a kind; a pattern of them."""
    rows = [{"text": text, "other": 1} for text in [*TEXTS, " \n"]]
    if kind == "text":
        for number, row in enumerate(rows):
            (folder / f"{number}.md").write_text(row["text"])
        return f"{folder}/*.md"
    if kind == "folder":
        datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
        return str(folder / "saved")
    for number, part in enumerate((rows[:2], rows[2:])):
        if kind == "parquet":
            datasets.Dataset.from_list(part).to_parquet(folder / f"{number}.parquet")
            continue
        lines = "".join(json.dumps(row) + "\n" for row in part).encode()
        file = folder / f"{number}.{kind}"
        file.write_bytes(gzip.compress(lines) if kind == "jsonl.gz" else lines)
    return f"{folder}/**/*.{kind}"


@pytest.mark.parametrize("kind", ["text", "jsonl", "jsonl.gz", "parquet", "folder"])
def test_documents_of_every_kind(kind: str, tmp_path: Path):
    assert list(documents(matching([write(tmp_path, kind)]), "text")) == TEXTS


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_rows_without_text_are_refused(kind: str, tmp_path: Path):
    files = matching([write(tmp_path, kind)])
    with pytest.raises(InputError, match="row 0: content: expected text, found NoneType; fields are text, other"):
        list(documents(files, "content"))
    with pytest.raises(InputError, match="row 0: other: expected text, found int"):
        list(documents(files, "other"))


def test_a_long_file_is_read_in_pieces_that_end_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(texts, "PIECE", 10)
    text = "".join(f"line {number}\r\n" for number in range(20))
    (tmp_path / "a.txt").write_bytes(text.encode())
    found = list(documents([tmp_path / "a.txt"], "text"))
    assert "".join(found) == text
    assert len(found) > 5
    assert all(piece.endswith("\n") for piece in found)


def test_what_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes(b"\xe4")
    (tmp_path / "bad.jsonl").write_text('{"text": 1\n')
    (tmp_path / "a.parquet").write_text("x")
    for name, message in (
        ("latin.txt", r"latin\.txt: expected UTF-8 text, found .*; convert it, or leave it out"),
        ("bad.jsonl", r"bad\.jsonl: expected json, found"),
        ("a.parquet", r"a\.parquet: expected parquet, found"),
    ):
        with pytest.raises(InputError, match=message):
            list(documents([tmp_path / name], "text"))
    with pytest.raises(InputError, match="expected files, found none"):
        matching([f"{tmp_path}/*.md"])
    with pytest.raises(InputError, match=r"expected files, found folders; name what is in them: .*/\*\*/\*\.txt"):
        matching([str(tmp_path)])
    with pytest.raises(InputError, match=r"expected files of one kind, found .*\(.*\) and .*\(.*\)"):
        kind_of(matching([f"{tmp_path}/*"]))


def test_a_folder_of_splits_is_not_one_dataset(tmp_path: Path):
    part = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict(train=part, test=part).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"expected one dataset, found train, test; name one: .*saved/train"):
        list(documents(matching([str(tmp_path / "saved")]), "text"))
    assert list(documents(matching([str(tmp_path / "saved" / "test")]), "text")) == ["a"]


@pytest.mark.parametrize("vocab_size", [2**16, 2**16 + 1])
def test_tokens_are_mapped_not_read(vocab_size: int, tmp_path: Path):
    tokens = np.arange(100)
    tokens.astype(np.uint16 if vocab_size == 2**16 else np.uint32).tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", tokens)
    for file in matching([f"{tmp_path}/a.*"]):
        blocks = Blocks.cut(read_tokens(file, vocab_size), 32)
        assert len(blocks) == 3
        assert blocks[1]["input_ids"].dtype == torch.int64
        assert blocks[1]["input_ids"].tolist() == list(range(32, 64))
        training, held_out = blocks.split(0.3)
        assert [len(training), len(held_out)] == [2, 1]
        assert held_out[0]["input_ids"][0] == 64


def test_tokens_that_are_none_are_refused(tmp_path: Path):
    np.save(tmp_path / "float.npy", np.zeros(3))
    np.save(tmp_path / "two.npy", np.zeros((3, 2), int))
    np.save(tmp_path / "negative.npy", np.array([1, -1]))
    np.save(tmp_path / "large.npy", np.array([1, 61]))
    (tmp_path / "empty.bin").touch()
    for name, message in (
        ("float.npy", "expected one dimension of integers, found float64"),
        ("two.npy", "expected one dimension of integers, found int64 .*2"),
        ("negative.npy", "expected tokens from 0 to 60, found -1"),
        ("large.npy", "expected tokens from 0 to 60, found 61"),
        ("empty.bin", "expected tokens, found"),
    ):
        with pytest.raises(InputError, match=rf"{name}: {message}"):
            read_tokens(tmp_path / name, 61)
    with pytest.raises(InputError, match=r"float\.npy: expected text, found a file of tokens"):
        documents([tmp_path / "float.npy"], "text")

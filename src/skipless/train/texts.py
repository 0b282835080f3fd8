"""Text to train on and to evaluate: files by pattern, read one document after the other, or tokens as they are."""

import itertools
import lzma
import zlib
from collections.abc import Iterator, Sequence
from glob import iglob
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from skipless.errors import InputError

# Characters of a document that is read from a text file; longer files are cut at the end of a line.
PIECE = 2**16
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".npy": "tokens", ".bin": "tokens"}


def matching(patterns: Sequence[str]) -> list[Path]:
    """The files of shell patterns (** for any folders), each once, in order. Raises InputError for one without any."""
    matched: dict[Path, None] = {}
    for pattern in patterns:
        try:
            whole = str(Path(pattern).expanduser())
        except RuntimeError as error:  # ~ of someone who is not there
            raise InputError(f"{pattern}: expected files, found none: {error}") from error
        paths = sorted(map(Path, iglob(whole, recursive=True)))  # noqa: PTH207  (Path has no absolute ones)
        files = [path for path in paths if path.is_file() or _saved_by_datasets(path)]
        if not files:
            found = f"folders; name what is in them: {pattern.rstrip('/')}/**/*.txt" if paths else "none"
            raise InputError(f"{pattern}: expected files, found {found}")
        matched |= dict.fromkeys(files)
    return list(matched)


def kind_of(files: Sequence[Path]) -> str:
    """What all files are: "text", "json", "parquet", "tokens" or "folder".

    Raises InputError when they differ, and for compressed tokens, which cannot be mapped into memory.
    """
    kinds = {_kind(file): file for file in files}
    if len(kinds) > 1:
        (one, a), (other, b), *_ = kinds.items()
        raise InputError(f"files: expected files of one kind, found {a} ({one}) and {b} ({other})")
    return next(iter(kinds))


def documents(files: Sequence[Path], field: str) -> Iterator[str]:
    """The texts of files, never all in memory; empty ones are left out.

    field: of JSON lines, Parquet files and datasets folders, the one that holds the text. Raises InputError for what
    cannot be read, and for rows without text.
    """
    kind = kind_of(files)
    if kind == "tokens":
        raise InputError(f"{files[0]}: expected text, found a file of tokens")
    texts = _text_files(files) if kind == "text" else _rows(kind, files, field)
    return (text for text in texts if text.strip())


def read_tokens(file: Path, vocab_size: int) -> torch.Tensor:
    """The tokens of a file, (tokens,), mapped into memory, not read.

    A .npy file holds one dimension of integers; any other, uint16 where vocab_size is at most 65,536, else uint32.
    Raises InputError for another, and for a token that vocab_size does not reach.
    """
    try:
        if file.suffix == ".npy":
            tokens = np.load(file, mmap_mode="c")
        else:
            tokens = np.memmap(file, token_dtype(vocab_size), mode="c")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file}: expected tokens, found {error}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InputError(f"{file}: expected one dimension of integers, found {tokens.dtype} {tokens.shape}")
    for start in range(0, len(tokens), 2**24):
        part = tokens[start : start + 2**24]
        if not (wrong := int(part.min())) >= 0 or not (wrong := int(part.max())) < vocab_size:
            raise InputError(f"{file}: expected tokens from 0 to {vocab_size - 1}, found {wrong}")
    return torch.from_numpy(tokens)


def token_dtype(vocab_size: int) -> Any:
    """Of the tokens in a file that does not say: the smaller of uint16 and uint32 that holds them all."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def _saved_by_datasets(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _kind(path: Path) -> str:
    if path.is_dir():
        return "folder"
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    kind = KINDS.get(suffixes[-1] if suffixes else "", "text")
    if kind == "tokens" and path.suffix.lower() in COMPRESSED:
        raise InputError(f"{path}: expected tokens that are not compressed, found {path.suffix}; unpack it")
    return kind


def _text_files(files: Sequence[Path]) -> Iterator[str]:
    for file in files:
        try:
            with file.open(encoding="utf-8", newline="") as text:
                while piece := "".join(text.readlines(PIECE)):
                    yield piece
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: expected UTF-8 text, found {error}; convert it, or leave it out") from error


def _rows(kind: str, files: Sequence[Path], field: str) -> Iterator[str]:
    names = [str(file) for file in files]
    datasets.disable_progress_bars()
    try:
        if kind == "folder":
            tables = [datasets.load_from_disk(name) for name in names]
            for name, table in zip(names, tables, strict=True):
                if isinstance(table, datasets.DatasetDict):
                    raise InputError(f"{name}: expected one dataset, found {', '.join(table)}; name one: {name}/train")
            rows: Iterator[dict[str, Any]] = itertools.chain.from_iterable(tables)
        else:
            rows = iter(datasets.load_dataset(kind, data_files=names, split="train", streaming=True))
        for number, row in enumerate(rows):
            if not isinstance(text := row.get(field), str):
                raise InputError(
                    f"{names[0]}: row {number}: {field}: expected text, found {type(text).__name__}; fields are "
                    f"{', '.join(row)}; name one as `field`"
                )
            yield text
    except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{names[0]}: expected {kind}, found {' '.join(str(error).split())}") from error

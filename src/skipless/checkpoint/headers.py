"""A model folder's config.json and safetensors headers: names, shapes and dtypes of all tensors. Imports no torch."""

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

from skipless.checkpoint.others import PICKLES, is_copied, is_entered
from skipless.dtypes import INDEX_NAMES, SAFETENSORS_NAMES
from skipless.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Bytes of what is read whole. Published configs have 0.1 MB at most, indices 20 MB; safetensors reads headers of up to
# 100 MB, in which there would be more tensors than MOST_VALUES allows.
MOST_CONFIG = 16 * 10**6
MOST_INDEX = MOST_HEADER = 48 * 10**6
# Values in such a file: each takes up to 250 bytes of memory, however few of the file. A header has nine a tensor.
# Whatever a folder holds, reading what describes it takes less than MOST_MEMORY bytes (benchmarks/fuzz.py).
MOST_VALUES = 2 * 10**6
MOST_MEMORY = 10**9
# Objects, lists or folders within each other, and digits of a number.
MOST_NESTED = 64
MOST_DIGITS = 40
# Tensors, and other files, in a model folder.
MOST_TENSORS = 5 * 10**5
MOST_FILES = 10**5

FILE_TYPES = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True)
class Header:
    """What a header says of a tensor; dtype: as safetensors calls it; start: of its bytes in the file."""

    shape: tuple[int, ...]
    dtype: str
    shard: str
    start: int = 0


def ignores_nothing(name: str) -> bool:
    """The default `ignores`: every tensor counts."""
    return False


class Folder:
    """A model folder, by its config and headers. No tensor is read.

    Raises InputError naming the file, field or tensor for anything missing, truncated, contradicting or not
    safetensors; pickle files are never opened.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise InputError(f"{folder}: expected a model folder, found {'a file' if folder.exists() else 'nothing'}")
        self.folder = folder
        self.config = read_json_object(folder / "config.json", folder=folder)
        self._weight_map: dict[str, str] | None = None
        self.shards = self._find_shards()
        self.headers: Mapping[str, Header] = self._read_headers()

    def path(self, name: str) -> Path:
        """Where the config, the index or a shard lies."""
        return self.folder / name

    def _find_shards(self) -> list[str]:
        index = self.folder / INDEX
        if os.path.lexists(index):
            if os.path.lexists(self.folder / SINGLE):
                raise InputError(
                    f"{self.folder}: expected one of {SINGLE} and {INDEX}, found both; remove the stale one"
                )
            self._weight_map = _weight_map(index, self.folder)
            return sorted(set(self._weight_map.values()))
        if os.path.lexists(self.folder / SINGLE):
            return [SINGLE]
        pickles = sorted(file.name for pattern in PICKLES for file in self.folder.glob(pattern))
        if pickles:
            raise InputError(
                f"{self.folder / pickles[0]}: expected safetensors, found a pickle file, which can run code when it is "
                f"opened; if you trust it, convert it: load the model with transformers and call save_pretrained"
            )
        raise InputError(f"{self.folder}: expected {SINGLE} or {INDEX}, found neither")

    def _read_headers(self) -> dict[str, Header]:
        headers: dict[str, Header] = {}
        for shard in self.shards:
            expected = "a safetensors file" if self._weight_map is None else f"a shard that {INDEX} names"
            for name, header in sorted(read_header(self.folder / shard, expected, self.folder).items()):
                if name in headers:
                    raise InputError(f"{name}: expected once, found in {headers[name].shard} and {shard}")
                headers[name] = header
            if len(headers) > MOST_TENSORS:
                raise InputError(f"{self.folder}: expected at most {MOST_TENSORS:,} tensors, found {len(headers):,}")
        for name, shard in (self._weight_map or {}).items():
            if name not in headers or headers[name].shard != shard:
                raise InputError(f"{name}: expected in {shard}, as {INDEX} says; not found there")
        return headers

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        indices: Collection[str] = (),
        ignores: Callable[[str], bool] = ignores_nothing,
    ) -> None:
        """Compare names, shapes and kinds (integers for `indices`, else floating point) with what config.json promises.

        ignores: whether a tensor that was not promised does not matter. Raises InputError for the first difference.
        """
        check_headers(self.headers, str(self.folder), "config.json", expected, indices, ignores)

    def other_files(self, copy: Collection[str] = ()) -> list[Path]:
        """What is copied along, relative to the folder, in a fixed order: by what it is for, and `copy` (others.py).

        Raises InputError for a folder that cannot be read, and for what cannot be copied: anything but files, and
        symlinks that are not followed (check_file).
        """
        others = sorted(path for path, copied in self._others(copy) if copied)
        for path in others:
            check_file(self.folder / path, "a file to copy", self.folder)
        return others

    def left_out(self, copy: Collection[str] = ()) -> list[str]:
        """Files that are not copied, beside config.json and the weights. A folder stands for all that is in it."""
        ours = {"config.json", INDEX, *self.shards}
        return sorted(
            f"{path.as_posix()}{'/' * (self.folder / path).is_dir()}"
            for path, copied in self._others(copy)
            if not copied and path.as_posix() not in ours
        )

    def _others(self, copy: Collection[str]) -> Iterator[tuple[Path, bool]]:
        """Files, and folders that are not entered, relative to the folder, and whether they are copied."""
        count, folders = 0, [self.folder]
        while folders:
            parent = folders.pop()
            if len(parent.parts) - len(self.folder.parts) > MOST_NESTED:
                raise InputError(f"{parent}: expected at most {MOST_NESTED} folders within each other; remove it")
            for file in _files(parent):
                path = file.relative_to(self.folder)
                if file.is_symlink() or not file.is_dir():
                    yield path, is_copied(path, copy)
                elif is_entered(path, copy):
                    folders.append(file)
                else:
                    yield path, False
                count += 1
            if count > MOST_FILES:
                raise InputError(f"{self.folder}: expected at most {MOST_FILES:,} other files; remove them")


def check_headers(
    headers: Mapping[str, Header],
    where: str,
    source: str,
    expected: Mapping[str, tuple[int, ...]],
    indices: Collection[str],
    ignores: Callable[[str], bool],
) -> None:
    """Folder.check, for tensors that are in `where` and that `source` describes."""
    for name, shape in expected.items():
        if name not in headers:
            raise InputError(f"{name}: expected {shape}, as {source} says; found no such tensor in {where}")
        if (found := headers[name].shape) != shape:
            raise InputError(f"{name}: expected {shape}, as {source} says; found {found}; correct one of the two")
        known, kind = (INDEX_NAMES, "indices") if name in indices else (SAFETENSORS_NAMES, "weights")
        if (dtype := headers[name].dtype) not in known:
            raise InputError(
                f"{name}: expected {kind} of dtype {', '.join(known)}, found {dtype} in "
                f"{headers[name].shard}; dequantize or convert it first"
            )
    for name, info in headers.items():
        if name not in expected and not ignores(name):
            raise InputError(
                f"{name}: expected no such tensor in the model that {source} describes, found {info.shape}; "
                f"correct {source} (a bias or norm switch?) or remove the tensor"
            )


def read_header(file: Path, expected: str = "a safetensors file", folder: Path | None = None) -> dict[str, Header]:
    """The tensors of a safetensors file; folder: as for check_file. Raises InputError if it is none, or not whole.

    safetensors checks the header; where each tensor starts, which it does not say, is then read from it.
    """
    try:
        size = check_file(file, expected, folder)
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if MOST_HEADER < length <= size:
                raise InputError(f"{file}: expected a header of at most {MOST_HEADER:,} bytes, found {length:,}")
            text = stream.read(length) if length <= size else b""
        _check_values(text, file)
        with safe_open(file, framework="np") as checked:
            names = set(checked.keys())
        fields = _parse(text)
    except (SafetensorError, OSError, _JSONError) as error:
        raise InputError(
            f"{file}: expected a whole safetensors file, found {error}; it may be truncated or damaged: copy or "
            f"download it again"
        ) from error
    return {
        name: Header(tuple(fields[name]["shape"]), fields[name]["dtype"], file.name, 8 + length + start)
        for name in names
        for start in fields[name]["data_offsets"][:1]
    }


def read_json_object(file: Path, most: int = MOST_CONFIG, folder: Path | None = None) -> dict[str, Any]:
    """A JSON file of at most `most` bytes that holds an object; folder: as for check_file. Raises InputError naming the
    file.
    """
    size = check_file(file, "a JSON file", folder)
    if size > most:
        raise InputError(f"{file}: expected a JSON file of at most {most:,} bytes, found {size:,}; correct it")
    try:
        with file.open("rb") as stream:
            text = stream.read(size)
        _check_values(text, file)
        value = _parse(text)
    except (OSError, _JSONError) as error:
        raise InputError(f"{file}: expected JSON, found {error}; correct it") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def check_file(file: Path, expected: str, folder: Path | None = None) -> int:
    """The size in bytes of a file that can be opened without waiting for anything.

    folder: the model folder that it belongs to, or None for one that the user has named. Of a model folder, a symlink
    is followed to a file in that folder, and from a snapshot in HuggingFace's cache to its blobs. Raises InputError for
    any other, and for anything but a regular file. expected: what it should be, in words.
    """
    try:
        status = file.stat()
    except FileNotFoundError:
        nothing = f"a symlink to {file.readlink()}, which does not exist" if file.is_symlink() else "no such file"
        raise InputError(f"{file}: expected {expected}, found {nothing}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: expected {expected}, found: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{file}: expected {expected}, found {kind(status)}; put a file in its place or remove it")
    if folder is not None:
        check_link(file, folder)
    return status.st_size


def kind(status: os.stat_result) -> str:
    """What kind of file it is, in words, if it is not a regular one."""
    return FILE_TYPES.get(stat.S_IFMT(status.st_mode), "something else")


def check_link(file: Path, folder: Path) -> None:
    """Raise InputError for a symlink that leads out of a model folder, but to the blobs of its cache."""
    if not file.is_symlink():
        return
    target, root = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    blobs = (place.parent.parent / "blobs" for place in (root, *root.parents) if _is_snapshot(place))
    if not target.is_relative_to(root) and target.parent not in blobs:
        raise InputError(
            f"{file}: expected a file in this folder, found a symlink to {target}; put a copy in its place or remove it"
        )


def check_links(folder: Path) -> None:
    """check_link for all that transformers opens in a model folder, which is at most one folder deep."""
    for file in sorted((*folder.glob("*"), *folder.glob("*/*"))):
        check_link(file, folder)


def _is_snapshot(folder: Path) -> bool:
    """Whether a folder is models--NAME/snapshots/REVISION, whose files are symlinks to models--NAME/blobs/HASH."""
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")


def _weight_map(index: Path, folder: Path) -> dict[str, str]:
    """Tensor name -> shard, from the index. Raises InputError for a bad index."""
    shards = read_json_object(index, MOST_INDEX, folder).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{index}: weight_map: expected tensor names and their files, found none")
    for shard in shards.values():
        if not (
            isinstance(shard, str)
            and shard.endswith(".safetensors")
            and shard.isprintable()
            and shard == PurePosixPath(shard).name == PureWindowsPath(shard).name
        ):
            raise InputError(f"{index}: weight_map: expected safetensors files in this folder, found {shard!r}")
    return shards


def _files(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: expected a folder that can be read, found: {error.strerror}") from error


class _JSONError(ValueError):
    """Text that is not JSON, or JSON that no model needs."""


def parse_json(text: bytes) -> Any:
    """JSON of at most MOST_VALUES values, as `_parse` takes it. Raises ValueError."""
    if (values := _values(text)) > MOST_VALUES:
        raise _JSONError(f"up to {values:,} values")
    return _parse(text)


def _values(text: bytes) -> int:
    """An upper bound of the values in JSON text, before parsing: a few bytes may hold very many."""
    return sum(map(text.count, (b",", b"[", b"{")))


def _check_values(text: bytes, file: Path) -> None:
    """Raise InputError for JSON with more values than any model needs."""
    if (values := _values(text)) > MOST_VALUES:
        raise InputError(f"{file}: expected at most {MOST_VALUES:,} JSON values, found up to {values:,}; correct it")


def _parse(text: bytes) -> Any:
    """Parse JSON without duplicate keys, long integers or deep nesting. Raises _JSONError."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_int=_integer)
    except RecursionError:
        raise _JSONError("lists or objects too deep within each other") from None
    except ValueError as error:
        raise _JSONError(str(error)) from error
    level = [value]
    for _ in range(MOST_NESTED):
        level = [
            inner
            for outer in level
            if isinstance(outer, (list, dict))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise _JSONError(f"more than {MOST_NESTED} lists or objects within each other")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _JSONError(f"{counts.most_common(1)[0][0]!r} more than once in an object")
    return values


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise _JSONError(f"an integer of {len(digits):,} digits")
    return int(digits)

"""Model folders that are not on a disk: anything that fsspec reads and writes (s3://, gs://, hf://, memory://, ...).

What describes a checkpoint is small, so it is fetched: config.json, the index, the other files, and of every shard the
header, in front of as much emptiness as it has data. That folder is opened like any other; tensors are then read where
they are, a range of bytes at a time.
"""

import hashlib
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from skipless.checkpoint.headers import (
    INDEX,
    MOST_CONFIG,
    MOST_FILES,
    MOST_HEADER,
    MOST_INDEX,
    ignores_nothing,
)
from skipless.checkpoint.manifest import JOB
from skipless.checkpoint.others import PICKLES
from skipless.checkpoint.reader import CheckpointReader, changed
from skipless.errors import InputError, StorageError

# Bytes written to, or read from, another place at a time.
BLOCK = 2**26
# What tells one version of an object from another, as the various stores call it.
VERSIONS = {"size", "ETag", "etag", "mtime", "last_modified", "LastModified", "updated", "created", "generation"}
VERSIONS |= {"blob_id"}
# Bytes of what is fetched whole.
BOUNDS = {"config.json": MOST_CONFIG, INDEX: MOST_INDEX}


def is_remote(place: object) -> bool:
    """Whether a place is a URL, not a path."""
    return "://" in str(place)


def open_place(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Raises InputError if fsspec has none of that kind."""
    try:
        system, path = fsspec.core.url_to_fs(url)
    except Exception as error:  # whatever the package for that kind of URL raises
        raise InputError(f"{url}: expected a URL that fsspec opens, found: {_line(error)}") from error
    return system, path.rstrip("/")


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Raise what a store raises, of whatever kind, as a StorageError that says what was asked for."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise StorageError(f"{what}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class RemoteReader(CheckpointReader):
    """A CheckpointReader of a folder at a URL; `folder` is a local one that holds all of it but the tensors."""

    def __init__(self, url: str, device: str = "cpu", ignores: Callable[[str], bool] = ignores_nothing):
        self.url = url
        self._system, self._root = open_place(url)
        self._local = tempfile.TemporaryDirectory(prefix="skipless-")
        with _asking(f"{url}: could not be read"):
            self._versions = self._fetch(Path(self._local.name))
        try:
            super().__init__(Path(self._local.name), device, ignores)
        except InputError as error:
            raise InputError(str(error).replace(self._local.name, url)) from error

    @property
    def place(self) -> str:
        return self.url

    def _fetch(self, folder: Path) -> dict[str, dict[str, str]]:
        """Everything but the tensors into a local folder; what the store says of each file."""
        versions: dict[str, dict[str, str]] = {}
        for path in self._system.find(self._root):
            name = path.removeprefix(f"{self._root}/")
            local, info = folder / name, self._info(path)
            size = int(info["size"] or 0)
            if not local.resolve().is_relative_to(folder.resolve()) or len(versions) >= MOST_FILES:
                raise InputError(f"{self.url}: expected at most {MOST_FILES:,} files in this folder, found {name!r}")
            if size > BOUNDS.get(name, size):
                raise InputError(f"{self.url}/{name}: expected at most {BOUNDS[name]:,} bytes, found {size:,}")
            local.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".safetensors"):
                self._fetch_header(path, size, local)
            elif any(local.match(pattern) for pattern in PICKLES):
                local.touch()  # never opened, here or there
            else:
                self._system.get_file(path, str(local))
            versions[name] = self._version(info)
        return versions

    def _fetch_header(self, path: str, size: int, local: Path) -> None:
        start = self._system.cat_file(path, 0, 8)
        length = int.from_bytes(start, "little")
        header = self._system.cat_file(path, 8, 8 + length) if length <= min(size, MOST_HEADER) else b""
        with local.open("wb") as file:
            file.write(start + header)
            file.truncate(size)

    def _info(self, path: str) -> Mapping[str, Any]:
        """What the store says of a file now."""
        self._system.invalidate_cache()
        return self._system.info(path)

    @staticmethod
    def _version(info: Mapping[str, Any]) -> dict[str, str]:
        return {name: str(value) for name, value in info.items() if name in VERSIONS}

    def fingerprint(self, copy: Collection[str] = ()) -> dict[str, Any]:
        return self._versions

    def check_unchanged(self) -> None:
        for name in ("config.json", *self.shards):
            self._check_version(name)

    def _check_version(self, name: str) -> None:
        with _asking(f"{self.url}/{name}: could not be read"):
            now = self._version(self._info(f"{self._root}/{name}"))
        if now != self._versions[name]:
            raise changed(f"{self.url}/{name}")

    def sample(self, most: int) -> int:
        """Read the beginning of a shard where it is: at most BLOCK bytes."""
        with _asking(f"{self.url}: could not be read"):
            return len(self._system.cat_file(f"{self._root}/{self.shards[0]}", 0, min(most, BLOCK)))

    def _read(self, name: str, start: int, into: memoryview) -> int:
        info, start = self.tensors[name], self.headers[name].start + start
        self._check_version(info.shard)
        with _asking(f"{name}: could not be read from {self.url}"):
            for done in range(0, len(into), BLOCK):
                stop = min(done + BLOCK, len(into))
                data = self._system.cat_file(f"{self._root}/{info.shard}", start + done, start + stop)
                if len(data) != stop - done:
                    raise StorageError(
                        f"{name}: expected {stop - done:,} bytes of {self.url}/{info.shard}, found {len(data):,}: the "
                        f"connection was cut, or the server reads no ranges"
                    )
                into[done:stop] = data
        return len(into)

    def warm(self, names: Iterable[str], stop: Callable[[], bool] = lambda: False) -> None:
        """Nothing: what is far away is in no cache of this system."""


def open_reader(place: str | Path, device: str = "cpu") -> CheckpointReader:
    """A skipless model folder at a path or URL."""
    return RemoteReader(str(place), device) if is_remote(place) else CheckpointReader(Path(place), device)


class RemotePlace:
    """A folder at a URL that is to be made: written here first, then sent there, config.json last, and read again.

    A store has no way to give many objects their name at once; the folder is whole when it holds config.json.
    """

    def __init__(self, url: str):
        self.url = url
        self._system, self._root = open_place(url)

    def __str__(self) -> str:
        return self.url

    @property
    def unfinished(self) -> Path:
        """Where it is in the making: here."""
        number = hashlib.sha256(self.url.encode()).hexdigest()[:8]
        return Path.cwd() / f".{self._root.rpartition('/')[2]}-{number}.unfinished"

    @property
    def disk(self) -> Path:
        """A folder on the disk that is written."""
        return Path.cwd()

    def check(self) -> None:
        """Raise InputError if there is something already that no earlier call has begun to send, StorageError if that
        cannot be seen.
        """
        begun = (self.unfinished / JOB).exists()
        with _asking(f"{self.url}: could not be read"):
            self._system.invalidate_cache()
            exists = self._system.exists(f"{self._root}/config.json" if begun else self._root)
        if exists:
            raise InputError(f"{self.url}: expected a new folder, found one that exists; choose another or remove it")

    def publish(self, folder: Path) -> None:
        """Send a folder, and read it again. Raises StorageError if other bytes come back."""
        files = (path for path in folder.rglob("*") if path.is_file())
        with _asking(f"{self.url}: could not be written"):
            for path in sorted(files, key=lambda path: path.name == "config.json"):
                remote = f"{self._root}/{path.relative_to(folder).as_posix()}"
                self._system.makedirs(remote.rpartition("/")[0], exist_ok=True)
                self._system.put_file(str(path), remote)
                with path.open("rb") as ours, self._system.open(remote, "rb", block_size=BLOCK) as theirs:
                    if len({hashlib.file_digest(file, "sha256").digest() for file in (ours, theirs)}) > 1:
                        raise StorageError(f"{self.url}: {path.name}: expected what was sent, found other bytes there")

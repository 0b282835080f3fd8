"""Model folders that are not on a disk: anything that fsspec reads and writes (s3://, gs://, hf://, memory://, ...).

What describes a checkpoint is small, so it is fetched: config.json, the index, and of every shard the header, in front
of as much emptiness as it has data; of other files, as much emptiness alone. That folder is opened like any other;
tensors are then read where they are, a range of bytes at a time, and other files when they are copied.
"""

import hashlib
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from skipless.checkpoint.gguf_folder import GGUFFolder
from skipless.checkpoint.headers import (
    INDEX,
    MOST_CONFIG,
    MOST_HEADER,
    MOST_INDEX,
)
from skipless.checkpoint.manifest import JOB
from skipless.checkpoint.others import PICKLES
from skipless.checkpoint.reader import CheckpointReader, changed
from skipless.checkpoint.store import RANGE, Store, local_path, redacted
from skipless.errors import InputError, StorageError
from skipless.log import logger

# Ranges of shards that are kept, so that tensors, or rows of them, that lie side by side are one request.
KEPT = 4
# Bytes that are read to see how fast that is.
SAMPLE = 2**26
# What tells one version of an object from another, as the various stores call it.
SIZE = "size"
VERSIONS = {
    SIZE, "ETag", "etag", "VersionId", "version_id", "versionId", "generation", "blob_id", "sha", "rev",
    "ChecksumSHA256", "Content-MD5", "Digest", "md5Hash", "crc32c", "content_hash",
    "mtime", "modified", "created", "updated", "modify", "last_modified", "LastModified", "Last-Modified",
    "modifiedTime", "modificationTime", "last_write_time",
}  # fmt: skip
# Bytes of what is fetched whole: what describes the weights, and other files, one and all together. A tokenizer has up
# to 40 MB, and the images of a card a few: what is larger is weights in another format, or no part of a model.
BOUNDS = {"config.json": MOST_CONFIG, INDEX: MOST_INDEX}
MOST_OTHER, MOST_OTHERS = 2**28, 2**30


def located(place: object) -> str | Path:
    """A place as a path; as a URL if it is one, but for this machine's own files."""
    text = str(place)
    return (local_path(text) or text) if "://" in text else Path(text)


def shown(place: object) -> str:
    """A place for messages: a URL without user, password and query."""
    return redacted(str(place)) if "://" in str(place) else str(place)


class RemoteReader(CheckpointReader):
    """A CheckpointReader of a folder at a URL; `folder` is a local one that holds what describes it."""

    def __init__(self, url: str, device: str = "cpu"):
        self._url, self._store = url, Store(url)
        self._local = tempfile.TemporaryDirectory(prefix="skipless-")
        self._fetched: set[Path] = set()
        self._range = lru_cache(KEPT)(self._fetch_range)
        try:
            self._versions = self._describe(Path(self._local.name))
            super().__init__(Path(self._local.name), device)
        except InputError as error:
            raise type(error)(str(error).replace(self._local.name, self.name)) from None
        except OSError as error:
            raise StorageError(f"{self.name}: could not be put into {self._local.name}: {error.strerror}") from error
        if unmarked := [name for name in self._read_files if self._versions[name].keys() <= {SIZE}]:
            logger.warning(
                "%s/%s: its store tells a size, and no version, checksum or time: that the source changes while it is "
                "read, or between two runs, may not be noticed",
                self.name,
                unmarked[0],
            )

    @property
    def place(self) -> str:
        return self._url

    @property
    def name(self) -> str:
        return self._store.name

    @property
    def _read_files(self) -> list[str]:
        """The names of the config, the index and the shards."""
        return ["config.json", *([INDEX] if INDEX in self._versions else []), *self.shards]

    def _describe(self, folder: Path) -> dict[str, dict[str, str]]:
        """What describes the weights, and how large the other files are, into a local folder; the files' versions."""
        versions: dict[str, dict[str, str]] = {}
        for name, listed in self._store.files().items():
            opened = name in BOUNDS or ("/" not in name and name.endswith(".safetensors"))
            info = self._store.info(name) if opened or listed.get(SIZE) is None else listed
            size, local = self._store.size(name, info), folder / name
            if size > BOUNDS.get(name, size):
                raise InputError(f"{self.name}/{name}: expected at most {BOUNDS[name]:,} bytes, found {size:,}")
            local.parent.mkdir(parents=True, exist_ok=True)
            with local.open("wb") as file:
                if name in BOUNDS:
                    file.write(self._store.read(name, 0, size))
                elif opened:
                    file.write(self._header(name, size))
                if not any(local.match(pattern) for pattern in PICKLES):  # which are never opened, here or there
                    file.truncate(size)
            versions[name] = _version(info)
        return versions

    def _header(self, shard: str, size: int) -> bytes:
        start = self._store.read(shard, 0, min(8, size))
        length = int.from_bytes(start, "little")
        return start + (self._store.read(shard, 8, 8 + length) if length <= min(size - 8, MOST_HEADER) else b"")

    def other_files(self, copy: Collection[str] = ()) -> list[Path]:
        """As a local folder's. Raises InputError, too, for files that are too large to be fetched."""
        others, total = super().other_files(copy), 0
        for file in others:
            total += (size := (self.folder / file).stat().st_size)
            if size > MOST_OTHER or total > MOST_OTHERS:
                raise InputError(
                    f"{self.name}/{file}: expected files beside the weights of at most {MOST_OTHER:,} bytes, and "
                    f"{MOST_OTHERS:,} in all, found one of {size:,}, and {total:,} so far; remove it, or download the "
                    f"folder and give its path"
                )
        return others

    def fetch(self, file: Path) -> Path:
        local = self.folder / file
        if file not in self._fetched and file.as_posix() not in BOUNDS:
            size = local.stat().st_size
            with local.open("r+b") as stream:
                for start in range(0, size, RANGE):
                    stream.write(self._store.read(file.as_posix(), start, min(start + RANGE, size)))
            self._fetched.add(file)
        return local

    def fingerprint(self, copy: Collection[str] = ()) -> dict[str, Any]:
        return self._versions

    def shared_fingerprint(self) -> dict[str, Any]:
        return self._versions

    def check_unchanged(self) -> None:
        for name in self._read_files:
            self._check_version(name)

    def _check_version(self, name: str) -> None:
        if _version(self._store.info(name)) != self._versions[name]:
            raise changed(f"{self.name}/{name}")

    def sample(self, most: int) -> int:
        """Read the beginning of a shard where it is: at most SAMPLE bytes."""
        shard = self.shards[0]
        most = min(most, SAMPLE, (self.folder / shard).stat().st_size)
        return sum(len(self._store.read(shard, at, min(at + RANGE, most))) for at in range(0, most, RANGE))

    def _read(self, name: str, start: int, into: memoryview) -> int:
        shard, at, done = self.tensors[name].shard, self.headers[name].start + start, 0
        while done < len(into):
            number, offset = divmod(at + done, RANGE)
            try:
                part = self._range(shard, number)[offset : offset + len(into) - done]
            except StorageError as error:
                raise StorageError(f"{name}: {error}") from None
            into[done : done + len(part)] = part
            done += len(part)
        return done

    def _fetch_range(self, shard: str, number: int) -> memoryview:
        """One of the ranges that a shard consists of, of the version whose header was read."""
        start = number * RANGE
        data = self._store.read(shard, start, min(start + RANGE, (self.folder / shard).stat().st_size))
        self._check_version(shard)
        return memoryview(data)

    def warm(self, names: Iterable[str], stop: Callable[[], bool] = lambda: False) -> None:
        """Do nothing: this system caches no remote file."""


def _version(info: Mapping[str, Any]) -> dict[str, str]:
    """What of that which a store says of a file changes with what is in it."""
    return {name: str(value) for name, value in info.items() if name in VERSIONS and value is not None}


def open_reader(place: str | Path, device: str = "cpu") -> CheckpointReader:
    """Open a model folder at a path or URL, or a GGUF file as the one that it was made of."""
    location = located(place)
    if isinstance(location, Path) and location.suffix == ".gguf":
        return GGUFFolder(location, device)
    return RemoteReader(location, device) if isinstance(location, str) else CheckpointReader(location, device)


class RemoteDestination:
    """A folder at a URL that is to be made: written here first, then sent there, config.json last, and read again.

    A store has no way to give many objects their name at once; the folder is whole when it holds config.json.
    """

    def __init__(self, url: str):
        self._store = Store(url)

    def __str__(self) -> str:
        return self._store.name

    @property
    def unfinished(self) -> Path:
        """The local folder in which it is made."""
        name = self._store.name.rstrip("/")
        number = hashlib.sha256(name.encode()).hexdigest()[:8]
        return Path.cwd() / f".{name.rpartition('/')[2]}-{number}.unfinished"

    @property
    def disk(self) -> Path:
        """A folder on the disk that is written to."""
        return Path.cwd()

    def check(self) -> None:
        """Raise InputError if there is something already that no earlier call has begun to send, StorageError if that
        cannot be seen.
        """
        if self._store.exists("config.json" if (self.unfinished / JOB).exists() else ""):
            raise InputError(f"{self}: expected a new folder, found one that exists; choose another or remove it")

    def publish(self, folder: Path) -> None:
        """Upload a folder and read it back. Raises StorageError if other bytes come back."""
        files = (path for path in folder.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path.name == "config.json"):
            name = path.relative_to(folder).as_posix()
            self._store.send(path, name)
            if not self._is_there(path, name):
                raise StorageError(f"{self}: {name}: expected what was sent, found other bytes there")

    def _is_there(self, file: Path, name: str) -> bool:
        """Whether the remote file of that name holds the same bytes."""
        size = file.stat().st_size
        if self._store.size(name, self._store.info(name)) != size:
            return False
        with file.open("rb") as ours:
            return all(
                ours.read(RANGE) == self._store.read(name, start, min(start + RANGE, size))
                for start in range(0, size, RANGE)
            )

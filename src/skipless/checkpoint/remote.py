"""Model folders that are not on a disk: anything that fsspec reads and writes (s3://, gs://, hf://, memory://, ...).

What describes a checkpoint is small, so it is fetched: config.json, the index, the other files, and of every shard the
header, in front of as much emptiness as it has data. That folder is opened like any other; tensors are then read where
they are, a range of bytes at a time.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import fsspec

from skipless.checkpoint.headers import MOST_HEADER, ignores_nothing
from skipless.checkpoint.reader import CheckpointReader, changed
from skipless.errors import InputError, StorageError

# Bytes written to, or read from, another place at a time.
BLOCK = 2**26
# What tells one version of an object from another, as the various stores call it.
VERSIONS = ("size", "ETag", "etag", "mtime", "last_modified", "LastModified", "updated", "created")


def is_remote(place: object) -> bool:
    """Whether a place is a URL, not a path."""
    return "://" in str(place)


def open_place(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Raises InputError if fsspec has none of that kind."""
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise InputError(f"{url}: expected a URL that fsspec opens, found: {error}") from error
    return system, path.rstrip("/")


class RemoteReader(CheckpointReader):
    """A CheckpointReader of a folder at a URL; `folder` is a local one that holds all of it but the tensors."""

    def __init__(self, url: str, device: str = "cpu", ignores: Callable[[str], bool] = ignores_nothing):
        self.url = url
        self._system, self._root = open_place(url)
        self._local = tempfile.TemporaryDirectory(prefix="skipless-")
        self._versions = self._fetch(Path(self._local.name))
        super().__init__(Path(self._local.name), device, ignores)

    @property
    def place(self) -> str:
        return self.url

    def _fetch(self, folder: Path) -> dict[str, dict[str, str]]:
        """Everything but the tensors into a local folder; what the store says of each file."""
        versions = {}
        try:
            for path in self._system.find(self._root):
                info = self._system.info(path)
                name = path.removeprefix(f"{self._root}/")
                local = folder / name
                if not local.resolve().is_relative_to(folder.resolve()):
                    raise InputError(f"{self.url}: expected files in this folder, found {name!r}")
                local.parent.mkdir(parents=True, exist_ok=True)
                if name.endswith(".safetensors"):
                    self._fetch_header(path, int(info["size"]), local)
                else:
                    self._system.get_file(path, str(local))
                versions[name] = self._version(info)
        except OSError as error:
            raise StorageError(f"{self.url}: could not be read: {error.strerror or error}") from error
        return versions

    def _fetch_header(self, path: str, size: int, local: Path) -> None:
        start = self._system.cat_file(path, 0, 8)
        length = int.from_bytes(start, "little")
        header = self._system.cat_file(path, 8, 8 + length) if length <= min(size, MOST_HEADER) else b""
        with local.open("wb") as file:
            file.write(start + header)
            file.truncate(size)

    @staticmethod
    def _version(info: Mapping[str, Any]) -> dict[str, str]:
        return {name: str(info[name]) for name in VERSIONS if name in info}

    def fingerprint(self) -> dict[str, Any]:
        return {name: self._versions[name] for name in ("config.json", *self.shards)}

    def check_unchanged(self) -> None:
        for name in ("config.json", *self.shards):
            self._check_version(name)

    def _check_version(self, name: str) -> None:
        try:
            now = self._version(self._system.info(f"{self._root}/{name}"))
        except OSError as error:
            raise StorageError(f"{self.url}/{name}: could not be read: {error.strerror or error}") from error
        if any(now[key] != value for key, value in self._versions[name].items() if key in now):
            raise changed(f"{self.url}/{name}")

    def _read(self, name: str, into: memoryview) -> int:
        info, start = self.tensors[name], self.headers[name].start
        self._check_version(info.shard)
        path, done = f"{self._root}/{info.shard}", 0
        try:
            while done < info.bytes:
                stop = min(done + BLOCK, info.bytes)
                data = self._system.cat_file(path, start + done, start + stop)
                into[done : done + len(data)] = data
                done += len(data)
                if len(data) < BLOCK:
                    break
        except OSError as error:
            raise StorageError(f"{name}: could not be read from {self.url}: {error.strerror or error}") from error
        return done

    def warm(self, names: Iterable[str]) -> None:
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
        return Path.cwd() / f".{self._root.rpartition('/')[2]}.unfinished"

    @property
    def disk(self) -> Path:
        """A folder on the disk that is written."""
        return Path.cwd()

    def check(self) -> None:
        """Raise InputError if there is something already that no earlier call has begun to send, StorageError if that
        cannot be seen.
        """
        whole = f"{self._root}/config.json" if self.unfinished.exists() else self._root
        try:
            exists = self._system.exists(whole)
        except OSError as error:
            raise StorageError(f"{self.url}: could not be read: {error.strerror or error}") from error
        if exists:
            raise InputError(f"{self.url}: expected a new folder, found one that exists; choose another or remove it")

    def publish(self, folder: Path) -> None:
        """Send a folder, and read it again. Raises StorageError if other bytes come back."""
        files = sorted(
            (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name == "config.json"
        )
        try:
            for path in files:
                remote = f"{self._root}/{path.relative_to(folder).as_posix()}"
                self._system.makedirs(remote.rpartition("/")[0], exist_ok=True)
                self._system.put_file(str(path), remote)
                with path.open("rb") as ours, self._system.open(remote, "rb", block_size=BLOCK) as theirs:
                    if hashlib.file_digest(ours, "sha256").digest() != _digest(theirs):
                        raise StorageError(f"{self.url}: {path.name}: expected what was sent, found other bytes there")
        except OSError as error:
            raise StorageError(f"{self.url}: could not be written: {error.strerror or error}") from error


def _digest(file: Any) -> bytes:
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.digest()

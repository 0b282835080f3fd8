"""The file layer: every system call that makes, reads, changes or removes a file of an unfinished folder.

What is written is made new, in the place of what had its name: a link that somebody put there is not followed. What is
gone on with, or believed, is a regular file without another name. Errors name the file.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from skipless.checkpoint.headers import check_file, kind
from skipless.errors import InputError

# Bytes read at a time.
BLOCK = 2**23
# A FIFO is not waited for, and (on Windows) bytes are bytes.
FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
NO_LINK = getattr(os, "O_NOFOLLOW", 0)


class File:
    """An open file, without a buffer."""

    def __init__(self, path: Path, flags: int):
        self.path, self.descriptor = path, os.open(path, flags | FLAGS, 0o666)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            with self._naming():
                os.close(self.descriptor)
        except OSError:
            if error is None:  # else that is to be heard of
                raise

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Name the file in errors of a descriptor, which do not."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise

    def read(self, size: int) -> bytes:
        """Read `size` bytes; fewer at the end."""
        with self._naming():
            data = os.read(self.descriptor, size)
            while data and len(data) < size and (more := os.read(self.descriptor, size - len(data))):
                data += more
        return data

    def blocks(self, size: int | None = None) -> Iterator[bytes]:
        """Read `size` bytes (None: all that follow), BLOCK at a time; fewer at the end."""
        while size != 0 and (block := self.read(BLOCK if size is None else min(size, BLOCK))):
            size = None if size is None else size - len(block)
            yield block

    def write(self, data: bytes | memoryview) -> None:
        """All of it."""
        left = memoryview(data)
        with self._naming():
            while left:
                left = left[os.write(self.descriptor, left) :]

    def seek(self, place: int) -> None:
        """Move to this byte."""
        os.lseek(self.descriptor, place, os.SEEK_SET)

    def resize(self, size: int) -> None:
        """Truncate the file, or extend it with zeros."""
        with self._naming():
            os.ftruncate(self.descriptor, size)

    def sync(self) -> None:
        """Sync to disk."""
        with self._naming():
            os.fsync(self.descriptor)


def opened(path: Path) -> File:
    """Open a regular file, or a symlink to one. Raises InputError for anything else (a FIFO would block)."""
    check_file(path, "a file")
    return File(path, os.O_RDONLY)


def create(path: Path) -> File:
    """Create a new file. Whatever had its name is removed first."""
    remove(path)
    return File(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK)


def reopen(path: Path, writing: bool = False) -> File:
    """Open a file that we made. Raises FileNotFoundError if there is none, InputError for what we cannot have made."""
    check_own(path)
    return File(path, (os.O_RDWR if writing else os.O_RDONLY) | NO_LINK)


def read(path: Path, most: int) -> bytes:
    """The bytes of a file that we made. Raises as `reopen` does, and InputError for more than `most` bytes."""
    with reopen(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise InputError(f"{path}: expected at most {most:,} bytes, found more; remove it")
    return data


def write(path: Path, parts: Iterable[bytes]) -> None:
    """Write these bytes to a new file. Whatever had its name is removed first."""
    with create(path) as file:
        for part in parts:
            file.write(part)


def replace(path: Path, parts: Iterable[bytes]) -> None:
    """Replace a file by these bytes atomically, synced to disk; if that fails, nothing is left of them."""
    try:
        with create(beside(path)) as file:
            for part in parts:
                file.write(part)
            file.sync()
        os.replace(beside(path), path)
    except BaseException:
        remove(beside(path))
        raise


def beside(path: Path) -> Path:
    """The temporary name of a file that will replace another."""
    return path.with_name(f".{path.name}.new")


def copy(path: Path, to: Path, put: Callable[[Path, Iterable[bytes]], None] = write) -> None:
    """Copy a file to a new file."""
    with opened(path) as file:
        put(to, file.blocks())


def remove(path: Path) -> None:
    """Remove a file, if it exists."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def rename(path: Path, to: Path) -> None:
    """Rename a file or folder."""
    os.rename(path, to)


def make_folder(path: Path) -> None:
    """Make a folder, if it does not exist. Raises InputError if something else has its name."""
    try:
        os.mkdir(path)
    except FileExistsError:
        check_folder(path)


def remove_folder(path: Path) -> None:
    """Remove an empty folder, if it exists."""
    with suppress(FileNotFoundError):
        os.rmdir(path)


def names(folder: Path) -> list[str]:
    """The names in a folder."""
    return sorted(os.listdir(folder))


def sync(path: Path) -> None:
    """Sync a file, or a folder's list of files, to disk. Systems that cannot sync folders skip them."""
    if os.name == "nt":
        return
    with File(path, os.O_RDONLY) as file:
        file.sync()


def check_own(path: Path) -> None:
    """Raise InputError for anything but a regular file without another name; FileNotFoundError if there is nothing."""
    status = os.lstat(path)
    _refuse_link(path, status)
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: expected a file that a fuse has written, found {kind(status)}; remove it")
    if status.st_nlink > 1:
        raise InputError(
            f"{path}: expected a file that a fuse has written, found one that has {status.st_nlink} names (hard "
            f"links); remove this one"
        )


def check_folder(path: Path) -> None:
    """Raise InputError for anything but a folder; FileNotFoundError if there is nothing."""
    status = os.lstat(path)
    _refuse_link(path, status)
    if not stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path}: expected a folder, found {kind(status)}; remove it")


def _refuse_link(path: Path, status: os.stat_result) -> None:
    """Refuse a symlink: it would lead what is written elsewhere."""
    if stat.S_ISLNK(status.st_mode):
        raise InputError(f"{path}: expected no symbolic link there, found one to {os.readlink(path)}; remove it")

"""A folder in the making: DST appears whole or not at all, one process at a time works on it, and none starts over.

DST's parent / .DST.unfinished / lock            held while a process works on it
                               / job.json        for what job it was begun (manifest.py)
                               / journal.jsonl   what is on disk already
                               / model           what will be DST
"""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from skipless.checkpoint.manifest import JOB, JOURNAL, Manifest, sync
from skipless.errors import BugError, DisagreementError, InputError, StorageError

KEPT = "what is done is kept: go on with --resume"


class Place(Protocol):
    """Where a folder is to be."""

    @property
    def unfinished(self) -> Path:
        """Where it is in the making, on a disk."""

    @property
    def disk(self) -> Path:
        """A folder on that disk that is there."""

    def check(self) -> None:
        """Raise InputError where no new folder can be made."""

    def publish(self, folder: Path) -> None:
        """Give what is in `folder` its name."""


class LocalPlace:
    """A path at which there is nothing yet."""

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def unfinished(self) -> Path:
        return self.path.parent / f".{self.path.name}.unfinished"

    @property
    def disk(self) -> Path:
        return self.path.parent

    def check(self) -> None:
        parent = self.path.parent
        for path in (self.path, self.unfinished):
            try:
                path.lstat()
            except FileNotFoundError:
                pass
            except (OSError, ValueError) as error:
                found = getattr(error, "strerror", None) or error
                raise InputError(f"{path}: expected a name that a folder can have, found: {found}") from error
        if (self.unfinished / JOB).exists() and not (self.unfinished / "model").exists() and self.path.exists():
            raise InputError(f"{self}: expected a new folder, found it complete already; remove {self.unfinished}")
        if self.path.exists() or self.path.is_symlink():
            raise InputError(f"{self}: expected a new folder, found one that exists; choose another or remove it")
        if not parent.is_dir():
            raise InputError(f"{parent}: expected an existing folder to write into, found none; create it")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"{parent}: expected a folder that can be written, found one that cannot; choose another")

    def publish(self, folder: Path) -> None:
        for path in (*folder.rglob("*"), folder):
            sync(path)
        folder.rename(self.path)
        with suppress(OSError):  # a parent that may be written but not read
            sync(self.path.parent)


@dataclass(frozen=True)
class Staging:
    """The folder `model` that will be DST, and the manifest beside it."""

    folder: Path
    manifest: Manifest


@contextmanager
def staged(place: Place, job: Mapping[str, Any], resume: bool) -> Iterator[Staging]:
    """Where to write what will be at `place`; it gets its name, on disk, when the block ends.

    When the block fails because of its input (InputError), nothing that it has begun is left behind; because of a
    mistake of ours (BugError), or of a worker (DisagreementError), nothing at all. When something else comes between -
    the disk is full, the process is stopped - what is done stays, and with `resume` and the same job the next call
    finds it. Raises InputError when the place is taken or cannot be made, when another process is at it, when an
    unfinished one is there and `resume` is false, or was for another job; StorageError when the disk fails.
    """
    place.check()
    folder = place.unfinished
    with _locked(place):
        place.check()  # another process may have finished meanwhile
        manifest = Manifest.load(folder)
        if manifest is not None:
            if not resume:
                raise InputError(
                    f"{place}: expected nothing begun, found an unfinished fuse in {folder}; go on with --resume, or "
                    f"remove it"
                )
            manifest.check(job)
        before = bool(manifest and manifest.done)
        try:
            if manifest is None:  # what an earlier call could not remove
                shutil.rmtree(folder / "model", ignore_errors=True)
                (folder / JOURNAL).unlink(missing_ok=True)
                manifest = Manifest.begin(folder, job)
            (folder / "model").mkdir(exist_ok=True)
            yield Staging(folder / "model", manifest)
            place.publish(folder / "model")
            shutil.rmtree(folder, ignore_errors=True)
        except BaseException as error:
            fault = isinstance(error, InputError) and not isinstance(error, StorageError)
            kept = manifest is not None and bool(manifest.done) and (before or not fault)
            kept = kept and not isinstance(error, BugError | DisagreementError)
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise _storage_error(place, error, kept) from error
            if isinstance(error, StorageError) and kept:
                raise StorageError(f"{error}; {KEPT}") from error
            raise


def _refuse_links(folder: Path) -> None:
    """What is written must not end up elsewhere."""
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink():
            raise InputError(
                f"{path}: expected no symbolic link there, found one to {path.readlink()}; remove {folder}"
            )


@contextmanager
def _locked(place: Place) -> Iterator[None]:
    """The folder in the making, made if it is not there, with no other process at it."""
    folder = place.unfinished
    _refuse_links(folder)
    lock = FileLock(folder / "lock", timeout=0)
    try:
        folder.mkdir(exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{place}: expected no other process at it, found one that is writing {folder}; wait for it, or choose "
            f"another folder"
        ) from None
    except OSError as error:
        raise InputError(f"{place.disk}: expected a folder that can be written, found: {error.strerror}") from error
    try:
        _refuse_links(folder)
        yield
    finally:
        lock.release()


def _storage_error(place: Place, error: OSError, kept: bool) -> StorageError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # of copies, the source is named
    ours = full or error.filename is None or Path(error.filename).is_relative_to(place.unfinished)
    where = f"{place}: could not be written" if ours else f"{error.filename}: could not be read"
    state = KEPT if kept else "nothing was left behind"
    return StorageError(f"{where}: {error.strerror or error}; {state}")

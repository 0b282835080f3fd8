"""A folder in the making: DST appears whole or not at all, one process at a time works on it, and none starts over.

DST's parent / .DST.unfinished / lock            held while a process works on it
                               / job.json        for what job it was begun (manifest.py)
                               / journal.jsonl   what is on disk already
                               / model           what will be DST

Where a job.json of ours is, the rest by these names is ours, too. Nothing else there is written, removed or published.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from skipless.checkpoint import files
from skipless.checkpoint.manifest import JOB, JOURNAL, Manifest, read_job
from skipless.errors import BugError, DisagreementError, InputError, StorageError
from skipless.log import logger

LOCK, MODEL = "lock", "model"
KEPT = "what is done is kept: go on with --resume"


class Destination(Protocol):
    """Where a new folder will be."""

    @property
    def unfinished(self) -> Path:
        """The local folder in which it is made."""

    @property
    def disk(self) -> Path:
        """An existing folder on the same disk."""

    def check(self) -> None:
        """Raise InputError if no new folder can be made here."""

    def publish(self, folder: Path) -> None:
        """Give the finished folder its name."""


class LocalDestination:
    """A local path that does not exist yet."""

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
                reason = getattr(error, "strerror", None) or error
                raise InputError(f"{path}: expected a name that a folder can have, found: {reason}") from error
        if (self.unfinished / JOB).exists() and not (self.unfinished / MODEL).exists() and self.path.exists():
            raise InputError(f"{self}: expected a new folder, found it complete already; remove {self.unfinished}")
        if self.path.exists() or self.path.is_symlink():
            raise InputError(f"{self}: expected a new folder, found one that exists; choose another or remove it")
        if not parent.is_dir():
            raise InputError(f"{parent}: expected an existing folder to write into, found none; create it")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"{parent}: expected a folder that can be written, found one that cannot; choose another")

    def publish(self, folder: Path) -> None:
        for path in (*folder.rglob("*"), folder):
            files.sync(path)
        files.rename(folder, self.path)
        with suppress(OSError):  # a parent that may be written but not read
            files.sync(self.path.parent)


@dataclass(frozen=True)
class Staging:
    """The folder `model` that will be DST, and the manifest beside it."""

    folder: Path
    manifest: Manifest


@contextmanager
def staged(
    destination: Destination, job: Mapping[str, Any], written: Collection[Path], resume: bool
) -> Iterator[Staging]:
    """Where to write what will be at `destination`; it gets its name, on disk, when the block ends.

    written: the files that the block writes, relative to the folder; another one there is neither published nor
    removed. When the block fails because of its input (InputError), nothing that it has begun is left behind; because
    of a mistake of ours (BugError), or of a worker (DisagreementError), nothing at all. When something else comes
    between - the disk is full, the process is stopped - what is done stays, and with `resume` and the same job the next
    call finds it. Raises InputError when the destination exists or cannot be made, when another process is at it, when
    an unfinished one is there and `resume` is false, or was for another job, or is not ours; StorageError when the disk
    fails.
    """
    destination.check()
    folder = destination.unfinished
    with _locked(destination):
        destination.check()  # another process may have finished meanwhile
        manifest = _begun(destination, job, written, resume)
        before = bool(manifest and manifest.done)
        try:
            manifest = manifest or Manifest.begin(folder, job)
            files.make_folder(folder / MODEL)
            yield Staging(folder / MODEL, manifest)
            _check_whole(folder / MODEL, written)
            destination.publish(folder / MODEL)
        except BaseException as error:
            fault = isinstance(error, InputError) and not isinstance(error, StorageError)
            kept = manifest is not None and bool(manifest.done) and (before or not fault)
            kept = kept and not isinstance(error, BugError | DisagreementError)
            if not kept:
                _discard(folder, written)
            if isinstance(error, OSError):
                raise _storage_error(destination, error, kept) from error
            if isinstance(error, StorageError) and kept:
                raise StorageError(f"{error}; {KEPT}") from error
            raise
        _discard(folder, written)
    if os.path.lexists(folder):
        logger.warning("%s: could not be removed, or holds files of others; remove it", folder)


@contextmanager
def beside(destination: LocalDestination) -> Iterator[Path]:
    """A folder beside `destination`, gone when the block ends; those of killed processes are removed first."""
    parent, prefix = destination.path.parent, f".{destination.path.name}.export-"
    for left in parent.iterdir():
        lock = left / LOCK
        if left.name.startswith(prefix) and not left.is_symlink() and lock.is_file() and not lock.is_symlink():
            with suppress(Timeout, OSError), FileLock(lock, timeout=0):
                shutil.rmtree(left)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as folder,
        FileLock(Path(folder) / LOCK),
    ):
        yield Path(folder)


def _begun(
    destination: Destination, job: Mapping[str, Any], written: Collection[Path], resume: bool
) -> Manifest | None:
    """The unfinished work on this job that is there, or None. Raises InputError for anything else."""
    folder = destination.unfinished
    try:
        manifest = Manifest.load(folder)
        if manifest is None:
            return None
        if not resume:
            raise InputError(
                f"{destination}: expected nothing begun, found an unfinished fuse in {folder}; go on with --resume, or "
                f"remove it"
            )
        manifest.check(job)
        _check_model(folder / MODEL, written)
    except OSError as error:
        raise _storage_error(destination, error, kept=True) from error
    return manifest


def _check_folder(folder: Path) -> None:
    """Raise InputError for a folder that no fuse has made. Nothing in it is touched."""
    ours = {LOCK, JOB, JOURNAL, files.beside(Path(JOB)).name}
    with suppress(FileNotFoundError):
        files.check_folder(folder)
        names = files.names(folder)
        for name in ours.intersection(names):
            files.check_own(folder / name)
        if read_job(folder) is None and (others := set(names) - (ours - {JOURNAL})):
            raise InputError(
                f"{folder}: expected an unfinished fuse, with its {JOB}, found none, but {min(others)!r}; move it "
                f"elsewhere, or choose another name for the new folder"
            )


def _check_model(model: Path, written: Iterable[Path]) -> set[Path]:
    """The files that the job has written there. Raises InputError for others, and for links."""
    written = set(written)
    folders = {folder for file in written for folder in file.parents}
    done, left = set[Path](), [Path()]
    with suppress(FileNotFoundError):
        files.check_folder(model)
        while left:
            folder = left.pop()
            for path in (folder / name for name in files.names(model / folder)):
                if path in written:
                    files.check_own(model / path)
                    done.add(path)
                elif path in folders:
                    files.check_folder(model / path)
                    left.append(path)
                else:
                    raise InputError(
                        f"{model / path}: expected only what this fuse writes there, found another file or folder; "
                        f"move it elsewhere"
                    )
    return done


def _check_whole(model: Path, written: Collection[Path]) -> None:
    """Raise StorageError unless the folder holds exactly what the job writes."""
    try:
        missing = set(written) - _check_model(model, written)
    except InputError as error:
        raise StorageError(str(error)) from error
    if missing:
        raise StorageError(f"{model / min(missing)}: expected the file as it was written, found none")


def _discard(folder: Path, written: Iterable[Path]) -> None:
    """Remove what a fuse has written, and nothing else; job.json last, since only it says that the rest is ours."""
    folders = {parent for file in written for parent in file.parents if parent.name}
    with suppress(OSError):
        files.remove(folder / JOURNAL)
        if MODEL in files.names(folder):  # else it has become DST
            for file in written:
                files.remove(folder / MODEL / file)
            for parent in sorted(folders, key=lambda path: -len(path.parts)):
                files.remove_folder(folder / MODEL / parent)
            files.remove_folder(folder / MODEL)
        files.remove(folder / JOB)


@contextmanager
def _locked(destination: Destination) -> Iterator[None]:
    """Hold the lock of the unfinished folder. It is made if missing, and removed if nothing was begun."""
    folder = destination.unfinished
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        _check_folder(folder)
        files.make_folder(folder)
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{destination}: expected no other process at it, found one that is writing {folder}; wait for it, or "
            f"choose another folder"
        ) from None
    except OSError as error:
        with suppress(OSError):
            files.remove_folder(folder)
        raise StorageError(
            f"{destination.disk}: expected a folder that can be written, found: {error.strerror}"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            if JOB not in files.names(folder):
                files.remove(files.beside(folder / JOB))
                files.remove(folder / LOCK)
                files.remove_folder(folder)
        lock.release()


def _storage_error(destination: Destination, error: OSError, kept: bool) -> StorageError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # of copies, the source is named
    ours = full or error.filename is None or Path(error.filename).is_relative_to(destination.unfinished)
    where = f"{destination}: could not be written" if ours else f"{error.filename}: could not be read"
    left = (
        f"remove {destination.unfinished}"
        if os.path.lexists(destination.unfinished / JOB)
        else "nothing was left behind"
    )
    state = KEPT if kept else left
    return StorageError(f"{where}: {error.strerror or error}; {state}")

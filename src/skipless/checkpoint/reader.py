"""Read a model folder lazily: headers first (headers.py), tensors one at a time on request."""

import hashlib
import io
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from skipless.checkpoint.family import buffers
from skipless.checkpoint.headers import INDEX, Folder, Header
from skipless.dtypes import INDEX_NAMES, SAFETENSORS_NAMES
from skipless.errors import InputError, StorageError

DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in (SAFETENSORS_NAMES | INDEX_NAMES).items()
}
# Called with what has been read: a tensor's name, where in it the bytes begin, and the bytes.
Seen = Callable[[str, int, memoryview], None]
# Numbers looked at, and bytes read only to have them in the system's cache, at a time.
BLOCK = 2**22


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's shape, dtype and shard, from its header."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    shard: str

    @property
    def is_index(self) -> bool:
        """Whether it holds integers: places of other tensors' columns, not weights."""
        return not self.dtype.is_floating_point

    @property
    def weights(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The size in bytes."""
        return self.weights * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """The size in bytes of one row: one index of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class CheckpointReader(Folder):
    """A model folder opened for reading. No tensor is read until `tensor` is called.

    device: where tensors are read to, "cpu" or a CUDA device. Buffers that a family's checkpoints hold are no tensors.
    Raises InputError as Folder does, and for tensors of other dtypes than those of weights and indices.
    """

    def __init__(self, folder: Path, device: str = "cpu"):
        self.device = _device(device)
        before = {file.name: file_stamp(file) for file in folder.glob("*") if file.is_file()}
        super().__init__(folder)
        names = ["config.json", *self.shards] + ([INDEX] if self._weight_map is not None else [])
        passed_over = buffers(self.config)
        self._stamps = {name: before.get(name) or file_stamp(self.path(name)) for name in names}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {
                name: _info(name, header)
                for name, header in self.headers.items()
                if not any(part in name for part in passed_over)
            }
        )

    @property
    def place(self) -> str:
        """The path or URL to open it by, from anywhere."""
        return str(self.folder.resolve())

    @property
    def name(self) -> str:
        """The place without secrets, for messages and records."""
        return self.place

    def fetch(self, file: Path) -> Path:
        """The local path of one of other_files."""
        return self.folder / file

    def fingerprint(self, copy: Collection[str] = ()) -> dict[str, Any]:
        """What tells this checkpoint from another, or from itself after a change: of each file, what _stamped gives.

        copy: what is copied along beside the usual (other_files).
        """
        others = {str(file): file_stamp(self.folder / file) for file in self.other_files(copy)}
        return {name: list(stamp) for name, stamp in (self._stamps | others).items()}

    def shared_fingerprint(self) -> dict[str, Any]:
        """The part of the fingerprint that a copy on another machine shares, if it has kept its files' times."""
        return {name: stamp[:2] for name, stamp in self.fingerprint().items()}

    def check_unchanged(self) -> None:
        """Raise InputError if a file has changed since its header was read."""
        for name in self._stamps:
            self._check_stamp(name, self.path(name).stat())

    def tensor(self, name: str, rows: slice | None = None, seen: Seen | None = None) -> torch.Tensor:
        """Read one tensor, or rows (start, stop) of it. Raises StorageError if it cannot be read, InputError if it
        holds NaN or infinity, or if its file has changed since it was opened.

        seen: called with the tensor's name, the place of the first byte in it, and the bytes.
        """
        info = self.tensors[name]
        shape, start = info.shape, 0
        if rows is not None:
            shape = (rows.stop - rows.start, *info.shape[1:])
            start = rows.start * info.row_bytes
        tensor = torch.empty(shape, dtype=info.dtype)
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        count = self._read(name, start, data)
        if count < tensor.nbytes:
            raise InputError(
                f"{name}: expected {tensor.nbytes:,} bytes in {self.path(info.shard)}, found {count:,}: the file "
                f"was cut short while it was read; copy or download it again"
            )
        if bad := not_finite(tensor):
            raise InputError(
                f"{name}: expected finite numbers, found {bad} of {tensor.numel()} NaN or infinite; the checkpoint is "
                f"damaged or its training diverged"
            )
        if seen is not None:
            seen(name, start, data)
        return tensor.to(self.device)

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's bytes."""
        found, size, block = hashlib.sha256(), self.tensors[name].bytes, memoryview(bytearray(BLOCK))
        for start in range(0, size, BLOCK):
            part = block[: min(BLOCK, size - start)]
            found.update(part[: self._read(name, start, part)])
        return found.hexdigest()

    def size(self, name: str) -> int:
        """Bytes that a tensor takes in its file."""
        return self.tensors[name].bytes

    def sample(self, most: int) -> int:
        """Read at most so many bytes of the largest shard, past the system's cache if that can be."""
        path = max(map(self.path, self.shards), key=lambda path: path.stat().st_size)
        block, done = memoryview(bytearray(BLOCK)), 0
        with path.open("rb", buffering=0) as file:
            uncache(file.fileno(), most)
            while done < most and (count := file.readinto(block)):
                done += count
        return done

    def warm(self, names: Iterable[str], stop: Callable[[], bool] = lambda: False) -> None:
        """Read tensors into the system's cache, so that `tensor` need not wait for the disk, until `stop` says so."""
        block = memoryview(bytearray(BLOCK))
        for name in names:
            left = self.size(name)
            with suppress(InputError), self._opened(name) as file:  # `tensor` will say what is wrong
                while left > 0 and not stop() and (count := file.readinto(block[: min(left, BLOCK)])):
                    left -= count

    def _read(self, name: str, start: int, into: memoryview) -> int:
        """Fill a buffer with a tensor's bytes from `start` on; returns how many were read."""
        done = 0
        with self._opened(name) as file:
            file.seek(start, os.SEEK_CUR)
            while done < len(into) and (count := file.readinto(into[done:])):
                done += count
        return done

    @contextmanager
    def _opened(self, name: str) -> Iterator[io.FileIO]:
        """Open a tensor's file at its first byte."""
        path = self.path(self.tensors[name].shard)
        try:
            with path.open("rb", buffering=0) as file:
                self._check_stamp(path.name, os.fstat(file.fileno()))
                file.seek(self.headers[name].start)
                yield file
        except OSError as error:
            raise StorageError(f"{name}: could not be read from {path}: {error.strerror or error}") from error

    def _check_stamp(self, name: str, now: os.stat_result) -> None:
        if _stamped(now) != self._stamps[name]:
            raise changed(f"{self.path(name)}")


def changed(file: str) -> InputError:
    """The message for a file that has changed since its header was read."""
    return InputError(
        f"{file}: expected the file as it was when its header was read, found it changed meanwhile; let nothing write "
        f"to it, and begin anew"
    )


def uncache(descriptor: int, size: int = 0) -> None:
    """Drop the first `size` bytes of a file (0: all) from the page cache, so that reads reach the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)


def not_finite(tensor: torch.Tensor) -> int:
    """The number of NaN or infinite elements. A block with a finite sum has none."""
    blocks = tensor.reshape(-1).split(BLOCK)
    suspect = (block for block in blocks if not torch.isfinite(block.sum()))
    return sum(block.numel() - int(torch.isfinite(block).sum()) for block in suspect)


def file_stamp(file: Path) -> tuple[int, ...]:
    """What tells a file from another, or from itself after a change."""
    return _stamped(file.stat())


def _stamped(status: os.stat_result) -> tuple[int, ...]:
    """Size, mtime, ctime (both in nanoseconds) and inode: mtime can be set by anybody, ctime cannot."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _info(name: str, header: Header) -> TensorInfo:
    if header.dtype not in DTYPES:
        raise InputError(
            f"{name}: expected a dtype of {', '.join(SAFETENSORS_NAMES)} (weights) or {', '.join(INDEX_NAMES)} "
            f"(indices), found {header.dtype} in {header.shard}; dequantize or convert it first"
        )
    return TensorInfo(header.shape, DTYPES[header.dtype], header.shard)


def _device(name: str) -> torch.device:
    """The device of that name. Raises InputError if it does not exist or cannot compute in fp64."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    count = torch.cuda.device_count()
    if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < count):
        return device
    raise InputError(f"device: expected cpu or one of the CUDA devices that torch finds ({count}), found {name!r}")

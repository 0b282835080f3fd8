"""Write a model folder as a stream of tensors: DST appears whole or not at all.

The shapes are known before the first tensor is, so each shard's header is written first and tensors go to their place
in the file as they come: memory holds one tensor, whatever the shard's size.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import safe_open

from skipless.checkpoint.headers import INDEX, SINGLE
from skipless.checkpoint.reader import DTYPES, TensorInfo
from skipless.errors import InputError

CODES = {dtype: code for code, dtype in DTYPES.items()}


def plan_shards(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], max_shard_size: int
) -> dict[str, TensorInfo]:
    """Assign tensors, in order, to shards of at most `max_shard_size` bytes (a larger tensor gets its own)."""
    planned: dict[str, TensorInfo] = {}
    shard, size = 0, 0
    for name, (shape, dtype) in tensors.items():
        info = TensorInfo(shape, dtype, str(shard))
        if size and size + info.bytes > max_shard_size:
            shard, size = shard + 1, 0
        planned[name] = dataclasses.replace(info, shard=str(shard))
        size += info.bytes
    count = shard + 1
    names = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return {name: dataclasses.replace(info, shard=names[int(info.shard)]) for name, info in planned.items()}


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A temporary sibling of `destination`, which gets that name, on disk, when the block ends, or is removed.

    Raises InputError when `destination` exists, its parent does not, or the disk is full.
    """
    if destination.exists() or destination.is_symlink():
        raise InputError(f"{destination}: expected a new folder, found one that exists; choose another or remove it")
    if not destination.parent.is_dir():
        raise InputError(f"{destination.parent}: expected an existing folder to write into, found none; create it")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    except OSError as error:
        raise InputError(
            f"{destination.parent}: expected a folder that can be written, found: {error.strerror}"
        ) from error
    try:
        folder.chmod(0o777 & ~_umask())
        yield folder
        for path in (*folder.rglob("*"), folder):
            _sync(path)
        folder.rename(destination)
        with suppress(OSError):  # a parent that may be written but not read
            _sync(destination.parent)
    except OSError as error:
        ours = error.filename is None or Path(error.filename).is_relative_to(folder)
        where = f"{destination}: could not be written" if ours else f"{error.filename}: could not be read"
        raise InputError(f"{where}: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class CheckpointWriter:
    """The safetensors shards and index of one folder, filled tensor by tensor in any order."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]):
        self.folder, self.tensors = folder, tensors
        self.missing = set(tensors)
        self._offsets: dict[str, int] = {}
        for shard in self.shards:
            self._write_header(shard)

    @property
    def shards(self) -> list[str]:
        """The shards' file names, in order."""
        return list(dict.fromkeys(info.shard for info in self.tensors.values()))

    def _write_header(self, shard: str) -> None:
        """Eight bytes of length, a JSON header padded to a multiple of 8, then the data (not yet written)."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, info in self.tensors.items():
            if info.shard == shard:
                end = position + info.bytes
                header[name] = {
                    "dtype": CODES[info.dtype],
                    "shape": list(info.shape),
                    "data_offsets": [position, end],
                }
                self._offsets[name] = position
                position = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with (self.folder / shard).open("xb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + position)
        for name, info in self.tensors.items():
            if info.shard == shard:
                self._offsets[name] += 8 + len(encoded)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in its place. Raises InputError if casting it to a smaller dtype has overflowed."""
        info = self.tensors[name]
        assert name in self.missing, name
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), name
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{name}: expected numbers that {info.dtype} can hold, found an overflow; use --dtype float32"
            )
        with (self.folder / info.shard).open("r+b") as file:
            file.seek(self._offsets[name])
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.missing.discard(name)

    def finish(self) -> None:
        """Check that safetensors reads every header, and write the index last."""
        assert not self.missing, self.missing
        for shard in self.shards:
            with safe_open(self.folder / shard, framework="pt") as file:
                assert set(file.keys()) == {name for name, info in self.tensors.items() if info.shard == shard}
        if len(self.shards) > 1:
            total = sum(info.bytes for info in self.tensors.values())
            weight_map = {name: info.shard for name, info in self.tensors.items()}
            write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(file: Path, value: Mapping[str, object]) -> None:
    """An object as indented JSON."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Write the shards of a model folder as a stream of tensors.

The shapes are known before the first tensor is, so each shard's header is written first and tensors go to their place
in the file as they come, whole or some rows at a time: memory holds no more, whatever the shard's size.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from skipless.checkpoint import files
from skipless.checkpoint.digests import Behind
from skipless.checkpoint.files import BLOCK
from skipless.checkpoint.headers import INDEX, SINGLE, read_header
from skipless.checkpoint.reader import DTYPES, TensorInfo, uncache
from skipless.errors import InputError, StorageError

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


class CheckpointWriter:
    """The safetensors shards and index of one folder, filled tensor by tensor in any order.

    Shards that are there already, as an earlier process has left them, keep what they hold.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]):
        self.folder, self.tensors = folder, tensors
        self._headers: dict[str, bytes] = {}
        self._offsets: dict[str, int] = {}
        self._begun: dict[str, tuple[int, Any]] = {}  # of a tensor that comes in parts: bytes, SHA-256
        for shard in self.shards:
            self._begin(shard)

    @property
    def shards(self) -> list[str]:
        """The shards' file names, in order."""
        return list(dict.fromkeys(info.shard for info in self.tensors.values()))

    def _begin(self, shard: str) -> None:
        """Eight bytes of length, a JSON header padded to a multiple of 8, then the data (not yet written)."""
        fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position, names = 0, [name for name, info in self.tensors.items() if info.shard == shard]
        for name in names:
            info, self._offsets[name] = self.tensors[name], position
            position += info.bytes
            offsets = [self._offsets[name], position]
            fields[name] = {"dtype": CODES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        encoded = json.dumps(fields, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        header = len(encoded).to_bytes(8, "little") + encoded
        with self._opened(shard) as file:
            file.resize(len(header) + position)
            file.write(header)
        self._headers[shard] = header
        for name in names:
            self._offsets[name] += len(header)

    def _opened(self, shard: str) -> files.File:
        """Open a shard; create it if it does not exist."""
        try:
            return files.reopen(self.folder / shard, writing=True)
        except FileNotFoundError:
            return files.create(self.folder / shard)

    def write(self, name: str, rows: torch.Tensor) -> str | None:
        """Write a tensor, or the rows of it that come next, to their place on disk.

        Returns the SHA-256 of the tensor's bytes after the last rows, else None.
        """
        info = self.tensors[name]
        assert (rows.shape[1:], rows.dtype) == (info.shape[1:], info.dtype), name
        done, sha256 = self._begun.pop(name, (0, hashlib.sha256()))
        data = rows.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        with files.reopen(self.folder / info.shard, writing=True) as file:
            file.seek(self._offsets[name] + done)
            file.write(data)
            file.sync()
        done += len(data)
        assert done <= info.bytes, name
        sha256.update(data)
        if done == info.bytes:
            return sha256.hexdigest()
        self._begun[name] = done, sha256
        return None

    def digest(self, name: str) -> str | None:
        """The SHA-256 of the bytes at a tensor's place; None if all are zero, as before it is written."""
        size = self.tensors[name].bytes
        with files.reopen(self.folder / self.tensors[name].shard) as file:
            file.seek(self._offsets[name])
            sha256, blank = hashlib.sha256(), size > 0
            for block in file.blocks(size):
                blank = blank and block.count(0) == len(block)
                sha256.update(block)
        return None if blank else sha256.hexdigest()

    def finish(self, digests: Mapping[str, str]) -> dict[str, str]:
        """Read everything again, from disk, and write the index, last. Returns the SHA-256 of each shard.

        digests: of every tensor, as `write` returned them. Raises StorageError naming the first tensor whose bytes
        differ.
        """
        assert not self._begun, sorted(self._begun)
        shards = {shard: self._check(shard, digests) for shard in self.shards}
        if len(self.shards) > 1:
            total = sum(info.bytes for info in self.tensors.values())
            weight_map = {name: info.shard for name, info in self.tensors.items()}
            write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        return shards

    def _check(self, shard: str, digests: Mapping[str, str]) -> str:
        """The SHA-256 of a shard, each of whose tensors is hashed for itself, too, by another thread."""
        whole, behind = hashlib.sha256(), Behind("hashing", BLOCK)
        with files.reopen(self.folder / shard) as file, closing(behind):
            uncache(file.descriptor)
            header = file.read(len(self._headers[shard]))
            whole.update(header)
            if header != self._headers[shard]:
                raise StorageError(f"{shard}: expected the header that was written, found another; check the disk")
            for name in (name for name, info in self.tensors.items() if info.shard == shard):
                own = hashlib.sha256()
                for block in file.blocks(self.tensors[name].bytes):
                    behind.add(len(block), own.update, block)
                    whole.update(block)
                behind.finish()
                if own.hexdigest() != digests[name]:
                    raise StorageError(
                        f"{name}: expected in {shard} what was written, found other bytes; check the disk"
                    )
        try:
            read_header(self.folder / shard)
        except InputError as error:
            raise StorageError(f"{error}; check the disk") from error
        return whole.hexdigest()


def write_json(file: Path, value: Mapping[str, object]) -> None:
    """Write an object to a new file, as indented JSON."""
    files.write(file, [to_json(value)])


def to_json(value: Mapping[str, object]) -> bytes:
    """An object as indented JSON, in UTF-8."""
    return f"{json.dumps(value, indent=2)}\n".encode()

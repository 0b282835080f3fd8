"""Read a model folder lazily: headers first (headers.py), tensors one at a time on request."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from skipless.checkpoint.headers import Folder, Header, ignores_nothing
from skipless.dtypes import INDEX_NAMES, SAFETENSORS_NAMES
from skipless.errors import InputError

DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in (SAFETENSORS_NAMES | INDEX_NAMES).items()
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    shard: str

    @property
    def is_index(self) -> bool:
        """Whether it holds integers: places of other tensors' columns, not weights."""
        return not self.dtype.is_floating_point

    @property
    def weights(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.weights * self.dtype.itemsize


class CheckpointReader(Folder):
    """A model folder opened for reading. No tensor is read until `tensor` is called.

    device: where tensors are read to, "cpu" or a CUDA device; ignores: whether a tensor does not matter, by its name.
    Raises InputError as Folder does, and for tensors of other dtypes than those of weights and indices.
    """

    def __init__(self, folder: Path, device: str = "cpu", ignores: Callable[[str], bool] = ignores_nothing):
        self.device = _device(device)
        super().__init__(folder)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: _info(name, header) for name, header in self.headers.items() if not ignores(name)}
        )

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor. Raises InputError if it cannot be read, or holds NaN or infinity."""
        info, file = self.tensors[name], self.folder / self.tensors[name].shard
        tensor = torch.empty(info.shape, dtype=info.dtype)
        buffer = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            with file.open("rb", buffering=0) as stream:
                stream.seek(self.headers[name].start)
                while buffer and (count := stream.readinto(buffer)):
                    buffer = buffer[count:]
        except OSError as error:
            raise InputError(f"{name}: could not be read from {file}: {error.strerror or error}") from error
        if buffer:
            raise InputError(
                f"{name}: expected {info.bytes:,} bytes in {file}, found {len(buffer):,} fewer: the file was cut short "
                f"while it was read; copy or download it again"
            )
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{name}: expected finite numbers, found {bad} of {tensor.numel()} NaN or infinite; the checkpoint is "
                f"damaged or its training diverged"
            )
        return tensor.to(self.device)


def _info(name: str, header: Header) -> TensorInfo:
    if header.dtype not in DTYPES:
        raise InputError(
            f"{name}: expected a dtype of {', '.join(SAFETENSORS_NAMES)} (weights) or {', '.join(INDEX_NAMES)} "
            f"(indices), found {header.dtype} in {header.shard}; dequantize or convert it first"
        )
    return TensorInfo(header.shape, DTYPES[header.dtype], header.shard)


def _device(name: str) -> torch.device:
    """The device of that name. Raises InputError if there is none, or none that computes in fp64."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    count = torch.cuda.device_count()
    if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < count):
        return device
    raise InputError(f"device: expected cpu or one of the CUDA devices that torch finds ({count}), found {name!r}")

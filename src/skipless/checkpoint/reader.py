"""Read a model folder lazily: config.json and safetensors headers first, tensors one at a time on request."""

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from skipless.dtypes import INDEX_NAMES, SAFETENSORS_NAMES
from skipless.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

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


class CheckpointReader:
    """A model folder opened for reading. No tensor is read until `tensor` is called.

    device: where tensors are read to, "cpu" or a CUDA device. Raises InputError naming the file, field or tensor for
    anything missing, truncated, contradicting or not safetensors; pickle files are never opened.
    """

    def __init__(self, folder: Path, device: str = "cpu"):
        self.device = _device(device)
        if not folder.is_dir():
            raise InputError(f"{folder}: expected a model folder, found {'a file' if folder.exists() else 'nothing'}")
        self.folder = folder
        self.config = read_json_object(folder / "config.json")
        self._weight_map: dict[str, str] | None = None
        self.shards = self._find_shards()
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(self._read_headers())

    def _find_shards(self) -> list[str]:
        if (self.folder / INDEX).exists():
            if (self.folder / SINGLE).exists():
                raise InputError(
                    f"{self.folder}: expected one of {SINGLE} and {INDEX}, found both; remove the stale one"
                )
            weight_map = read_json_object(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise InputError(
                    f"{self.folder / INDEX}: weight_map: expected tensor names and their files, found none"
                )
            self._weight_map = weight_map
            shards = sorted({str(shard) for shard in weight_map.values()})
            for shard in shards:
                if Path(shard).name != shard or not shard.endswith(".safetensors"):
                    raise InputError(
                        f"{self.folder / INDEX}: weight_map: expected safetensors files in this folder, found {shard!r}"
                    )
                if not (self.folder / shard).is_file():
                    raise InputError(f"{self.folder / shard}: expected a shard that {INDEX} names, found no such file")
            return shards
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        pickles = sorted(file.name for pattern in PICKLES for file in self.folder.glob(pattern))
        if pickles:
            raise InputError(
                f"{self.folder / pickles[0]}: expected safetensors, found a pickle file, which can run code when it is "
                f"opened; if you trust it, convert it: load the model with transformers and call save_pretrained"
            )
        raise InputError(f"{self.folder}: expected {SINGLE} or {INDEX}, found neither")

    def _read_headers(self) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for shard in self.shards:
            with self._open(shard) as file:
                for name in sorted(file.keys()):
                    view = file.get_slice(name)
                    if name in tensors:
                        raise InputError(f"{name}: expected once, found in {tensors[name].shard} and {shard}")
                    if view.get_dtype() not in DTYPES:
                        raise InputError(
                            f"{name}: expected a dtype of {', '.join(SAFETENSORS_NAMES)} (weights) or "
                            f"{', '.join(INDEX_NAMES)} (indices), found {view.get_dtype()} in {shard}; dequantize or "
                            f"convert it first"
                        )
                    tensors[name] = TensorInfo(tuple(view.get_shape()), DTYPES[view.get_dtype()], shard)
        for name, shard in (self._weight_map or {}).items():
            if name not in tensors or tensors[name].shard != shard:
                raise InputError(f"{name}: expected in {shard}, as {INDEX} says; not found there")
        return tensors

    def _open(self, shard: str) -> Any:
        try:
            return safe_open(self.folder / shard, framework="pt", device=str(self.device))
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{self.folder / shard}: expected a whole safetensors file, found {error}; it may be truncated or "
                f"damaged: copy or download it again"
            ) from error

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor. Raises InputError if it holds NaN or infinity."""
        shard = self.tensors[name].shard
        with self._open(shard) as file:
            try:
                tensor = file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise InputError(f"{name}: could not be read from {self.folder / shard}: {error}") from error
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{name}: expected finite numbers, found {bad} of {tensor.numel()} NaN or infinite; the checkpoint is "
                f"damaged or its training diverged"
            )
        return tensor

    def check(self, expected: Mapping[str, tuple[int, ...]], indices: Collection[str] = ()) -> None:
        """Compare names, shapes and kinds (integers for `indices`, else floating point) with what config.json promises.

        Raises InputError for the first difference.
        """
        for name, shape in expected.items():
            if name not in self.tensors:
                raise InputError(
                    f"{name}: expected {shape}, as config.json says; found no such tensor in {self.folder}"
                )
            if (found := self.tensors[name].shape) != shape:
                raise InputError(
                    f"{name}: expected {shape}, as config.json says; found {found}; correct one of the two"
                )
            if self.tensors[name].is_index != (name in indices):
                kind = "int32 indices" if name in indices else "floating-point weights"
                raise InputError(f"{name}: expected {kind}, found {self.tensors[name].dtype}; convert it")
        for name, info in self.tensors.items():
            if name not in expected:
                raise InputError(
                    f"{name}: expected no such tensor in the model that config.json describes, found {info.shape}; "
                    "correct config.json (a bias or norm switch?) or remove the tensor"
                )

    def other_files(self) -> list[Path]:
        """Everything beside config.json and weights in any format, relative to the folder, in a fixed order.

        Raises InputError for a folder that cannot be read.
        """
        found = []
        for parent, _, names in os.walk(self.folder, onerror=_unreadable):
            found += [(Path(parent) / name).relative_to(self.folder) for name in names]
        weights = ("config.json", "*.safetensors", "*.index.json", *PICKLES)
        return sorted(file for file in found if not any(file.match(pattern) for pattern in weights))


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


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: expected a folder that can be read, found: {error.strerror}") from error


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises InputError naming the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: expected a JSON file, found no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: expected JSON, found {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value

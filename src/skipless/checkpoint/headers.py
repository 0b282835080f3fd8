"""What a model folder promises: config.json, and names, shapes and dtypes in safetensors headers. No torch."""

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from skipless.dtypes import INDEX_NAMES, SAFETENSORS_NAMES
from skipless.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Header:
    """What a header says of a tensor; dtype: as safetensors calls it; start: of its bytes in the file."""

    shape: tuple[int, ...]
    dtype: str
    shard: str
    start: int = 0


def ignores_nothing(name: str) -> bool:
    """No tensor is without meaning."""
    return False


class Folder:
    """A model folder of which no tensor has been read.

    Raises InputError naming the file, field or tensor for anything missing, truncated, contradicting or not
    safetensors; pickle files are never opened.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise InputError(f"{folder}: expected a model folder, found {'a file' if folder.exists() else 'nothing'}")
        self.folder = folder
        self.config = read_json_object(folder / "config.json")
        self._weight_map: dict[str, str] | None = None
        self.shards = self._find_shards()
        self.headers: Mapping[str, Header] = self._read_headers()

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

    def _read_headers(self) -> dict[str, Header]:
        headers: dict[str, Header] = {}
        for shard in self.shards:
            for name, header in sorted(read_header(self.folder / shard).items()):
                if name in headers:
                    raise InputError(f"{name}: expected once, found in {headers[name].shard} and {shard}")
                headers[name] = header
        for name, shard in (self._weight_map or {}).items():
            if name not in headers or headers[name].shard != shard:
                raise InputError(f"{name}: expected in {shard}, as {INDEX} says; not found there")
        return headers

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        indices: Collection[str] = (),
        ignores: Callable[[str], bool] = ignores_nothing,
    ) -> None:
        """Compare names, shapes and kinds (integers for `indices`, else floating point) with what config.json promises.

        ignores: whether a tensor that was not promised does not matter. Raises InputError for the first difference.
        """
        check_headers(self.headers, str(self.folder), "config.json", expected, indices, ignores)

    def other_files(self) -> list[Path]:
        """Everything beside config.json and weights in any format, relative to the folder, in a fixed order.

        Raises InputError for a folder that cannot be read.
        """
        found = []
        for parent, _, names in os.walk(self.folder, onerror=_unreadable):
            found += [(Path(parent) / name).relative_to(self.folder) for name in names]
        weights = ("config.json", "*.safetensors", "*.index.json", *PICKLES)
        return sorted(file for file in found if not any(file.match(pattern) for pattern in weights))


def check_headers(
    headers: Mapping[str, Header],
    where: str,
    source: str,
    expected: Mapping[str, tuple[int, ...]],
    indices: Collection[str],
    ignores: Callable[[str], bool],
) -> None:
    """Folder.check, for tensors that are in `where` and that `source` describes."""
    for name, shape in expected.items():
        if name not in headers:
            raise InputError(f"{name}: expected {shape}, as {source} says; found no such tensor in {where}")
        if (found := headers[name].shape) != shape:
            raise InputError(f"{name}: expected {shape}, as {source} says; found {found}; correct one of the two")
        known, kind = (INDEX_NAMES, "indices") if name in indices else (SAFETENSORS_NAMES, "weights")
        if (dtype := headers[name].dtype) not in known:
            raise InputError(
                f"{name}: expected {kind} of dtype {', '.join(known)}, found {dtype} in "
                f"{headers[name].shard}; dequantize or convert it first"
            )
    for name, info in headers.items():
        if name not in expected and not ignores(name):
            raise InputError(
                f"{name}: expected no such tensor in the model that {source} describes, found {info.shape}; "
                f"correct {source} (a bias or norm switch?) or remove the tensor"
            )


def read_header(file: Path) -> dict[str, Header]:
    """The tensors of a safetensors file. Raises InputError if it is none, or not whole.

    safetensors checks the header; where each tensor starts, which it does not say, is then read from it.
    """
    try:
        with safe_open(file, framework="np") as checked:
            names = set(checked.keys())
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            fields = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: expected a whole safetensors file, found {error}; it may be truncated or damaged: copy or "
            f"download it again"
        ) from error
    return {
        name: Header(tuple(fields[name]["shape"]), fields[name]["dtype"], file.name, 8 + length + start)
        for name in names
        for start in fields[name]["data_offsets"][:1]
    }


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

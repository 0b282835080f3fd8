"""A checkpoint as the algebra sees it: an architecture, canonical tensors, and modules as maps."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from huggingface_hub.errors import StrictDataclassError

from skipless.architecture.config import Architecture
from skipless.checkpoint import family, gguf_file
from skipless.checkpoint.canonical import Canonical
from skipless.checkpoint.headers import Folder
from skipless.checkpoint.reader import CheckpointReader, TensorInfo
from skipless.errors import InputError
from skipless.model.configuration_skipless import SkiplessConfig
from skipless.quiet import errors_only


@runtime_checkable
class Read(Protocol):
    """What gives a checkpoint's tensors by their names, or only rows (start, stop) of one."""

    def __call__(self, name: str, rows: slice | None = None, /) -> torch.Tensor: ...


class Reader(Protocol):
    """Tensors by their canonical names; `tensors`: what is known of them before they are read."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def tensor(self, name: str) -> torch.Tensor:
        """Read one. Raises InputError if it cannot be read, or holds NaN or infinity."""


class RowReader(Protocol):
    """The same of a skipless checkpoint, of whose tensors rows (start, stop) can be read alone."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def tensor(self) -> Read: ...


@dataclass(frozen=True)
class Source:
    """A checkpoint of any family that has been opened, its headers agreeing with its config."""

    family: str
    architecture: Architecture
    reader: Reader


def open_source(path: Path, device: str = "cpu") -> Source:
    """Any checkpoint: a skipless model folder, one of a family that is described, or a GGUF file.

    Raises InputError for what cannot be opened, for a model_type that no family describes, and for the first tensor
    that contradicts the config.
    """
    opened = gguf_file.GGUFReader(path) if path.suffix == ".gguf" else Folder(path)
    if opened.config.get("model_type") == "skipless":
        skipless = CheckpointReader(path, device)
        return Source("skipless", read_architecture(skipless), skipless)
    layout = family.laid_out(opened)
    reader = CheckpointReader(path, device) if isinstance(opened, Folder) else opened
    return Source(layout.family.model_types[0], layout.architecture, Canonical(reader.tensors, reader.tensor, layout))


def read_architecture(reader: CheckpointReader) -> Architecture:
    """What config.json describes, if the headers agree. Raises InputError for the first difference."""
    source = Architecture.from_config(reader.config)
    if source.num_hidden_layers > len(reader.tensors):
        raise InputError(
            f"config.json: num_hidden_layers: expected at most {len(reader.tensors)}, the number of tensors, found "
            f"{source.num_hidden_layers}"
        )
    reader.check(source.tensors(), source.index_tensors())
    check_config(reader.config)
    return source


def check_config(config: Mapping[str, object]) -> None:
    """Raise InputError, naming the field, for a skipless config.json that transformers would not load."""
    try:
        with errors_only("transformers"):
            SkiplessConfig.from_dict(copy.deepcopy(dict(config)))
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, StrictDataclassError) as error:
        raise InputError(f"config.json: {' '.join(str(error.__cause__ or error).split())}") from error

"""A checkpoint as the algebra sees it: an architecture, canonical tensors, and modules as maps."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from skipless.architecture.config import Architecture
from skipless.checkpoint import family, gguf_file
from skipless.checkpoint.canonical import Canonical
from skipless.checkpoint.headers import Folder
from skipless.checkpoint.reader import CheckpointReader, TensorInfo
from skipless.errors import InputError
from skipless.model.configuration_skipless import SkiplessConfig
from skipless.quiet import errors_only

# What transformers raises for a config that it cannot read.
CONFIG_ERRORS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, StrictDataclassError)
# Fields that mean the same in every family's config.
SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "use_cache")


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


@dataclass(frozen=True)
class AsSkipless:
    """A checkpoint as a skipless one: its own, or one of another family, skips and norms included, nothing removed.

    config: the fields of its config.json. tensors, tensor: by our names. layout: where these lie in another family's.
    """

    architecture: Architecture
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    tensor: Read
    layout: family.Layout | None = None


def as_skipless(reader: CheckpointReader) -> AsSkipless:
    """A model folder of any family that a skipless model can compute.

    Raises InputError, naming the field, for one that it cannot, and for the first tensor that contradicts the config.
    """
    if reader.config.get("model_type") == "skipless":
        return AsSkipless(read_architecture(reader), reader.config, reader.tensors, reader.tensor)
    layout = family.laid_out(reader)
    config = skipless_config(layout, reader.config)
    tensors = by_our_names(reader, layout)
    return AsSkipless(Architecture.from_config(config), config, tensors.tensors, tensors.tensor, layout)


def by_our_names(reader: RowReader, layout: family.Layout) -> Canonical:
    """Another family's tensors, some of their rows at a time; what has to be read whole for these is kept a while."""
    whole = lru_cache(2)(reader.tensor)

    def read(name: str, *rows: slice) -> torch.Tensor:
        return reader.tensor(name, *rows) if rows else whole(name)

    return Canonical(reader.tensors, read, layout, as_stored=True)


def skipless_config(layout: family.Layout, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a skipless model that computes what another family's does. Raises InputError as above."""
    try:
        with errors_only("transformers"):
            completed = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config))).to_dict()
    except CONFIG_ERRORS as error:
        raise InputError(f"config.json: {' '.join(str(error.__cause__ or error).split())}") from error
    fields = layout.family.skipless(layout.architecture, completed)
    fields |= {name: completed[name] for name in SHARED if completed.get(name) is not None}
    check_config(fields)
    return fields


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
    except CONFIG_ERRORS as error:
        raise InputError(f"config.json: {' '.join(str(error.__cause__ or error).split())}") from error

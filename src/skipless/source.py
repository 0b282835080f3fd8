"""A checkpoint as the algebra sees it: an architecture, canonical tensors, and modules as maps."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from huggingface_hub.errors import StrictDataclassError

from skipless.architecture import Architecture, Module
from skipless.checkpoint import family, gguf_file
from skipless.checkpoint.headers import Folder
from skipless.checkpoint.reader import CheckpointReader, TensorInfo
from skipless.eliminate import Affine
from skipless.errors import InputError
from skipless.model.configuration_skipless import SkiplessConfig
from skipless.quiet import errors_only
from skipless.rows import Rows, Which
from skipless.seams import Seam


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


class Canonical:
    """Another family's checkpoint, by our names: parts of fused tensors, in the orientation of nn.Linear."""

    def __init__(self, reader: Reader, layout: family.Layout):
        self._reader, self._layout = reader, layout
        shapes = layout.architecture.tensors()
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(shape, (first := reader.tensors[layout.places[name].tensors[0]]).dtype, first.shard)
            for name, shape in shapes.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        place = self._layout.places[name]
        parts = [self._reader.tensor(stored) for stored in place.tensors]
        whole = parts[0].T if place.transposed else torch.cat(parts) if len(parts) > 1 else parts[0]
        rows = torch.cat([whole[start:stop] for start, stop in place.rows]) if place.rows else whole
        return rows.reshape(self.tensors[name].shape).contiguous()


def open_source(path: Path, device: str = "cpu") -> Source:
    """Any checkpoint: a skipless model folder, one of a family that is described, or a GGUF file.

    Raises InputError for what cannot be opened, for a model_type that no family describes, and for the first tensor
    that contradicts the config.
    """
    if path.suffix == ".gguf":
        file = gguf_file.GGUFReader(path)
        architecture, found = family.read(file.config), family.find(file.config)
        layout = family.Layout.of(found, architecture, file.headers)
        file.check(layout.shapes, ignores=layout.ignores)
        return Source(found.model_types[0], architecture, Canonical(file, layout))
    folder = Folder(path)
    if folder.config.get("model_type") == "skipless":
        reader = CheckpointReader(path, device)
        return Source("skipless", read_architecture(reader), reader)
    found, architecture = family.find(folder.config), family.read(folder.config)
    layout = family.Layout.of(found, architecture, folder.headers)
    folder.check(layout.shapes, ignores=layout.ignores)
    return Source(found.model_types[0], architecture, Canonical(CheckpointReader(path, device, layout.ignores), layout))


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


def read_seam(
    source: Architecture, seam: Seam, read: Callable[[str], torch.Tensor], read_rows: Read | None = None
) -> dict[str, Affine]:
    """Every module that a seam reads or rewrites. read_rows: to read tables that only write a stream, as Rows."""
    modules = {module.name: module for module in (*source.modules(), *source.norm_modules())}
    rows = tables(source, seam)
    affines = {}
    for name in (name for name in seam.modules if name in modules):
        if read_rows is not None and name in rows:
            affines[name] = read_by_rows(modules[name], read_rows)
        else:
            affines[name] = read_affine(modules[name], None, read)
    return affines


def tables(source: Architecture, seam: Seam) -> set[str]:
    """The tables that write a stream and are not read transposed: of these, rows are enough."""
    named = {module.name for module in source.modules() if module.table}
    return named.intersection(seam.writers) if seam.rest and not seam.duals else set()


def read_affine(module: Module, closed: Module | None, read: Callable[[str], torch.Tensor]) -> Affine:
    """A module's map. `closed`: what it will be; a table without a bias of its own then takes biases into its rows."""
    weight = read(f"{module.name}.weight")
    bias = read(f"{module.name}.bias").to(torch.float64) if module.bias else None
    one_hot = module.table and closed is not None and not closed.bias
    return Affine(weight if module.table or module.diagonal else weight.T, bias, one_hot)


def read_by_rows(module: Module, read: Read) -> Affine:
    """The map of a module without a bias, as Rows: of a table those that are asked for are read; another matrix is
    held as it is stored.
    """
    name = f"{module.name}.weight"
    if not module.table:
        whole = read(name).T
        return _by_rows(module, whole, whole.__getitem__, whole)
    first = read(name, slice(0, 1))

    def rows_of(which: Which) -> torch.Tensor:
        if isinstance(which, slice):
            return read(name, which)
        found = first.new_empty(len(which), module.outputs)
        for place in which.argsort().tolist():  # by their places in the file
            row = int(which[place])
            found[place] = read(name, slice(row, row + 1))[0]
        return found

    return _by_rows(module, first, rows_of)


def _by_rows(
    module: Module, like: torch.Tensor, make: Callable[[Which], torch.Tensor], origin: torch.Tensor | None = None
) -> Affine:
    rows = Rows((module.inputs, module.outputs), like.dtype, like.device, make, origin)
    return Affine(cast(torch.Tensor, rows))  # of which no more is asked for than rows

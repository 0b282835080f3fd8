"""A skipless checkpoint as the algebra sees it: an architecture, and modules as maps in fp64."""

from collections.abc import Callable

import torch

from skipless.architecture import Architecture, Module
from skipless.checkpoint.reader import CheckpointReader
from skipless.eliminate import Affine
from skipless.errors import InputError
from skipless.seams import Seam


def read_architecture(reader: CheckpointReader) -> Architecture:
    """What config.json describes, if the headers agree. Raises InputError for the first difference."""
    source = Architecture.from_config(reader.config)
    if source.num_hidden_layers > len(reader.tensors):
        raise InputError(
            f"config.json: num_hidden_layers: expected at most {len(reader.tensors)}, the number of tensors, found "
            f"{source.num_hidden_layers}"
        )
    reader.check(source.tensors(), source.index_tensors())
    return source


def read_seam(source: Architecture, seam: Seam, read: Callable[[str], torch.Tensor]) -> dict[str, Affine]:
    """Every module that a seam reads or rewrites."""
    modules = {module.name: module for module in source.modules()}
    return {name: read_affine(modules[name], None, read) for name in seam.modules}


def read_affine(module: Module, closed: Module | None, read: Callable[[str], torch.Tensor]) -> Affine:
    """A module's map. `closed`: what it will be; a table without a bias of its own then takes biases into its rows."""
    # Always a copy: read from the file, its address and so the last bits of a product would depend on the sharding.
    weight = read(f"{module.name}.weight").to(torch.float64, copy=True)
    bias = read(f"{module.name}.bias").to(torch.float64) if module.bias else None
    one_hot = module.table and closed is not None and not closed.bias
    return Affine(weight if module.table else weight.T, bias, one_hot)

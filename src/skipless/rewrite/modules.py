"""A checkpoint's modules as the algebra's maps."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import cast

import torch

from skipless.algebra.affine import Affine
from skipless.algebra.rows import Rows, Which
from skipless.architecture.config import Architecture, Module
from skipless.architecture.seams import Seam
from skipless.checkpoint.opening import Read
from skipless.errors import InputError


def read_seam(
    source: Architecture, seam: Seam, read: Callable[[str], torch.Tensor], read_rows: Read | None = None
) -> dict[str, Affine]:
    """Every module that a seam reads or rewrites. read_rows: to read tables that only write a stream, as Rows."""
    modules = {module.name: module for module in (*source.modules(), *source.norm_modules())}
    rows = tables(source, seam)
    affines = {}
    for name in (name for name in seam.modules if name in modules):
        some = read_rows if name in rows else None
        affine = read_by_rows(modules[name], some) if some else read_affine(modules[name], None, read)
        affines[name] = dataclasses.replace(affine, one_hot=name in rows)  # of untied ones, which take biases in
    return scaled(seam, affines, read)


def scaled(seam: Seam, affines: Mapping[str, Affine], read: Callable[[str], torch.Tensor]) -> dict[str, Affine]:
    """The modules of a seam, each with the gains between it and the stream (Seam.scales).

    Raises InputError for a gain of 0, which no bias can get past.
    """
    modules = dict(affines)
    for name, gains in seam.scales.items():
        scale = 1.0
        for gain, exponent in gains.items():
            if not (value := read(gain).double().item()):
                raise InputError(
                    f"{gain}: expected a gain other than 0, by which a bias is divided that moves past it, found 0; "
                    f"leave {seam.kind} out of --remove"
                )
            scale *= value**exponent
        if name in modules:
            modules[name] = dataclasses.replace(modules[name], scale=scale)
    return modules


def tables(source: Architecture, seam: Seam) -> set[str]:
    """The tables that write a stream and are not read transposed: of these, rows are enough."""
    named = {module.name for module in source.modules() if module.table}
    return named.intersection(seam.writers) if seam.rest and not seam.duals else set()


def read_affine(module: Module, closed: Module | None, read: Callable[[str], torch.Tensor]) -> Affine:
    """A module's map. `closed`: what it will be; a table without a bias of its own then takes biases into its rows."""
    weight = read(f"{module.name}.weight")
    weight = weight.double() + module.offset if module.offset else weight
    bias = read(f"{module.name}.bias").to(torch.float64) if module.bias else None
    one_hot = module.table and closed is not None and not closed.bias
    return Affine(weight if module.table or module.diagonal else weight.T, bias, one_hot, module.table)


def read_by_rows(module: Module, read: Read) -> Affine:
    """The map of a module without a bias, as Rows: a table's are read when asked for; another matrix is held whole."""
    name = f"{module.name}.weight"
    if not module.table:
        whole = read(name).T
        return _by_rows(module, whole, whole.__getitem__, whole)
    first = read(name, slice(0, 1))

    def rows_of(which: Which) -> torch.Tensor:
        if isinstance(which, slice):
            return read(name, which)
        rows = first.new_empty(len(which), module.outputs)
        for place in which.argsort().tolist():  # by their places in the file
            row = int(which[place])
            rows[place] = read(name, slice(row, row + 1))[0]
        return rows

    return _by_rows(module, first, rows_of)


def _by_rows(
    module: Module, like: torch.Tensor, make: Callable[[Which], torch.Tensor], origin: torch.Tensor | None = None
) -> Affine:
    rows = Rows((module.inputs, module.outputs), like.dtype, like.device, make, origin)
    return Affine(cast(torch.Tensor, rows), table=module.table)  # of which no more is asked for than rows

"""GGUF's kinds of blocks as grids, and which of a file's tensors are rounded to them together.

32 numbers of a row share a step and, in some kinds, the number that its multiples are added to.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from skipless.algebra.grids import Gridded, round_space
from skipless.algebra.linalg import blocks, max_abs
from skipless.algebra.rounding import Grid
from skipless.algebra.rows import Matrix, Rows
from skipless.architecture.graph import graph
from skipless.checkpoint.families.gguf_skipless import SkiplessLayout
from skipless.errors import InputError

Array = np.ndarray[Any, Any]
BLOCK = 32
LARGEST = float(np.finfo(np.float16).max)
# The least and the largest number of steps.
RANGES = {"Q8_0": (-127, 127), "Q5_0": (-16, 15), "Q5_1": (0, 31), "Q4_0": (-8, 7), "Q4_1": (0, 15)}
TABLES = ("model.embed_tokens", "model.position_embeddings")


@dataclass(frozen=True)
class Tensors:
    """Those of the file that write and read a space.

    tables: writers whose rows, not columns, are vectors of the stream. passed: whether that is also read as it is.
    """

    writers: tuple[str, ...]
    tables: tuple[str, ...]
    readers: tuple[str, ...]
    passed: bool

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.writers, *self.readers)

    def encoded(self, read: Callable[[str], Matrix], kinds: Mapping[str, GGMLQuantizationType]) -> dict[str, Array]:
        """Each as its kind stores it, all rounded with care for each other."""
        turned = [name in self.writers and name not in self.tables for name in self.names]
        given = [gridded(name, read(name), kinds[name], turn) for name, turn in zip(self.names, turned, strict=True)]
        stored = round_space(given[: len(self.writers)], given[len(self.writers) :], self.passed)
        return {
            name: np.concatenate(parts, axis=1 if turn else 0)
            for name, turn, parts in zip(self.names, turned, stored, strict=True)
        }


def spaces(layout: SkiplessLayout) -> Iterator[Tensors]:
    """The spaces that linear maps alone write and read, of those that are there, each at one place of the model."""
    architecture = layout.architecture
    for space in graph(architecture).spaces:
        modules = [port.module for port in (*space.writers, *space.readers)]
        merged = architecture.p_removed and any(name.endswith("o_proj") for name in modules)
        if len(space.places) > 1 or space.norms or space.written_tied or space.read_tied or merged:
            continue
        place, attention = space.places[0], f"model.layers.{space.places[0].layer}.self_attn"
        asked = {port.module: layout.stored(port.module) for port in space.readers}
        if f"{attention}.q_proj" in asked:
            asked[f"{attention}.rest_proj"] = layout.stored(f"{attention}.rest_proj")
        readers = tuple(name for name in asked.values() if name in layout.shapes)
        writers = {port.module: layout.stored(port.module) for port in space.writers}
        if not all(len(layout.shapes.get(name, ())) == 2 for name in (*writers.values(), *readers)):
            continue  # experts, whose matrices lie in one tensor
        biases = tuple(
            bias for name in writers.values() if (bias := f"{name.removesuffix('weight')}bias") in layout.shapes
        )
        head = place.kind == "s" and place.layer == architecture.num_hidden_layers
        closed = place.kind == "s" and architecture.stream_basis and place.layer not in architecture.layers_open
        yield Tensors(
            writers=(*writers.values(), *biases),
            tables=(*(name for module, name in writers.items() if module in TABLES), *biases),
            readers=readers,
            passed=bool(architecture.head_removed if head else closed),
        )


def gridded(name: str, stored: Matrix, kind: GGMLQuantizationType, turn: bool) -> Gridded:
    """A matrix of the file, or a bias, as algebra/grids.py takes it. turn: whether its columns are rows there."""
    matrix = stored[None] if len(stored.shape) == 1 else stored
    if turn:
        matrix = matrix[slice(0, len(matrix))].T

    def fit(rows: torch.Tensor) -> Grid:
        check(name, rows, kind)
        grid = fitted(rows.T if turn else rows, kind)
        return grid.T if turn else grid

    def encode(rows: torch.Tensor, grid: Grid | None) -> Array:
        rows = rows.T if turn else rows
        return plain(name, rows, kind) if grid is None else on_grid(rows, grid.T if turn else grid, kind)

    return Gridded(matrix, fit if kind.name in RANGES else None, encode)


def check(name: str, numbers: torch.Tensor, kind: GGMLQuantizationType) -> None:
    """Raise InputError for numbers that a kind with fp16 in it cannot hold."""
    if kind.name in (*RANGES, "F16") and numbers.numel() and (largest := max_abs(numbers)) > LARGEST:
        raise InputError(
            f"{name}: expected numbers of at most {LARGEST:,} for {kind.name}, which has fp16 in it; found {largest}; "
            f"export with --weights f32 or bf16"
        )


def fitted(matrix: torch.Tensor, kind: GGMLQuantizationType) -> Grid:
    """The grid that GGUF chooses for a matrix of the file, to round to the nearest."""
    found = quantize(np.ascontiguousarray(matrix.numpy()), kind).reshape(matrix.numel() // BLOCK, -1)

    def half(place: int) -> torch.Tensor:
        numbers = np.ascontiguousarray(found[:, 2 * place : 2 * place + 2]).view(np.float16).astype(np.float32)
        return torch.from_numpy(numbers).expand(-1, BLOCK).reshape(matrix.shape)

    low, high = RANGES[kind.name]
    step = half(0)
    origin = half(1) if low == 0 else torch.zeros_like(step)
    return Grid(torch.where(step == 0, 1, step), origin, low, high)


def plain(name: str, tensor: Matrix, kind: GGMLQuantizationType) -> Array:
    """A tensor as the file has it, each number rounded to the nearest. Raises InputError where the kind overflows."""
    if isinstance(tensor, Rows):
        return np.concatenate([plain(name, tensor[rows], kind) for rows in blocks(tensor)])
    check(name, tensor, kind)
    return quantize(np.ascontiguousarray(tensor.numpy()), kind)


def on_grid(matrix: torch.Tensor, grid: Grid, kind: GGMLQuantizationType) -> Array:
    """A matrix that lies on a grid as the file has it."""
    low, high = RANGES[kind.name]
    numbers = grid.places(matrix).reshape(-1, BLOCK).numpy()
    heads = [grid.step, grid.origin] if low == 0 else [grid.step]
    parts = [head.reshape(-1, BLOCK)[:, :1].numpy().astype(np.float16).view(np.uint8) for head in heads]
    if high == 127:
        parts.append(numbers.astype(np.int8).view(np.uint8))
    else:
        found = (numbers - low).astype(np.uint8)
        if high - low == 31:  # the fifth bits of all
            parts.append(np.packbits(found >> 4, axis=-1, bitorder="little"))
        parts.append((found[:, : BLOCK // 2] & np.uint8(15)) | (found[:, BLOCK // 2 :] << np.uint8(4)))
    return np.concatenate(parts, axis=-1).reshape(len(matrix), -1)

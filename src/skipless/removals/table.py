"""A norm of the embeddings goes: it is applied to each row of their table once and for all."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from skipless.algebra.affine import Affine
from skipless.algebra.forecast import Forecast, Outcome, Way
from skipless.algebra.tolerances import dtype_name
from skipless.architecture.seams import Seam
from skipless.checkpoint.opening import Read
from skipless.removals.setting import Closed, Setting, Step, whole


def close(seam: Seam, affines: dict[str, Affine], setting: Setting, read: Read) -> Closed:
    """Normalize the table's rows."""
    (norm,), (table,) = seam.writers, seam.readers
    source, dtype = setting.architecture, dtype_name(setting.stored(table))
    rows = normalize_rows(affines[table], affines.get(norm), source.norm_type, source.norm_eps)
    return {table: rows}, None, Outcome(seam.kind, seam.layer, "table", dtype, {}, {})


def forecast(
    seam: Seam,
    affines: Mapping[str, Affine],
    dtypes: Sequence[str],
    ways: Iterable[str] | None = None,
    rest_dtype: str | None = None,
    later: frozenset[str] = frozenset(),
) -> Forecast:
    """Nothing is solved for, so that nothing is lost but by rounding the table."""
    nothing: dict[str, dict[str, float]] = {dtype: {} for dtype in dtypes}
    return Forecast(seam, nothing, {"table": Way(None, None, nothing)})


def steps(seam: Seam, setting: Setting) -> Iterator[Step]:
    """None of third order: every number once."""
    return iter(())


memory = whole


def normalize_rows(table: Affine, norm: Affine | None, norm_type: str, eps: float) -> Affine:
    """The token table with a norm applied to each row, in fp64. norm: its gain, and bias if it has one."""
    rows = table.weight.double()
    if norm_type == "layer":
        rows = rows - rows.mean(1, keepdim=True)
    rows = rows * torch.rsqrt(rows.square().mean(1, keepdim=True) + eps)
    if norm is not None:
        rows = rows * norm.weight + (0 if norm.bias is None else norm.bias)
    return dataclasses.replace(table, weight=rows)

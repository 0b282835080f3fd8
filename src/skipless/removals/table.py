"""A norm of the embeddings goes: it is applied to each row of their table once and for all."""

import dataclasses

import torch

from skipless.algebra.affine import Affine
from skipless.algebra.forecast import Outcome
from skipless.algebra.tolerances import dtype_name
from skipless.architecture.seams import Seam
from skipless.checkpoint.opening import Read
from skipless.removals.setting import Closed, Setting, no_steps, nothing_lost, whole


def close(seam: Seam, affines: dict[str, Affine], setting: Setting, read: Read) -> Closed:
    """Normalize the table's rows."""
    (norm,), (table,) = seam.writers, seam.readers
    source, dtype = setting.architecture, dtype_name(setting.stored(table))
    rows = normalize_rows(affines[table], affines.get(norm), source.norm_type, source.norm_eps)
    return {table: rows}, None, Outcome(seam.kind, seam.layer, "table", dtype, {}, {})


forecast, steps, memory = nothing_lost, no_steps, whole


def normalize_rows(table: Affine, norm: Affine | None, norm_type: str, eps: float) -> Affine:
    """The token table with a norm applied to each row, in fp64. norm: its gain, and bias if it has one."""
    rows = table.weight.double()
    if norm_type == "layer":
        rows = rows - rows.mean(1, keepdim=True)
    rows = rows * torch.rsqrt(rows.square().mean(1, keepdim=True) + eps)
    if norm is not None:
        rows = rows * norm.weight + (0 if norm.bias is None else norm.bias)
    return dataclasses.replace(table, weight=rows)

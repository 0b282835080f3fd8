"""What moves on and leaves its place empty: a norm's gain and bias, K's bias and V's.

In a family's layout they become 1 and 0; in a skipless one a gain and its bias go. The identities stand in
architecture/folds.py. Each matrix is rounded once, from the product.
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from skipless.algebra.affine import Affine, read
from skipless.algebra.forecast import Outcome
from skipless.algebra.linalg import blocks, precision
from skipless.algebra.tolerances import coarsest, dtype_name
from skipless.architecture.seams import Seam
from skipless.checkpoint.opening import Read
from skipless.removals.setting import Closed, Setting, no_steps, nothing_lost


def close(seam: Seam, affines: dict[str, Affine], setting: Setting, tensor: Read) -> Closed:
    """Move what the writer holds into its readers, and leave it neutral, or, by the way "gain", leave it out."""
    (way,) = seam.identities
    dtype = dtype_name(coarsest(setting.stored(name) for name in seam.readers or seam.writers))
    (writer,) = seam.writers
    held = affines.pop(writer)
    if way in ("fold", "gain"):
        remaining = {name: _folded(held, affines.pop(name), setting.kept(name)) for name in seam.readers}
        held = dataclasses.replace(held, weight=torch.ones_like(held.weight))
    else:
        remaining = {name: _with_values(seam, held, affines.pop(name)) for name in seam.readers}
    if way != "gain":
        bias = None if held.bias is None else held.bias.clone()
        if bias is not None:
            moving(seam, bias).zero_()
        remaining[writer] = dataclasses.replace(held, bias=bias)
    return remaining, None, Outcome(seam.kind, seam.layer, way, dtype, {}, {})


def moving(seam: Seam, bias: Float[Tensor, "e"]) -> Float[Tensor, "blocks width"]:
    """Of a writer's bias, what goes: of each head of K what RoPE does not rotate; else all."""
    return bias.unflatten(0, (seam.blocks, -1))[:, -seam.width :]


def _folded(norm: Affine, reader: Affine, dtype: torch.dtype) -> Affine:
    """W -> diag(g) W in `dtype`, b -> b + c W."""
    bias = None if norm.bias is None else read(norm.bias, reader.weight)
    stored = reader.weight.T  # (outputs, inputs), as it lies in the file
    within = precision(stored.dtype, norm.weight.dtype, dtype)
    within = torch.float32 if within == torch.bfloat16 else within
    gain, folded = norm.weight.to(within), torch.empty_like(stored, dtype=dtype)
    for rows in blocks(stored):
        folded[rows] = stored[rows].to(within) * gain
    return dataclasses.replace(reader, weight=folded.T).with_bias(bias)


def _with_values(seam: Seam, values: Affine, p: Affine) -> Affine:
    """b_P -> b_P + b_V P, with each key-value head's part of b_V once for each head of its group."""
    assert values.bias is not None
    return p.with_bias(read(shared(values.bias, seam.blocks, p.weight.shape[0] // seam.width), p.weight))


def shared(values: Float[Tensor, "... e"], groups: int, heads: int) -> Float[Tensor, "... D"]:
    """Values of key-value heads, each once for each head that reads it."""
    return values.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, -2).flatten(-2)


forecast, steps = nothing_lost, no_steps


def memory(seam: Seam, setting: Setting) -> float:
    """What comes out; and two copies of each tensor, for those that are a part of a fused one."""
    names = [name for name in seam.modules if name in setting.modules and f"{name}.weight" in setting.outputs]
    return float(sum(setting.size(name) * setting.kept(name).itemsize + 2 * setting.info(name).bytes for name in names))

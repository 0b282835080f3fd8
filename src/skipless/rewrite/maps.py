"""Are a family's maps the same after what its norms and biases hold has moved? In fp64, a tensor at a time.

Each matrix that reads a norm is given the same random normalized vectors n before and after, through the norm's gain
and bias: (n g + c) W + b must not change. Where K's bias went, what must not change of k is how tokens differ; where
V's went, what P makes of v. What else the model does, its other tensors do, which are copied.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from skipless.algebra.linalg import product
from skipless.algebra.rounding import rounding_error, subnormal_power
from skipless.algebra.tolerances import tolerance
from skipless.architecture.config import Architecture
from skipless.architecture.graph import graph
from skipless.architecture.seams import Seam
from skipless.checkpoint.canonical import Canonical, keeping
from skipless.checkpoint.family import Layout, laid_out
from skipless.checkpoint.opening import RowReader
from skipless.checkpoint.reader import CheckpointReader
from skipless.removals.neutral import shared
from skipless.rewrite.planning import Plan
from skipless.rewrite.probe import (
    EXACT,
    SLACK,
    TOKENS,
    Checked,
    Difference,
    chance,
    expect_explained,
    generator_of,
    spoiled,
    stored_in,
)


def check_moved(plan: Plan, source: RowReader, written: CheckpointReader) -> Checked:
    """Compare the maps of a plan's source and result, and what they may differ by.

    Raises BugError naming the first that is off by more than rounding explains: what was written is another function.
    """
    assert plan.layout is not None
    seams = [seam for task in plan.tasks for seam in task.seams]
    laid_out(written)  # what config.json promises
    compared = list(compare(plan.layout, seams, source, written, stored_in(plan.outputs)))
    differences = tuple(
        Difference(each.name, each.error, math.hypot(EXACT, SLACK * explained)) for each, explained in compared
    )
    expect_explained(differences, "rounding explains")
    return Checked(differences, tuple(each for each, _ in compared if not each.passed))


def compare(
    layout: Layout, seams: Sequence[Seam], source: RowReader, written: RowReader, stored: torch.dtype
) -> Iterator[tuple[Difference, float]]:
    """Every map around these seams: how far apart the two checkpoints' are, and what rounding the result explains.

    A map's limit is what storing the source in the same dtype may lose.
    """
    architecture = layout.architecture
    sides = (maps(layout, seams, reader, stored) for reader in (source, written))
    for (name, before, lossy), (_, after, rounded) in zip(*sides, strict=True):
        scale = before.norm().item()
        off, own, explained = ((a - b).norm().item() for a, b in ((after, before), (lossy, before), (rounded, after)))
        error = off / scale if scale else math.inf if off else 0.0
        allowed = own / scale * chance(min(before.shape[1], architecture.hidden_size)) if scale else 0.0
        limit = max(tolerance(stored, allowed), EXACT)
        yield Difference(name, error, limit), explained / scale if scale else 0.0


@torch.no_grad()
def maps(
    layout: Layout, seams: Sequence[Seam], reader: RowReader, stored: torch.dtype
) -> Iterator[tuple[str, Float[Tensor, "tokens outputs"], Float[Tensor, "tokens outputs"]]]:
    """What each matrix around these seams gives: its name, exactly, and with weights off as by storing them so."""
    architecture, moved = layout.architecture, {seam.writers[0]: seam for seam in seams}
    touched = {name for seam in seams for name in seam.modules}
    tensors = Canonical(reader.tensors, keeping(reader.tensor, layout), layout)
    for module, norms in _reading(architecture, touched):
        n = _drawn((TOKENS, architecture.hidden_size), f"stream of {module}")
        x = n.repeat(2, 1)
        for norm in norms[:1]:
            bias = f"{norm}.bias"
            x = x * tensors.tensor(f"{norm}.weight").double().cpu()
            x = x + tensors.tensor(bias).double().cpu() if bias in tensors.tensors else x
        y, name = _apply(tensors, module, x, stored), module
        if module in moved and module.endswith("k_proj"):  # whose bias cancels where RoPE does not rotate
            for half in y.chunk(2):
                others = half.unflatten(-1, (-1, architecture.head_dim))[..., architecture.rotated :]
                others -= others.mean(0)
        elif module in moved:
            (name,) = moved[module].readers
            heads = shared(y, architecture.num_key_value_heads, architecture.num_attention_heads)
            y = _apply(tensors, name, heads, stored)
        exact, lossy = y.chunk(2)
        yield name, exact, lossy


def _reading(architecture: Architecture, touched: set[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The matrices that read the stream and are touched, or a norm is that they read it through, with these norms."""
    for port in (port for space in graph(architecture).spaces for port in space.readers):
        if not touched.isdisjoint((port.module, *port.norms)):
            yield port.module, port.norms


def _apply(tensors: Canonical, module: str, x: Float[Tensor, "n d"], stored: torch.dtype) -> Float[Tensor, "n m"]:
    """The map x W + b, of the second half of x as if W and b were rounded; small numbers as if they were larger."""
    exact, second = x.chunk(2)
    rounding, floor = rounding_error(stored), math.sqrt(subnormal_power(stored))
    off = spoiled(x, rounding, generator_of(f"rounding {module}"))
    y = product(tensors.tensor(f"{module}.weight").cpu(), off.T, torch.float64, torch.float64).T
    below = _drawn(y[len(exact) :].shape, f"rounding {module}'s smallest")
    y[len(exact) :] += rounding * floor * second.norm(dim=1, keepdim=True) * below
    if f"{module}.bias" in tensors.tensors:
        bias = tensors.tensor(f"{module}.bias").double().cpu()
        y = spoiled(y + bias, rounding, generator_of(f"rounding {module}'s bias"), bias)
    return y


def _drawn(shape: Sequence[int], name: str) -> Tensor:
    """Random numbers, always the same for a name."""
    return torch.randn(*shape, generator=generator_of(name), dtype=torch.float64)

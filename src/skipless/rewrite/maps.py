"""Are a family's maps the same after what its norms and biases hold has moved? In fp64, a tensor at a time.

Each matrix that reads a norm is given the same random normalized vectors n before and after, through the norm's gain
and bias: (n g + c) W + b must not change. Where K's bias went, what must not change of k is how tokens differ; where
V's went, what P makes of v. What else the model does, its other tensors do, which are copied.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor

from skipless.algebra.linalg import product
from skipless.algebra.rounding import rounding_error
from skipless.algebra.tolerances import coarsest, tolerance
from skipless.architecture.config import Architecture
from skipless.architecture.graph import graph
from skipless.architecture.seams import Seam
from skipless.checkpoint.canonical import Canonical
from skipless.checkpoint.family import Layout, laid_out
from skipless.checkpoint.opening import RowReader
from skipless.checkpoint.reader import CheckpointReader
from skipless.errors import BugError
from skipless.removals.neutral import shared
from skipless.rewrite.planning import Plan
from skipless.rewrite.probe import EXACT, SLACK, Checked, Difference, chance, tokens_of


def check_moved(plan: Plan, source: RowReader, written: CheckpointReader) -> Checked:
    """Compare the maps of a plan's source and result, and what they may differ by.

    Raises BugError naming the first that is off by more than rounding explains: what was written is another function.
    """
    assert plan.layout is not None
    seams = [seam for task in plan.tasks for seam in task.seams]
    stored = coarsest(info.dtype for info in plan.outputs.values() if not info.is_index)
    laid_out(written)  # what config.json promises
    differences, losses = [], []
    for each, own, explained in compare(plan.layout, seams, source, written, stored):
        most = math.hypot(EXACT, SLACK * explained)
        differences.append(Difference(each.name, each.error, most))
        if not differences[-1].passed:
            raise BugError(
                f"{each.name}: expected to differ from the source's by at most {most:.1e}, as rounding explains, found "
                f"{each.error:.1e}; nothing was published"
            )
        losses.append(Difference(each.name, each.error, max(tolerance(stored, own), EXACT)))
    return Checked(tuple(differences), tuple(each for each in losses if not each.passed))


def compare(
    layout: Layout, seams: Sequence[Seam], source: RowReader, written: RowReader, stored: torch.dtype
) -> Iterator[tuple[Difference, float, float]]:
    """Of every map around these seams: how far apart the two are, beside what may be lost by storing the source so; and
    what rounding makes of each by itself, of the source's and of what was written.
    """
    architecture = layout.architecture
    sides = (maps(layout, seams, reader, rounding_error(stored)) for reader in (source, written))
    for (name, before, spoiled), (_, after, rounded) in zip(*sides, strict=True):
        scale = before.norm().item()
        off, own, explained = ((a - b).norm().item() for a, b in ((after, before), (spoiled, before), (rounded, after)))
        error = off / scale if scale else math.inf if off else 0.0
        allowed = own / scale * chance(min(before.shape[1], architecture.hidden_size)) if scale else 0.0
        limit = max(tolerance(stored, allowed), EXACT)
        yield Difference(name, error, limit), allowed, explained / scale if scale else 0.0


@torch.no_grad()
def maps(
    layout: Layout, seams: Sequence[Seam], reader: RowReader, rounding: float
) -> Iterator[tuple[str, Float[Tensor, "tokens outputs"], Float[Tensor, "tokens outputs"]]]:
    """What each matrix around these seams gives: its name, exactly, and with weights off by so much at random."""
    architecture, moved = layout.architecture, {seam.writers[0]: seam for seam in seams}
    touched = {name for seam in seams for name in seam.modules}
    tensors = Canonical(reader.tensors, lru_cache(2)(reader.tensor), layout)
    for module, norms in _reading(architecture, touched):
        n = _drawn((tokens_of(architecture), architecture.hidden_size), f"stream of {module}")
        x = n.repeat(2, 1)
        for norm in norms[:1]:
            bias = f"{norm}.bias"
            x = x * tensors.tensor(f"{norm}.weight").double().cpu()
            x = x + tensors.tensor(bias).double().cpu() if bias in tensors.tensors else x
        y, name = _apply(tensors, module, x, rounding), module
        if module in moved and module.endswith("k_proj"):
            y = torch.cat([half - half.mean(0) for half in y.chunk(2)])
        elif module in moved:
            (name,) = moved[module].readers
            heads = shared(y, architecture.num_key_value_heads, architecture.num_attention_heads)
            y = _apply(tensors, name, heads, rounding)
        exact, spoiled = y.chunk(2)
        yield name, exact, spoiled


def _reading(architecture: Architecture, touched: set[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The matrices that read the stream and are touched, or a norm is that they read it through, with these norms."""
    for port in (port for space in graph(architecture).spaces for port in space.readers):
        if not touched.isdisjoint((port.module, *port.norms)):
            yield port.module, port.norms


def _apply(tensors: Canonical, module: str, x: Float[Tensor, "n d"], rounding: float) -> Float[Tensor, "n m"]:
    """The map x W + b, of the second half of x as if W and b were rounded."""
    exact, second = x.chunk(2)
    noise = _drawn(second.shape, f"rounding {module}")
    off = torch.cat([exact, second * (1 + rounding * noise)])
    y = product(tensors.tensor(f"{module}.weight").cpu(), off.T, torch.float64, torch.float64).T
    if f"{module}.bias" in tensors.tensors:
        bias = tensors.tensor(f"{module}.bias").double().cpu()
        y = y + bias
        y[len(exact) :] += rounding * bias * _drawn(y[len(exact) :].shape, f"rounding {module}'s bias")
    return y


def _drawn(shape: Sequence[int], name: str) -> Tensor:
    """Random numbers, always the same for a name."""
    generator = torch.Generator().manual_seed(crc32(name.encode()))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)

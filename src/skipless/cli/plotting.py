"""Condition numbers and speeds as pictures (matplotlib, the [report] extra)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from skipless.errors import InputError
from skipless.reports.auditing import Audit
from skipless.serving.bench import Bench

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
MARKERS = {"q": "o", "k": "s", "v": "^", "p": "D"}
HALF_AND_SINGLE = ("bfloat16", "float16", "float32")


def limit(dtype: str) -> float:
    """The condition number from which on an inverse stored in `dtype` may have no correct digit: 1 / u, u = eps / 2."""
    return 2 / torch.finfo(getattr(torch, dtype)).eps


def check(file: Path) -> None:
    """Raise InputError if a picture could not be written into this file."""
    if file.suffix not in FORMATS or not file.absolute().parent.is_dir():
        names = " or ".join("*" + name for name in FORMATS)
        raise InputError(f"--plot: expected a file named {names} in a folder that exists, found {file}")
    if find_spec("matplotlib") is None:
        raise InputError("--plot: needs the [report] extra; pip install 'skipless[report]'")


def plot_conditions(audit: Audit, file: Path, title: str) -> None:
    """Condition numbers of Q, K, V and P by layer on a log axis, and the limits of dtypes, into a file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for letter, marker in MARKERS.items():
        conditions = {seam.layer: seam.matrices[letter].condition for seam in audit.seams if letter in seam.matrices}
        if conditions:
            axes.plot(list(conditions), list(conditions.values()), marker=marker, label=letter.upper())
    ways = {seam.layer: seam.ways["pivoted"] for seam in audit.seams if "pivoted" in seam.ways}
    if pivoted := {layer: way.condition for layer, way in ways.items() if way.condition is not None}:
        axes.plot(list(pivoted), list(pivoted.values()), linestyle="--", color="gray", label="pivoted (1-norm)")
    for dtype in HALF_AND_SINGLE:
        axes.axhline(limit(dtype), color="black", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"1 / u, {dtype}",
            (1, limit(dtype)),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize="x-small",
        )
    axes.set(yscale="log", xlabel="layer", ylabel="condition number", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, file, title)


def plot_speeds(bench: Bench, file: Path) -> None:
    """Tokens/s of each model and batch as bars, under the ceiling that reading its weights sets, into a file."""
    from matplotlib.figure import Figure

    batches = bench.work.batches
    title = f"greedy decoding, {bench.engine}, {bench.dtype}, {bench.bandwidth / 1e9:.0f} GB/s"
    figure = Figure(figsize=(max(5, 1.8 * len(bench.speeds) * len(batches)), 4), layout="constrained")
    names = [Path(speed.name).name for speed in bench.speeds]
    by_batch = zip(*(speed.decoding for speed in bench.speeds), strict=True)
    for axes, decodings in zip(figure.subplots(1, len(batches), squeeze=False)[0], by_batch, strict=True):
        axes.bar(names, [decoding.ceiling for decoding in decodings], color="lightgray", label="ceiling")
        bars = axes.bar(names, [decoding.tokens_per_second for decoding in decodings], width=0.6, label="measured")
        axes.bar_label(bars, [f"{d.tokens_per_second:,.1f}\n{d.speedup:.2f}x" for d in decodings], label_type="center")
        axes.set(ylabel="tokens/s", xlabel=f"batch {decodings[0].batch}")
    axes.legend(loc="lower right")
    figure.suptitle(title)
    _save(figure, file, title)


def _save(figure: Figure, file: Path, title: str) -> None:
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):  # small, and the same each time
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)

"""One HTML page that needs nothing else: what `skipless report` shows, with plots that answer to the pointer."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from skipless import __version__
from skipless.cli import tables
from skipless.cli.output import plain
from skipless.cli.plotting import HALF_AND_SINGLE, limit
from skipless.reports.auditing import Audit
from skipless.reports.overview import Overview

# Of what a seam's errors are relative errors.
OUTPUTS = {"stream": "q, k, v", "values": "P's outputs", "p": "M's outputs", "head": "logits"}


@dataclass(frozen=True)
class View:
    """What a plot shows at a time.

    lines: name -> layer -> value, on a log axis. marks: name -> value, as lines across the plot.
    """

    name: str
    lines: Mapping[str, Mapping[int, float]]
    marks: Mapping[str, float]


@dataclass(frozen=True)
class Plot:
    """A plot by layer, of one or several views, and what it means."""

    title: str
    text: str
    views: tuple[View, ...]


def render(overview: Overview) -> str:
    """The page. Every text in it that comes from a model is escaped."""
    environment = Environment(
        loader=PackageLoader("skipless.cli", "page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    plots = list(_plots(overview))
    page: str = environment.get_template("report.html").render(
        overview=overview,
        version=__version__,
        plots=plots,
        data=plain([asdict(plot) for plot in plots]),
        largest=max(map(max, overview.parts.values())),
        audit_lines=[str(line) for line in tables.audit_lines(overview.audit)],
        report_lines=list(tables.report_lines(overview.report)),
        number=_number,
        zip=zip,
    )
    return page


def _plots(overview: Overview) -> Iterator[Plot]:
    audit = overview.audit
    lines: dict[str, dict[int, float]] = {}
    for seam in audit.seams:
        for letter, matrix in seam.matrices.items():
            lines.setdefault(letter.upper(), {})[seam.layer] = matrix.condition
        if (way := seam.ways.get("pivoted")) and way.condition is not None:
            lines.setdefault("pivoted", {})[seam.layer] = way.condition
    yield Plot(
        "Condition numbers",
        "Of each matrix, and of the columns that pivoting chooses. Above 1 / u of a dtype, an inverse that is plainly "
        "stored in it may have no correct digit.",
        (View("all", lines, {f"1 / u, {dtype}": limit(dtype) for dtype in HALF_AND_SINGLE}),),
    )
    for kind in OUTPUTS:
        if views := tuple(_errors(audit, kind, overview.stored.get(kind, {}))):
            yield Plot(
                f"Errors of {OUTPUTS[kind]}",
                "Relative errors to expect where the model is stored in a dtype: the original's own, and those of each "
                "way to close the seam."
                + " Dashed: what fuse has measured while it wrote."
                * (kind in overview.stored),
                views,
            )


def _errors(audit: Audit, kind: str, stored: Mapping[int, float]) -> Iterator[View]:
    """A view for each dtype, first the one that the seams are stored in."""
    seams = [seam for seam in audit.seams if seam.kind == kind and seam.ways]
    kept = {dtype for seam in seams for dtype in seam.stored.values()}
    dtypes = dict.fromkeys(dtype for seam in seams for dtype in seam.original)
    for dtype in sorted(dtypes, key=lambda dtype: dtype not in kept):
        lines = {"original": {seam.layer: max(seam.original[dtype].values()) for seam in seams}}
        for way in dict.fromkeys(way for seam in seams for way in seam.ways):
            name = {"p": "merged", "head": "pivoted"}.get(way, way)
            lines[name] = {seam.layer: seam.ways[way].worst(dtype) for seam in seams if way in seam.ways}
        yield View(dtype, {**lines, **({"as written": stored} if stored and dtype in kept else {})}, {})


def _number(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "infinite"

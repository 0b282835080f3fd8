"""`skipless report`."""

import dataclasses
import os
import sys
from pathlib import Path

import click

from skipless.cli.options import as_json
from skipless.cli.output import out, print_json, step_bar, waiting
from skipless.errors import InputError


@click.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("fused", metavar="DST", type=click.Path(path_type=Path))
@click.option("--html", "page", metavar="FILE", required=True, type=click.Path(path_type=Path), help="To write it to.")
@click.option("--prompt", help="Text for both to continue, if SRC has a tokenizer.")
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens that they write.")
@as_json
def report(source: Path, fused: Path, page: Path, prompt: str | None, tokens: int, as_json: bool) -> None:
    """Write one HTML page about DST, which fuse has made of SRC: audit, verify and both at work.

    It has what went, by matrix; condition numbers and errors by layer, as plots; the verdict; what both models write.
    It needs no network, and no other file.
    """
    with waiting("starting"):
        from skipless.checkpoint import files
        from skipless.cli.page import render
        from skipless.reports import overview, verification

    place = Path(os.path.realpath(page))
    if page.is_dir() or not place.parent.is_dir():
        raise InputError(f"--html: expected a file in a folder that exists, found {page}")
    if any(place.is_relative_to(os.path.realpath(folder)) for folder in (source, fused)):
        raise InputError(f"--html: expected a file outside of SRC and DST, which stay as they are, found {page}")
    with step_bar("reporting") as progress:
        summary = overview.overview(
            source,
            fused,
            prompt=verification.DEFAULT_PROMPT if prompt is None else prompt,
            tokens=tokens,
            progress=progress,
        )
    files.replace(place, [render(summary).encode()])
    if as_json:
        print_json(dataclasses.asdict(summary))
    else:
        out.print(f"{summary.report.note}; wrote {page}", soft_wrap=True)
    sys.exit(0 if summary.report.same else 1)

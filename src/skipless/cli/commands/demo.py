"""`skipless demo`."""

import dataclasses
import sys

import click

from skipless.cli.options import as_json
from skipless.cli.output import err, out, print_json, waiting


@click.command()
@as_json
def demo(as_json: bool) -> None:
    """Generate with the bundled model, fuse it, verify, generate again: what was saved, and how fast."""
    with waiting("starting"):
        from skipless.cli import demo as room
        from skipless.cli import tables

    result = room.demo(err.print_lines)
    if as_json:
        before, after = result.plan.parameters
        print_json(
            {
                "parameters_before": before,
                "parameters_after": after,
                "same_tokens": result.same_tokens,
                "caches": result.caches,
                "bench": dataclasses.asdict(result.bench),
                "verify": dataclasses.asdict(result.report),
            }
        )
    else:
        out.print_table(tables.report_table(result.report))
        out.print(result.report.note, soft_wrap=True)
        out.print_table(tables.demo_table(result))
        for problem in filter(None, result.caches):
            out.print(f"a broken cache: {problem}", soft_wrap=True)
    sys.exit(0 if result.report.same and result.same_tokens and not any(result.caches) else 1)

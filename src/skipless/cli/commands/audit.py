"""`skipless audit`."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from skipless.cli.options import as_json, expect_weights, parse_removal, removal_options
from skipless.cli.output import count_bar, out, print_json, tell_of_other_model_files, waiting


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@removal_options
@click.option("--plot", type=click.Path(path_type=Path), help="Condition numbers by layer, as a .png or .svg.")
@as_json
def audit(model: Path, plot: Path | None, as_json: bool, **removal: Any) -> None:
    """What can be removed from MODEL, and at what loss?

    MODEL is a model folder of any family that is known, or a GGUF file. Where its skips and norms block what is asked
    for, the losses are those of a model with the same matrices and without them.

    For every layer: condition numbers of Q, K, V and P, and the relative errors of q, k, v and of M's outputs to expect
    from each way to remove them, stored in each dtype, beside the original's own.
    """
    expect_weights(model)
    with waiting("starting"):
        from skipless.cli import plotting, tables
        from skipless.reports import auditing

    options = parse_removal(**removal)
    if plot is not None:
        plotting.check(plot)
    tell_of_other_model_files(model)
    with count_bar("auditing") as progress:
        audited = auditing.audit(model, progress=progress, **options)
    if plot is not None:
        plotting.plot_conditions(audited, plot, f"{model.resolve().stem}: condition numbers")
    if as_json:
        print_json({**dataclasses.asdict(audited), "safe": audited.safe})
    else:
        for table in tables.audit_tables(audited):
            out.print_table(table)
        for line in tables.audit_lines(audited):
            out.print(line, soft_wrap=True)
    sys.exit(0 if audited.safe else 1)

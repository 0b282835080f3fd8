"""`skipless count`."""

import csv
import sys

import click

from skipless.cli.options import as_json, known_names
from skipless.cli.output import out, print_json, waiting
from skipless.errors import InputError
from skipless.reports.counting import PAPERS, WEIGHT_BYTES


@click.command("count")
@click.argument("models", nargs=-1, metavar="[CONFIG|FOLDER|NAME ...]", shell_complete=known_names)
@click.option(
    "--paper",
    type=click.Choice(PAPERS),
    is_flag=False,
    flag_value=PAPERS[0],
    help="The tables of arXiv:2404.12362, or of this paper, counted again.",
)
@click.option("--list", "listed", is_flag=True, help="The names that are known.")
@click.option(
    "--dtype", type=click.Choice(tuple(WEIGHT_BYTES)), default="bfloat16", show_default=True, help="Of the weights."
)
@click.option(
    "--cache-dtype",
    type=click.Choice(tuple(WEIGHT_BYTES)),
    default="bfloat16",
    show_default=True,
    help="Of the KV cache.",
)
@click.option("--context", type=click.IntRange(0), default=0, show_default=True, help="Tokens in the cache.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences decoded at once.")
@click.option("--bandwidth", type=click.FloatRange(0, min_open=True), help="GB/s, with --flops: a roofline.")
@click.option("--flops", type=click.FloatRange(0, min_open=True), help="Peak TFLOP/s, with --bandwidth.")
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated values instead of a table.")
@click.option("--markdown", "as_markdown", is_flag=True, help="A Markdown table.")
@as_json
def count_command(
    models: tuple[str, ...],
    paper: str | None,
    listed: bool,
    dtype: str,
    cache_dtype: str,
    context: int,
    batch: int,
    bandwidth: float | None,
    flops: float | None,
    as_csv: bool,
    as_markdown: bool,
    as_json: bool,
) -> None:
    """Weights of models, what removing some would save, and how much faster decoding could be.

    Of each: what the paper removes if the model is trained so, what rewriting a skipless version would remove exactly,
    what could go at most, and what can go from the model as it is.
    """
    from skipless.cli import tables
    from skipless.reports import counting as room

    if sum([bool(models), paper is not None, listed]) != 1:
        raise InputError("count: expected models, or --paper, or --list")
    if (bandwidth is None) != (flops is None):
        raise InputError("count: expected --bandwidth and --flops together, or neither")
    if listed and (as_csv or as_markdown or as_json):
        raise InputError("count: expected --list alone, found a format beside it; leave it out")
    if listed:
        known = room.table()
        out.print(f"as of {known['date']}: {', '.join(known['models'])}")
        return
    conditions = room.Conditions(
        dtype, cache_dtype, context, batch, bandwidth and bandwidth * 1e9, flops and flops * 1e12
    )
    if paper and conditions != room.Conditions():
        raise InputError("count: expected --paper alone, as its tables say for what they hold, found --batch or others")
    first = paper == PAPERS[1]
    if paper:
        pairs = room.paper(room.FIRST_LAYER if first else room.PAPER)
        counts = [counted for counted, _ in pairs]
        tabulated = tables.first_layer_paper(pairs) if first else [tables.paper_rows(pairs)]
        notes = tables.paper_notes(pairs, first)
    else:
        with waiting("starting"):  # torch is imported for folders alone
            counts = [room.count(model, conditions) for model in models]
        tabulated, notes = [tables.count_rows(counts, batch)], tables.count_notes(counts, conditions)
    if as_json:
        print_json({"models": [counted.to_json() for counted in counts]})
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for number, rows in enumerate(tabulated):
        if number and (as_csv or as_markdown):
            click.echo()
        if as_csv:
            writer.writerows(rows)
        elif as_markdown:
            click.echo(tables.markdown(rows))
        else:
            out.print_table(tables.count_table(rows))
    if not (as_csv or as_markdown):
        for note in notes:
            out.print(note, soft_wrap=True)

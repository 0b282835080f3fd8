"""`skipless eval`."""

import dataclasses
from pathlib import Path

import click

from skipless.cli.options import as_json
from skipless.cli.output import count_bar, out, print_json, waiting
from skipless.dtypes import DTYPE_NAMES
from skipless.errors import extra


@click.command("eval")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", multiple=True, required=True, metavar="PATTERN", help="Files as in a recipe's data.files.")
@click.option("--field", default="text", show_default=True, help="The field of rows that holds the text.")
@click.option("--sequence-length", type=click.IntRange(2), help="[default: 1024, or what the model has positions for]")
@click.option("--tokens", type=click.IntRange(2), help="As many at most.")
@click.option("--dtype", type=click.Choice(DTYPE_NAMES), default="float32", show_default=True, help="To compute in.")
@as_json
def eval_command(
    model: Path,
    data: tuple[str, ...],
    field: str,
    sequence_length: int | None,
    tokens: int | None,
    dtype: str,
    as_json: bool,
) -> None:
    """How well MODEL, a folder that transformers loads, predicts a text: loss, bits a byte, perplexity."""
    with extra("train"), waiting("starting"):
        import torch

        from skipless.train.evaluation import evaluate

    with count_bar("evaluating") as progress:
        result = evaluate(
            model,
            data,
            field=field,
            sequence_length=sequence_length,
            most_tokens=tokens,
            dtype=getattr(torch, dtype),
            progress=progress,
        )
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.3f} bits a byte, "
        line = f"{result.loss:.3f} nats a token, {bits}perplexity {result.perplexity:,.1f}, on {result.tokens:,} tokens"
        out.print(line, soft_wrap=True)

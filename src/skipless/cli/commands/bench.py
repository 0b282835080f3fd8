"""`skipless bench`."""

import dataclasses
import sys
from pathlib import Path

import click

from skipless.cli.options import as_json
from skipless.cli.output import count_bar, out, print_json, tell_of_other_model_files, waiting
from skipless.dtypes import DTYPE_NAMES
from skipless.serving.engines import ENGINES


@click.command()
@click.argument("models", nargs=-1, metavar="[A B ...]", type=click.Path(path_type=Path))
@click.option("--shape", metavar="NAME", help="Random models of this shape (as count takes it), original and fused.")
@click.option("--layers", type=click.IntRange(1), help="So many layers of the shape [default: all].")
@click.option("--engine", type=click.Choice(list(ENGINES)), default="torch", show_default=True, help="Who runs.")
@click.option(
    "--dtype",
    type=click.Choice([*DTYPE_NAMES, "int8", "int4"]),
    default="float32",
    show_default=True,
    help="What to run in; int8 and int4: OpenVINO, which rounds the weights first.",
)
@click.option("--compile", "compiled", is_flag=True, help="torch: compiled, with packed weights (twice the memory).")
@click.option(
    "--batch", "batches", type=click.IntRange(1), multiple=True, help="Sequences at once, repeatable [default: 1]."
)
@click.option("--context", type=click.IntRange(1), default=128, show_default=True, help="Tokens before the decoded.")
@click.option("--tokens", type=click.IntRange(2), default=32, show_default=True, help="Tokens decoded per round.")
@click.option("--prefill", type=click.IntRange(0), default=512, show_default=True, help="Tokens of a long prompt.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Interleaved rounds.")
@click.option("--plot", type=click.Path(path_type=Path), help="Bars against the ceiling, as a .png or .svg.")
@as_json
def bench(
    models: tuple[Path, ...],
    shape: str | None,
    layers: int | None,
    engine: str,
    dtype: str,
    compiled: bool,
    batches: tuple[int, ...],
    context: int,
    tokens: int,
    prefill: int,
    rounds: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Time greedy decoding and prompts of models A, B, ... in turns, beside what the machine's memory allows.

    Each model runs in a process of its own. Ratios are those of a round, and what is printed is their median.
    """
    with waiting("starting"):
        from skipless.cli import plotting, tables
        from skipless.serving import bench as room

    if plot is not None:
        plotting.check(plot)
    tell_of_other_model_files(*models)
    work = room.Work(batches or (1,), context, tokens, prefill)
    with count_bar("timing") as progress:
        timed = room.bench(
            models,
            shape=shape,
            layers=layers,
            engine=engine,
            dtype=dtype,
            compiled=compiled,
            work=work,
            rounds=rounds,
            progress=progress,
        )
    if plot is not None:
        plotting.plot_speeds(timed, plot)
    if as_json:
        print_json(dataclasses.asdict(timed))
    else:
        out.print(tables.bench_line(timed), soft_wrap=True)
        out.print_table(tables.bench_table(timed))
        for name, problem in timed.broken_caches.items():
            out.print(f"a broken cache: {name}: {problem}", soft_wrap=True)
    sys.exit(1 if timed.broken_caches else 0)

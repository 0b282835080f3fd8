"""`skipless verify`."""

import dataclasses
import sys
from pathlib import Path

import click

from skipless.cli.options import as_json
from skipless.cli.output import err, out, print_json, step_bar, waiting
from skipless.dtypes import DTYPE_NAMES
from skipless.errors import InputError


@click.command()
@click.argument("a", metavar="A", type=click.Path(path_type=Path))
@click.argument("b", metavar="[B]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(DTYPE_NAMES),
    help="Dtypes to run in beside float64 and the one B is stored in, repeatable [default: float32, bfloat16].",
)
@click.option("--prompt", help="Text to compare on and to continue, if A has a tokenizer.")
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Random tokens, and greedy tokens to generate.",
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Of the random tokens.")
@click.option("--full", is_flag=True, help="Run every token, every position, and a context beyond the window.")
@click.option("--card", is_flag=True, help="If they are, write it into B's model card, which fuse has written.")
@as_json
def verify(
    a: Path,
    b: Path | None,
    dtypes: tuple[str, ...],
    prompt: str | None,
    tokens: int,
    seed: int,
    full: bool,
    card: bool,
    as_json: bool,
) -> None:
    """Are A and B (made from A) the same function?

    Files are compared as data, tensors one by one, and both models are run. A may be a GGUF file. Of A alone, which
    fuse has written: is it still what was written, by the SHA-256 in its skipless.json?
    """
    with waiting("starting"):
        from skipless.cli import tables
        from skipless.reports import verification

    if b is None and card:
        raise InputError(f"--card: expected A and B, found {a} alone; name the model that it was made of, too")
    if b is None:
        with waiting("reading"):
            changed = verification.verify_record(a)
        if as_json:
            print_json({"same": not changed, "differences": changed})
        else:
            for line in changed or (f"{a}: every file is as it was written",):
                out.print(line, soft_wrap=True)
        sys.exit(1 if changed else 0)
    with step_bar("verifying") as advance:
        report = verification.verify(
            a,
            b,
            dtypes=dtypes or verification.DEFAULT_DTYPES,
            prompt=verification.DEFAULT_PROMPT if prompt is None else prompt,
            tokens=tokens,
            seed=seed,
            full=full,
            progress=advance,
        )
    if card and report.same:
        try:
            verification.write_verdict(report, a, b)
        except (InputError, OSError) as error:  # the answer is the same without it
            err.print(f"--card: nothing was written: {error}", soft_wrap=True)
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        out.print_table(tables.report_table(report))
        for line in tables.report_lines(report):
            out.print(line, soft_wrap=True)
    sys.exit(0 if report.same else 1)

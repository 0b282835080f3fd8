"""`skipless train`."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from skipless.cli.options import as_json
from skipless.cli.output import err, out, print_json, waiting
from skipless.errors import INTERRUPTED, extra
from skipless.log import is_first

if TYPE_CHECKING:
    from skipless.train.estimate import TrainingEstimate


class WithFields(click.Command):
    """Ends its help with the fields of a recipe."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from skipless.train.recipe import described

        super().format_epilog(ctx, formatter)
        with formatter.section("Fields of a recipe"):
            formatter.write_dl(
                [(name, f"{about} [default: {default}]" if default else about) for name, default, about in described()]
            )


@click.command(cls=WithFields)
@click.argument("recipe")
@click.argument("out_folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), help="A config.json instead of the recipe's [model].")
@click.option("--steps", type=click.IntRange(1), help="As many steps instead of the recipe's.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in OUT; at the end, with more --steps.")
@click.option("--dry-run", is_flag=True, help="Only say what it would take: memory, tokens, FLOPs. Writes nothing.")
@click.option("--processes", type=click.IntRange(1), help="With --dry-run: how many. [default: 1]")
@as_json
def train(
    recipe: str,
    out_folder: Path,
    model: Path | None,
    steps: int | None,
    resume: bool,
    dry_run: bool,
    processes: int | None,
    as_json: bool,
) -> None:
    """Train a skipless model by RECIPE (a TOML file, or a bundled name: stdlib, 7b) into the folder OUT."""
    if processes is not None and not dry_run:
        raise click.UsageError("--processes: expected --dry-run beside it; torchrun starts processes")
    with extra("train"), waiting("starting"):
        from skipless.train.recipe import Recipe
        from skipless.train.run import CHECKPOINTS, RECIPE
        from skipless.train.run import train as run

    read = Recipe.read(recipe, model)
    if steps is not None:
        read = dataclasses.replace(read, steps=steps)
    if dry_run:
        with waiting("estimating"):
            from skipless.train.estimate import estimate

            found = estimate(read, processes or 1)
        tell(found, as_json)
        return
    try:
        result = run(read, out_folder, resume=resume, waiting=waiting)
    except KeyboardInterrupt:
        if is_first() and (out_folder / CHECKPOINTS / RECIPE).is_file():
            changed = {"--model": model, "--steps": steps}
            options = [word for name, value in changed.items() if value is not None for word in (name, str(value))]
            command = shlex.join(["skipless", "train", recipe, str(out_folder), *options, "--resume"])
            err.print(f"interrupted; go on with: {command}", soft_wrap=True)
        sys.exit(INTERRUPTED)
    if not is_first():
        return
    if as_json:
        print_json(result)
    else:
        bits = result["bits_per_byte"]
        more = "" if bits is None else f", {bits:.3f} bits a byte"
        out.print(f"held out: {result['held_out_loss']:.3f} nats a token{more}", soft_wrap=True)


def tell(estimate: "TrainingEstimate", as_json: bool) -> None:
    """Print an estimate."""
    total = sum(estimate.memory.values())
    if as_json:
        print_json(dataclasses.asdict(estimate) | {"memory_total": total})
        return
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in estimate.memory.items())
    out.print(f"weights: {estimate.parameters:,}", soft_wrap=True)
    line = f"tokens: {estimate.tokens_per_step:,} a step, {estimate.tokens:,} in all: {estimate.flops:.1e} FLOPs"
    out.print(line, soft_wrap=True)
    out.print(f"memory a process: {total / 1e9:.1f} GB ({parts})", soft_wrap=True)

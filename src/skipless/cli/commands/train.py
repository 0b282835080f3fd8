"""`skipless train`."""

import sys
from pathlib import Path

import click

from skipless.cli.options import as_json
from skipless.cli.output import err, out, print_json
from skipless.errors import INTERRUPTED, extra


@click.command()
@click.argument("recipe")
@click.argument("out_folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in OUT.")
@as_json
def train(recipe: str, out_folder: Path, resume: bool, as_json: bool) -> None:
    """Train a skipless model by RECIPE (a TOML file, or a bundled name: stdlib) into the folder OUT."""
    with extra("train"):
        from skipless.train.recipe import Recipe
        from skipless.train.run import is_first
        from skipless.train.run import train as run

    try:
        result = run(Recipe.read(recipe), out_folder, resume=resume)
    except KeyboardInterrupt:
        err.print(f"interrupted; go on with: skipless train {recipe} {out_folder} --resume", soft_wrap=True)
        sys.exit(INTERRUPTED)
    if not is_first():
        return
    if as_json:
        print_json(result)
    else:
        out.print(f"held out: {result['held_out_loss']:.3f} nats a token, {result['bits_per_byte']:.3f} bits a byte")

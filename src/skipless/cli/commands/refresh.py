"""`skipless refresh`."""

from pathlib import Path

import click

from skipless.cli.output import err, out, waiting


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Show what would change, and stop.")
def refresh(folder: Path, dry_run: bool) -> None:
    """Replace the model files that FOLDER carries for trust_remote_code by this version's, and show what changes.

    A folder that an older version wrote needs it where transformers has moved on since. Weights stay as they are.
    """
    with waiting("starting"):
        from skipless.rewrite.model_files import refresh as run

    changed = run(folder, lambda line: out.print(line, soft_wrap=True), dry_run)
    done = "would be" if dry_run else "are"
    line = f"{folder}: the model files {done} this version's" if changed else f"{folder}: nothing to change"
    err.print(line, soft_wrap=True)

"""`skipless limit`."""

import dataclasses
import sys

import click

from skipless.cli.options import as_json, known_names
from skipless.cli.output import out, print_json, step_bar


@click.command("limit")
@click.argument("model", metavar="CONFIG|FOLDER|NAME", shell_complete=known_names)
@click.option("--check", is_flag=True, help="Count it, on a small copy of the architecture, before and after fusing.")
@as_json
def limit_command(model: str, check: bool, as_json: bool) -> None:
    """How much of a model carries no information at all, and how much of that can be removed?

    Of a skipless config.json, what it says, norms and skips included; of another model, its skipless version.
    """
    from skipless.architecture import limit as room
    from skipless.cli import tables
    from skipless.reports.counting import resolve

    _, family, architecture = resolve(model)
    architecture = architecture if family == "skipless" else architecture.skipless()
    limit, certificate = room.limit(architecture), None
    if check:
        from skipless.reports.certificate import certify

        with step_bar("counting") as progress:
            certificate = certify(architecture, progress)
    if as_json:
        counted = certificate and {**dataclasses.asdict(certificate), "holds": certificate.holds}
        print_json({**dataclasses.asdict(limit), "removable": limit.removable, "certificate": counted})
    else:
        out.print_table(tables.limit_table(limit))
        for line in tables.limit_lines(limit, certificate):
            out.print(line, soft_wrap=True)
    sys.exit(0 if certificate is None or certificate.holds else 1)

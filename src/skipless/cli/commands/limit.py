"""`skipless limit`."""

import dataclasses
import sys

import click

from skipless.cli.options import as_json
from skipless.cli.output import out, print_json


@click.command("limit")
@click.argument("model", metavar="CONFIG|FOLDER|NAME")
@click.option("--check", is_flag=True, help="Count it, on a small copy of the architecture, before and after fusing.")
@as_json
def limit_command(model: str, check: bool, as_json: bool) -> None:
    """How much of a model carries no information at all, and how much of that can be removed?

    Of a skipless config.json, what it says, norms and skips included; of another model, its skipless version. Exit code
    1 if --check finds another number than the formula.
    """
    from skipless.architecture import limit as room
    from skipless.cli import tables
    from skipless.reports.counting import resolve

    _, family, architecture = resolve(model)
    architecture = architecture if family == "skipless" else architecture.skipless()
    found, certificate = room.limit(architecture), None
    if check:
        from skipless.reports.certificate import certify

        certificate = certify(architecture)
    if as_json:
        counted = certificate and {**dataclasses.asdict(certificate), "holds": certificate.holds}
        print_json({**dataclasses.asdict(found), "removable": found.removable, "certificate": counted})
    else:
        out.print(tables.limit_table(found))
        for line in tables.limit_lines(found, certificate):
            out.print(line, soft_wrap=True)
    sys.exit(0 if certificate is None or certificate.holds else 1)

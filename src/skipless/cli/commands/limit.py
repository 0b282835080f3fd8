"""`skipless limit`."""

import dataclasses
import sys

import click

from skipless.cli.options import as_json, known_names
from skipless.cli.output import out, print_json, step_bar, waiting


@click.command("limit")
@click.argument("model", metavar="CONFIG|FOLDER|NAME", shell_complete=known_names)
@click.option("--check", is_flag=True, help="Count it, on a small copy of the architecture, before and after fusing.")
@as_json
def limit_command(model: str, check: bool, as_json: bool) -> None:
    """How much of a model carries no information at all, and how much of that can be removed?

    Of a skipless config.json, what it says, norms and skips included. Of another model, its skipless version, and what
    blocks the removals in the model as it is.
    """
    from skipless.architecture import limit as room
    from skipless.architecture.seams import reasons, seams
    from skipless.cli import tables
    from skipless.reports.counting import resolve

    with waiting("starting"):  # torch is imported for folders alone
        name, family, as_it_is, _ = resolve(model)
    architecture = as_it_is if family == "skipless" else as_it_is.skipless()
    blocked = () if family == "skipless" else reasons(seams(as_it_is, norms=True))
    limit, certificate = room.limit(architecture), None
    if check:
        with waiting("starting"):
            from skipless.reports.certificate import certify
        with step_bar("counting") as progress:
            certificate = certify(architecture, progress)
    if as_json:
        counted = certificate and {**dataclasses.asdict(certificate), "holds": certificate.holds}
        more = {"removable": limit.removable, "as_it_is": blocked, "certificate": counted}
        print_json({**dataclasses.asdict(limit), **more})
    else:
        out.print_table(tables.limit_table(limit))
        for line in tables.limit_lines(limit, certificate):
            out.print(line, soft_wrap=True)
        if blocked:
            out.print(f"these are the numbers of a skipless {name}; as it is, these stay:", soft_wrap=True)
        for line in blocked:
            out.print(line, soft_wrap=True)
    sys.exit(0 if certificate is None or certificate.holds else 1)

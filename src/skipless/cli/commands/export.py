"""`skipless export`."""

import dataclasses
from pathlib import Path

import click

from skipless.cli.options import as_json
from skipless.cli.output import out, print_json, waiting
from skipless.serving.engines import FORMATS


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(list(FORMATS)), required=True, help="The engine to write for.")
@click.option(
    "--weights",
    type=click.Choice(["f32", "bf16", "f16", "int8", "int4", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]),
    default="f32",
    show_default=True,
    metavar="DTYPE",
    help="How to store them: f32, bf16, f16; openvino: int8, int4; gguf: q8_0, q5_1, q5_0, q4_1, q4_0.",
)
@as_json
def export(model: Path, destination: Path, to: str, weights: str, as_json: bool) -> None:
    """Write the skipless MODEL, fused or not, for another engine into the new folder DST."""
    with waiting("starting"):
        from skipless.serving import export as room
    with waiting(f"exporting for {to}"):
        written = room.export(model, destination, to=to, weights=weights)
    if as_json:
        print_json(dataclasses.asdict(written))
    else:
        line = f"wrote {destination} for {to}: weights in {weights}, {written.bytes / 1e6:,.1f} MB"
        out.print(line, soft_wrap=True)

"""`skipless fuse`."""

import shlex
import sys
from typing import Any

import click

from skipless.cli.options import as_json, expect_weights, parse_removal, parse_size, removal_options
from skipless.cli.output import err, out, print_json, waiting, work_bar


@click.command()
@click.argument("source", metavar="SRC", type=click.Path())
@click.argument("destination", metavar="DST", type=click.Path())
@removal_options
@click.option(
    "--layout",
    type=click.Choice(["skipless", "family"]),
    help="How DST is laid out: as a skipless model, which leaves out what goes, or as SRC's own family has it "
    "[default: as SRC is].",
)
@click.option(
    "--max-shard-size", default="5GB", show_default=True, help="Largest file of weights: a number and MB or GB."
)
@click.option("--max-memory", metavar="SIZE", help="Stay below, or say that it cannot be done [default: what is free].")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Who computes: this process, or the machines of a Ray cluster.",
)
@click.option("--address", help="Of the Ray cluster, or auto [default: one on this machine].")
@click.option(
    "--copy",
    multiple=True,
    metavar="PATTERN",
    help="Copy these files of SRC, too, or folders with all in them, repeatable [default: tokenizer, licence, ...].",
)
@click.option("--dry-run", is_flag=True, help="Print the plan - tasks, files, memory, FLOPs, time - and stop.")
@click.option("--resume", is_flag=True, help="Go on where the same command was stopped.")
@as_json
def fuse(
    source: str,
    destination: str,
    layout: str | None,
    max_shard_size: str,
    max_memory: str | None,
    engine: str,
    address: str | None,
    copy: tuple[str, ...],
    dry_run: bool,
    resume: bool,
    as_json: bool,
    **removal: Any,
) -> None:
    """Write the checkpoint SRC without the weights it does not need into the new folder DST.

    Of a skipless model Q (or K, V) and P go. Of a model with skips and norms, of any family that is known, no tensor
    goes: gains of norms and biases move into the matrices beside them, and become 1 and 0; it loads wherever SRC does.
    With --layout skipless these, and a block of each head of V, go; it then loads as a skipless model. SRC may be a
    GGUF file of an ordinary Llama.
    """
    expect_weights(source)
    with waiting("starting"):
        from skipless.checkpoint.remote import shown
        from skipless.cli import tables
        from skipless.rewrite import fusion
        from skipless.rewrite.request import Request

    options, size = {**parse_removal(**removal), "layout": layout}, parse_size("--max-shard-size", max_shard_size)
    memory = None if max_memory is None else parse_size("--max-memory", max_memory)
    estimated = None
    if dry_run:
        device = options.pop("device")
        with waiting("planning"):
            planned = fusion.plan_fuse(
                source, destination, Request(**options), size, memory, engine, address, device, resume, copy
            )
        plan, estimated = planned.plan, planned.estimate()
    else:
        with work_bar("fusing") as advance:
            try:
                plan = fusion.fuse(
                    source,
                    destination,
                    max_shard_size=size,
                    max_memory=memory,
                    engine=engine,
                    address=address,
                    copy=copy,
                    resume=resume,
                    progress=advance,
                    **options,
                )
            except (KeyboardInterrupt, SystemExit):
                if fusion.destination_at(destination).unfinished.exists():
                    again = [shown(word) for word in sys.argv[1:] if word != "--resume"]
                    line = f"interrupted; go on with: skipless {shlex.join(again)} --resume"
                    err.print(line, soft_wrap=True)
                raise
    if as_json:
        print_json(plan.summary() | ({} if estimated is None else {"work": estimated.to_json()}))
        return
    out.print_table(tables.plan_table(plan))
    if estimated is not None:
        out.print_table(tables.work_table(estimated))
        for line in tables.work_lines(estimated):
            out.print(line, soft_wrap=True)
    for line in tables.first_layer_lines(plan):
        out.print(line, soft_wrap=True)
    if plan.reason:
        out.print(f"basis {plan.basis}: {plan.reason}", soft_wrap=True)
    if plan.note:
        out.print(plan.note, soft_wrap=True)
    if not dry_run:
        out.print(
            f"wrote {shown(destination)}; check it with: skipless verify {shown(source)} {shown(destination)}",
            soft_wrap=True,
        )

"""The command line: parse, call, print. Results go to stdout, everything else to stderr."""

import csv
import dataclasses
import json
import math
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from skipless import __version__
from skipless.cli.terminal import Terminal
from skipless.dtypes import DTYPE_NAMES
from skipless.errors import InputError, extra, printable
from skipless.log import printable_logs
from skipless.reports.counting import WEIGHT_BYTES
from skipless.serving.engines import ENGINES, FORMATS

# Ctrl-C, as a shell counts it: 128 + SIGINT.
INTERRUPTED = 130

out = Terminal()
err = Terminal(stderr=True)


class Group(click.Group):
    """A click group that turns bad input into one line on stderr and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that files are cleaned up
        try:
            with printable_logs():
                return super().invoke(ctx)
        except click.ClickException as error:  # click's own: usage (exit code 2)
            error.message = printable(error.message)  # type: ignore[misc]
            raise
        except (click.exceptions.Exit, click.Abort):
            raise  # --help
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except (InputError, OSError) as error:
            err.print(f"skipless: {error}", style="red", soft_wrap=True)
            sys.exit(2)
        except Exception as error:  # a traceback's usual exit code, 1, would say "not the same function"
            for part in traceback.format_exception(error):  # of these, frames alone have several lines of ours
                (err.print_lines if part.startswith("  File ") else err.print)(part.strip("\n"))
            err.print("skipless: this is a bug in skipless; please report it with the lines above", style="red")
            sys.exit(3)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Remove, exactly, the weights a transformer without skip connections does not need.

    Exit codes: 0 done, 1 the answer is no (not the same function), 2 bad input or usage, 3 a bug.
    """


as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of a table.")


@main.command()
@as_json
def demo(as_json: bool) -> None:
    """Generate with the bundled model, fuse it, verify, generate again: what was saved, and how fast."""
    from skipless.cli import demo as room
    from skipless.cli import tables

    result = room.demo(err.print_lines)
    if as_json:
        before, after = result.plan.weights
        print_json(
            {
                "weights_before": before,
                "weights_after": after,
                "same_tokens": result.same_tokens,
                "caches": result.caches,
                "bench": dataclasses.asdict(result.bench),
                "verify": dataclasses.asdict(result.report),
            }
        )
    else:
        out.print(tables.report_table(result.report))
        out.print(result.report.note, soft_wrap=True)
        out.print(tables.demo_table(result))
        for problem in filter(None, result.caches):
            out.print(f"a broken cache: {problem}", soft_wrap=True)
    sys.exit(0 if result.report.same and result.same_tokens and not any(result.caches) else 1)


@main.command("count")
@click.argument("models", nargs=-1, metavar="[CONFIG|FOLDER|NAME ...]")
@click.option("--paper", is_flag=True, help="The paper's table, counted again.")
@click.option("--list", "listed", is_flag=True, help="The names that are known.")
@click.option(
    "--dtype", type=click.Choice(tuple(WEIGHT_BYTES)), default="bfloat16", show_default=True, help="Of the weights."
)
@click.option(
    "--cache-dtype",
    type=click.Choice(tuple(WEIGHT_BYTES)),
    default="bfloat16",
    show_default=True,
    help="Of the KV cache.",
)
@click.option("--context", type=click.IntRange(0), default=0, show_default=True, help="Tokens in the cache.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences decoded at once.")
@click.option("--bandwidth", type=click.FloatRange(0, min_open=True), help="GB/s, with --flops: a roofline.")
@click.option("--flops", type=click.FloatRange(0, min_open=True), help="Peak TFLOP/s, with --bandwidth.")
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated values instead of a table.")
@click.option("--markdown", "as_markdown", is_flag=True, help="A Markdown table.")
@as_json
def count_command(
    models: tuple[str, ...],
    paper: bool,
    listed: bool,
    dtype: str,
    cache_dtype: str,
    context: int,
    batch: int,
    bandwidth: float | None,
    flops: float | None,
    as_csv: bool,
    as_markdown: bool,
    as_json: bool,
) -> None:
    """Weights of models, what removing some would save, and how much faster decoding could be.

    Of each: what the paper removes if the model is trained so, what rewriting a skipless version would remove exactly,
    what could go at most, and what can go from the model as it is.
    """
    from skipless.cli import tables
    from skipless.reports import counting as room

    if sum([bool(models), paper, listed]) != 1:
        raise InputError("count: expected models, or --paper, or --list")
    if (bandwidth is None) != (flops is None):
        raise InputError("count: expected --bandwidth and --flops together, or neither")
    if listed:
        known = room.table()
        out.print(f"as of {known['date']}: {', '.join(known['models'])}")
        return
    conditions = room.Conditions(
        dtype, cache_dtype, context, batch, bandwidth and bandwidth * 1e9, flops and flops * 1e12
    )
    if paper:
        pairs = room.paper()
        counts = [counted for counted, _ in pairs]
        rows, notes = tables.paper_rows(pairs), tables.paper_notes(pairs)
    else:
        counts = [room.count(model, conditions) for model in models]
        rows, notes = tables.count_rows(counts), tables.count_notes(counts, conditions)
    if as_json:
        found = [counted.to_json() for counted in counts]
        print_json(found[0] if len(found) == 1 else {"models": found})
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerows(rows)
    elif as_markdown:
        click.echo(tables.markdown(rows))
    else:
        out.print(tables.count_table(rows))
        for note in notes:
            out.print(note, soft_wrap=True)


def removal_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What fuse is asked for, and audit asked about."""
    options = [
        click.option(
            "--basis",
            type=click.Choice(["auto", "q", "k", "v", "pivoted"]),
            default="auto",
            show_default=True,
            help="What becomes the identity: q_proj (k, v: MHA only), or the best columns of all three.",
        ),
        click.option(
            "--dtype", type=click.Choice(DTYPE_NAMES), help="Store every tensor in this dtype [default: as it is]."
        ),
        click.option(
            "--rest-dtype",
            type=click.Choice(["float32"]),
            help="Store rest_proj, what pivoted leaves of Q, K, V, in this dtype.",
        ),
        click.option("--layers-open", default="", metavar="I,J,...", help="Layers that keep their projections."),
        click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu or cuda."),
        click.option(
            "--remove",
            default="stream,p",
            show_default=True,
            metavar="KINDS",
            help="Kinds of seams to close: of stream, p, values, head, norms.",
        ),
        click.option(
            "--parallel-removes",
            type=click.Choice(["readers", "p"]),
            default="readers",
            show_default=True,
            help="What a parallel model loses: Q (or what the basis says), or P.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def parse_removal(layers_open: str, remove: str, **others: Any) -> dict[str, Any]:
    """The values of removal_options as fuse and audit take them."""
    return {
        "layers_open": parse_layers(layers_open),
        "remove": tuple(kind.strip() for kind in remove.split(",")),
        **others,
    }


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@removal_options
@click.option("--plot", type=click.Path(path_type=Path), help="Condition numbers by layer, as a .png or .svg.")
@as_json
def audit(model: Path, plot: Path | None, as_json: bool, **removal: Any) -> None:
    """What can be removed from MODEL, and at what loss? Exit code 1 if what the options ask for is not safe.

    MODEL is a model folder of any family that is known, or a GGUF file. Where its skips and norms block what is asked
    for, the losses are those of a model with the same matrices and without them.

    For every layer: condition numbers of Q, K, V and P, and the relative errors of q, k, v and of M's outputs to expect
    from each way to remove them, stored in each dtype, beside the original's own.
    """
    from skipless.cli import plotting, tables
    from skipless.reports import auditing

    options = parse_removal(**removal)
    if plot is not None:
        plotting.check(plot)
    tell_of_other_model_files(model)
    with progress_bar("auditing") as progress:
        bar = progress.add_task("", total=None)
        found = auditing.audit(
            model, progress=lambda done, total: progress.update(bar, completed=done, total=total), **options
        )
    if plot is not None:
        plotting.plot_conditions(found, plot, f"{model.resolve().stem}: condition numbers")
    if as_json:
        print_json({**dataclasses.asdict(found), "safe": found.safe})
    else:
        for table in tables.audit_tables(found):
            out.print(table)
        for line in tables.audit_lines(found):
            out.print(line, soft_wrap=True)
    sys.exit(0 if found.safe else 1)


@main.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@removal_options
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
    """Write the skipless checkpoint SRC without the weights it does not need into the new folder DST."""
    from skipless.checkpoint.remote import shown
    from skipless.cli import tables
    from skipless.rewrite import fusion
    from skipless.rewrite.request import Request

    options, size = parse_removal(**removal), parse_size("--max-shard-size", max_shard_size)
    memory = None if max_memory is None else parse_size("--max-memory", max_memory)
    estimated = None
    if dry_run:
        device = options.pop("device")
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
                if fusion.destination_place(destination).unfinished.exists():
                    again = [shown(word) for word in sys.argv[1:] if word != "--resume"]
                    line = f"interrupted; go on with: skipless {shlex.join(again)} --resume"
                    err.print(line, soft_wrap=True)
                raise
    if as_json:
        print_json(plan.summary() | ({} if estimated is None else {"work": estimated.to_json()}))
        return
    out.print(tables.plan_table(plan))
    if estimated is not None:
        out.print(tables.work_table(estimated))
        for line in tables.work_lines(estimated):
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


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(list(FORMATS)), required=True, help="The engine to write for.")
@click.option(
    "--weights",
    type=click.Choice(["f32", "bf16", "f16", "int8", "int4"]),
    default="f32",
    show_default=True,
    help="How to store them; int8 and int4: openvino only.",
)
@as_json
def export(model: Path, destination: Path, to: str, weights: str, as_json: bool) -> None:
    """Write the skipless MODEL, fused or not, for another engine into the new folder DST."""
    from skipless.serving import export as room

    found = room.export(model, destination, to=to, weights=weights)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        line = f"wrote {destination} for {to}: weights in {weights}, {found.bytes / 1e6:,.1f} MB"
        out.print(line, soft_wrap=True)


@main.command("limit")
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


@main.command()
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
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random tokens.")
@click.option("--full", is_flag=True, help="Run every token, every position, and a context beyond the window.")
@as_json
def verify(
    a: Path,
    b: Path | None,
    dtypes: tuple[str, ...],
    prompt: str | None,
    tokens: int,
    seed: int,
    full: bool,
    as_json: bool,
) -> None:
    """Are A and B (made from A) the same function? Exit code 1 if they are not.

    Files are compared as data, tensors one by one, and both models are run. Of A alone, which fuse has written: is it
    still what was written, by the SHA-256 in its skipless.json?
    """
    from skipless.cli import tables
    from skipless.reports import verification

    if b is None:
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
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        out.print(tables.report_table(report))
        for line in tables.report_lines(report):
            out.print(line, soft_wrap=True)
    sys.exit(0 if report.same else 1)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Show what would change, and stop.")
def refresh(folder: Path, dry_run: bool) -> None:
    """Replace the model files that FOLDER carries for trust_remote_code by this version's, and show what changes.

    A folder that an older version wrote needs it where transformers has moved on since. Weights stay as they are.
    """
    from skipless.rewrite.model_files import refresh as run

    changed = run(folder, lambda line: out.print(line, soft_wrap=True), dry_run)
    done = "would be" if dry_run else "are"
    line = f"{folder}: the model files {done} this version's" if changed else f"{folder}: nothing to change"
    err.print(line, soft_wrap=True)


@main.command()
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

    Each model runs in a process of its own. Ratios are those of a round, and what is printed is their median. Exit code
    1 if a model's cache is broken: what it then generates is another model's.
    """
    from skipless.cli import plotting, tables
    from skipless.serving import bench as room

    if plot is not None:
        plotting.check(plot)
    tell_of_other_model_files(*models)
    work = room.Work(batches or (1,), context, tokens, prefill)
    with progress_bar("timing") as progress:
        bar = progress.add_task("", total=None)
        found = room.bench(
            models,
            shape=shape,
            layers=layers,
            engine=engine,
            dtype=dtype,
            compiled=compiled,
            work=work,
            rounds=rounds,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    if plot is not None:
        plotting.plot_speeds(found, plot)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        out.print(tables.bench_line(found), soft_wrap=True)
        out.print(tables.bench_table(found))
        for name, problem in found.broken_caches.items():
            out.print(f"a broken cache: {name}: {problem}", soft_wrap=True)
    sys.exit(1 if found.broken_caches else 0)


@main.command()
@click.argument("recipe")
@click.argument("out_folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in OUT.")
@as_json
def train(recipe: str, out_folder: Path, resume: bool, as_json: bool) -> None:
    """Train a skipless model by RECIPE (a TOML file, or a bundled name: stdlib) into the folder OUT."""
    with extra("train"):
        from skipless.train.recipe import Recipe
        from skipless.train.run import train as run

    try:
        result = run(Recipe.read(recipe), out_folder, resume=resume)
    except KeyboardInterrupt:
        err.print(f"interrupted; go on with: skipless train {recipe} {out_folder} --resume", soft_wrap=True)
        sys.exit(INTERRUPTED)
    if as_json:
        print_json(result)
    else:
        out.print(f"held out: {result['held_out_loss']:.3f} nats a token, {result['bits_per_byte']:.3f} bits a byte")


def tell_of_other_model_files(*folders: Path) -> None:
    """Say of each folder whose model files are not this version's that they are not, in a line on stderr."""
    from skipless.rewrite.model_files import other_model_files

    for folder in folders:
        if folder.is_dir() and (others := other_model_files(folder)):
            line = f"{folder}: {' and '.join(others)}: not this version's; to replace: skipless refresh {folder}"
            err.print(line, soft_wrap=True)


def progress_bar(verb: str) -> Progress:
    """A bar on stderr that goes when it is done, if that is a terminal."""
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


@contextmanager
def step_bar(verb: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for work of named steps, called with what is done next, steps done, and their number."""
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
    bar = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
    number = bar.add_task("", total=None)
    with bar:
        yield lambda step, done, total: bar.update(number, description=step, completed=done, total=total)


@contextmanager
def work_bar(verb: str) -> Iterator[Callable[[Any, Any], None]]:
    """A bar on stderr for fuse's `progress`, by FLOPs and bytes, with GFLOP/s and the time left."""
    columns = (TextColumn(verb), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=err, transient=True, disable=not err.is_terminal)
    number = bar.add_task("", total=None, rate="")
    last = time.monotonic()

    def advance(plan: Any, task: Any) -> None:
        nonlocal last
        from skipless.rewrite.cost import cost

        now = time.monotonic()
        if task is None:
            bar.update(number, total=sum(cost(plan, each).total + plan.moved(each) for each in plan.tasks))
        else:
            flops = cost(plan, task).total
            bar.update(number, advance=flops + plan.moved(task))
            if flops:
                bar.update(number, rate=f"{flops / (now - last) / 1e9:,.0f} GFLOP/s")
        last = now

    with bar:
        yield advance


def print_json(value: Any) -> None:
    """One JSON object on stdout; what JSON has no number for (infinity, NaN) becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    click.echo(json.dumps(plain(value), allow_nan=False))


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"--layers-open: expected layer numbers with commas between them, found {text!r}") from None


def parse_size(option: str, text: str) -> int:
    """A size such as 5GB or 200MB in bytes."""
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?) ?(MB|GB)", text.strip().upper())
    size = int(float(found[1]) * {"MB": 10**6, "GB": 10**9}[found[2]]) if found else 0
    if size < 1:
        raise InputError(f"{option}: expected a number and MB or GB, such as 5GB; found {text!r}")
    return size

"""Results as tables for people (rich)."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from skipless.auditing import Audit, SeamAudit
from skipless.bench import Speed
from skipless.demo import Demo
from skipless.dtypes import DTYPE_NAMES
from skipless.fusion import Plan
from skipless.spectrum import Spectrum
from skipless.verification import Report

MEGABYTE = 10**6


def plan_table(plan: Plan) -> Table:
    """What a fuse reads, writes and saves: one row per kind of task, then totals."""
    table = Table(title=f"fuse by {plan.basis}", box=box.SIMPLE_HEAD)
    for column in ("task", "count", "reads", "writes", "saves"):
        table.add_column(column, justify="left" if column == "task" else "right")
    kinds: dict[str, list[tuple[int, int, int]]] = {}
    for task in plan.tasks:
        kind = " + ".join(dict.fromkeys(f"close {seam.kind} seam" for seam in task.seams)) or "copy"
        reads = sum(plan.inputs[name].bytes for name in task.reads)
        writes = sum(plan.outputs[name].bytes for name in task.writes)
        kinds.setdefault(kind, []).append((reads, writes, sum(seam.saves for seam in task.seams)))
    for kind, tasks in kinds.items():
        reads, writes, saved = (sum(column) for column in zip(*tasks, strict=True))
        table.add_row(kind, f"{len(tasks):,}", _megabytes(reads), _megabytes(writes), f"{saved:,}")
    table.add_section()
    before, after = plan.weights
    table.add_row("weights", "", f"{before:,}", f"{after:,}", f"{before - after:,} ({1 - after / before:.1%})")
    before, after = plan.bytes
    table.add_row(
        "bytes",
        "",
        _megabytes(before),
        _megabytes(after),
        f"{after / before - 1:+.1%}",
    )
    shards = len({info.shard for info in plan.outputs.values()})
    table.add_row("files of weights", f"{shards:,}", "", "", "")
    return table


def audit_tables(audit: Audit) -> Iterator[Table]:
    """By layer: condition numbers of the matrices; then the errors to expect, of q, k, v and of M's outputs."""
    letters = [letter for letter in "qkvp" if any(letter in seam.matrices for seam in audit.seams)]
    rows: dict[int, dict[str, str]] = {}
    for seam in audit.seams:
        row = rows.setdefault(seam.layer, {})
        row |= {letter: _condition(found) for letter, found in seam.matrices.items()}
        if pivoted := seam.ways.get("pivoted"):
            row |= {"pivoted": f"{pivoted.condition:.1e}", "max|R|": f"{pivoted.largest:.2f}"}
    table = Table(title="condition numbers (pivoted: of the columns chosen)", box=box.SIMPLE_HEAD)
    table.add_column("layer", justify="right")
    columns = [*letters, *(name for name in ("pivoted", "max|R|") if any(name in row for row in rows.values()))]
    for name in columns:
        table.add_column(name.upper() if name in letters else name, justify="right")
    for layer, row in rows.items():
        table.add_row(str(layer), *(row.get(name, "") for name in columns))
    yield table
    for kind, what in (("stream", "q, k, v"), ("p", "M's outputs")):
        if seams := [seam for seam in audit.seams if seam.kind == kind and seam.ways]:
            yield _loss_table(seams, f"relative error of {what}: original's, and multiples")


def _loss_table(seams: Sequence[SeamAudit], title: str) -> Table:
    """Seams of one kind by dtype: the original's error in it, and that of each way; red where that is not safe."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("layer", justify="right")
    stored = {dtype for seam in seams for dtype in seam.stored.values()}
    dtypes = [name for name in DTYPE_NAMES if name in stored or name != "float64"]
    ways = list(dict.fromkeys(way for seam in seams for way in seam.ways))
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
        for way in ways:
            table.add_column("merged" if way == "p" else way, justify="right")
    for seam in seams:
        cells = [str(seam.layer)]
        for dtype in dtypes:
            cells.append(f"{max(seam.original[dtype].values()):.1e}")
            cells += [_loss(seam, way, dtype) if way in seam.ways else "" for way in ways]
        table.add_row(*cells)
    return table


def _loss(seam: SeamAudit, way: str, dtype: str) -> str:
    worst = max(error / (seam.original[dtype][name] or 1) for name, error in seam.ways[way].errors[dtype].items())
    text = f"{worst:.1f}x" if worst < 10 else f"{worst:.0f}x" if worst < 1e4 else f"{worst:.0e}x"
    return f"[red]{text}[/]" if dtype in seam.problems[way] else text


def audit_lines(audit: Audit) -> Iterator[str]:
    """What an audit comes to, in words."""
    if not any(seam.asked for seam in audit.seams):
        yield "nothing to remove: every seam of this model is closed already, or left open on request"
        return
    if audit.reason:
        yield f"basis {audit.basis}: {audit.reason}"
    yield from (f"[red]not safe:[/] {escape(problem)}" for problem in audit.problems)
    if audit.alternatives:
        yield f"safe instead: {' or '.join(audit.alternatives)}"
    if audit.safe:
        yield "[green]safe to remove[/], with the same options: skipless fuse"


def _condition(found: Spectrum) -> str:
    return f"{found.condition:.1e}" + ("" if found.rank == min(found.shape) else f" (rank {found.rank})")


def report_table(report: Report) -> Table:
    """The comparison, two lines a dtype: B, and what the dtype alone does to the original."""
    title = f"compared with A in fp64, on {report.tokens_seen:,} of {report.vocab_size:,} tokens"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("run in", "", "logit error", "tolerance", "KL, nats", "top-1", "greedy", "verdict"):
        table.add_column(column, justify="right" if column not in ("run in", "") else "left")
    for row in report.rows:
        verdict = ("[green]same[/]" if row.passed else "[red]differs[/]") if row.judged else "-"
        error, own_error = f"{row.logit_error:.1e}", f"{row.own_logit_error:.1e}"
        table.add_row(
            row.dtype,
            "B",
            error,
            f"{row.tolerance:.1e}",
            f"{row.kl:.1e}",
            f"{row.top1:.1%}",
            f"{row.greedy:.0%}",
            verdict,
        )
        table.add_row(
            "", "A", own_error, "", f"{row.own_kl:.1e}", f"{row.own_top1:.1%}", f"{row.own_greedy:.0%}", "", style="dim"
        )
    return table


def speed_table(speeds: Sequence[Speed], ratios: Sequence[float]) -> Table:
    """Decoding at batch 1, model by model, beside the ceiling that reading the weights sets."""
    table = Table(title="greedy decoding at batch 1", box=box.SIMPLE_HEAD)
    for column in ("model", "tokens/s", "min", "max", "read a token", "ceiling", "bytes", "speed-up"):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for speed, ratio in zip(speeds, ratios, strict=True):
        table.add_row(
            speed.name,
            f"{speed.tokens_per_second:,.0f}",
            f"{min(speed.rounds):,.0f}",
            f"{max(speed.rounds):,.0f}",
            _megabytes(speed.bytes_per_token),
            f"{speed.ceiling:,.0f}",
            f"1/{speeds[0].bytes_per_token / speed.bytes_per_token:.2f}",
            f"{ratio:.2f}x",
        )
    return table


def demo_table(demo: Demo) -> Table:
    """Before and after, in one table."""
    table = Table(title="the same function with fewer weights", box=box.SIMPLE_HEAD)
    for column in ("", "original", "fused", ""):
        table.add_column(column, justify="left" if not column else "right")
    before, after = demo.plan.weights
    table.add_row("weights", f"{before:,}", f"{after:,}", f"{after / before - 1:.1%}")
    original, fused = demo.speeds
    table.add_row("MB in float32", _megabytes(4 * before), _megabytes(4 * after), f"{after / before - 1:.1%}")
    table.add_row(
        "MB read a token",
        _megabytes(original.bytes_per_token),
        _megabytes(fused.bytes_per_token),
        f"{fused.bytes_per_token / original.bytes_per_token - 1:.1%}",
    )
    for row in demo.report.rows:
        if row.judged:
            table.add_row(f"logit error in {row.dtype}", f"{row.own_logit_error:.1e}", f"{row.logit_error:.1e}", "")
    table.add_row("generated tokens", "", "the same" if demo.same_tokens else "[red]different[/]", "")
    table.add_row(
        "tokens/s, batch 1",
        f"{original.tokens_per_second:,.0f}",
        f"{fused.tokens_per_second:,.0f}",
        f"{demo.speedup:.2f}x",
    )
    return table


def _megabytes(size: int) -> str:
    return f"{size / MEGABYTE:,.1f} MB"

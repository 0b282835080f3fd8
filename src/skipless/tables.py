"""Results as tables for people (rich)."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from skipless.bench import Speed
from skipless.demo import Demo
from skipless.fusion import Plan
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

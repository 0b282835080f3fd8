"""Results as tables for people (rich)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from skipless.architecture.seams import REMOVABLE
from skipless.dtypes import DTYPE_NAMES
from skipless.errors import printable
from skipless.reports.counting import Conditions, Count, FirstLayer, Saving, in_parallel

if TYPE_CHECKING:  # so that counting loads no torch
    from skipless.algebra.spectrum import Spectrum
    from skipless.architecture.limit import Limit
    from skipless.architecture.seams import Seam
    from skipless.cli.demo import Demo
    from skipless.reports.auditing import Audit, SeamAudit
    from skipless.reports.certificate import Certificate
    from skipless.reports.verification import Loss, Report
    from skipless.rewrite.cost import Cost, Estimate
    from skipless.rewrite.planning import Plan, Task
    from skipless.serving.bench import Bench

MEGABYTE = 10**6
# What each kind of seam is audited by.
AUDITED = (
    ("stream", "q, k, v"), ("first_layer", "q, k, v, looked up"), ("values", "P's outputs"),
    ("queries", "scores"), ("p", "M's outputs"), ("head", "logits"),
)  # fmt: skip


def plan_table(plan: Plan) -> Table:
    """What a fuse reads, writes and saves (or moves, in a family's layout): one row per kind of task, then totals."""
    moved = plan.in_place
    title = "fold" if moved else f"fuse by {plan.basis}" if plan.layout is None else "fuse"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("task", "count", "reads", "writes", "moves" if moved else "saves"):
        table.add_column(column, justify="left" if column == "task" else "right")
    kinds: dict[str, list[tuple[int, int, int]]] = {}
    for task in plan.tasks:
        kinds.setdefault(_kind(task), []).append((*plan.traffic(task), sum(seam.saves for seam in task.seams)))
    for kind, tasks in kinds.items():
        reads, writes, saved = (sum(column) for column in zip(*tasks, strict=True))
        table.add_row(kind, f"{len(tasks):,}", _megabytes(reads), _megabytes(writes), f"{saved:,}")
    table.add_section()
    before, after = plan.parameters
    less = f"{plan.neutral:,}" if moved else f"{before - after:,} ({1 - after / before:.1%})"
    table.add_row("parameters", "", f"{before:,}", f"{after:,}", less)
    before, after = plan.bytes
    table.add_row(
        "bytes",
        "",
        _megabytes(before),
        _megabytes(after),
        f"{after / before - 1:+.1%}",
    )
    table.add_row("files of weights", f"{len(plan.shards):,}", "", "", "")
    return table


def _kind(task: Task) -> str:
    kind = " + ".join(dict.fromkeys(map(_verb, task.seams))) or "copy"
    return f"{kind} by rows" if task.by_rows and task.seams[0].kind != "first_layer" else kind


def _verb(seam: Seam) -> str:
    """What is done with a seam, in a user's words: where nothing goes, or layer 0 does, "seam" says nothing to them."""
    if seam.kind == "first_layer":
        return "precompute layer 0"
    return f"close {seam.kind} seam" if any(seam.identities.values()) else f"fold {seam.kind}"


def first_layer_lines(plan: Plan) -> Iterator[str]:
    """What precomputing layer 0 adds to the file, and what a step then reads of it, by the tokens in it."""
    before, after = plan.modules
    for seam in plan.kinds.get("first_layer", ()):
        table, old = after["model.embed_tokens"], before["model.embed_tokens"]
        removed = sum(before[name].inputs * before[name].outputs for name in seam.readers if not before[name].diagonal)
        change = FirstLayer(removed, table.inputs * (table.outputs - old.outputs), old.outputs, table.outputs)
        grows = f"{'grows' if change.grows > 0 else 'shrinks'} by {abs(change.grows):,} weights"
        reads = [(batch, *change.reads(batch)) for batch in (1, 16, 256)]
        steps = ", ".join(f"{now:,} instead of {then:,} at batch {batch}" for batch, then, now in reads)
        yield (
            f"layer 0, precomputed: the model {grows} ({abs(change.grows) / plan.parameters[0]:.1%}); of what a table "
            f"can hold, a step reads {steps} weights"
        )


def work_table(estimate: Estimate) -> Table:
    """FLOPs, memory and seconds of each kind of task."""
    names = list(estimate.rates.flops)
    table = Table(title="work", box=box.SIMPLE_HEAD)
    table.add_column("task")
    for column in (*names, "memory, each", "seconds"):
        table.add_column(column, justify="right")
    kinds: dict[str, list[Cost]] = {}
    for task, each in zip(estimate.plan.tasks, estimate.costs, strict=True):
        kinds.setdefault(_kind(task), []).append(each)
    for kind, costs in kinds.items():
        flops = [sum(each.flops.get(name, 0) for each in costs) for name in names]
        largest = max(each.memory for each in costs)
        seconds = sum(map(estimate.seconds_of, costs))
        table.add_row(kind, *map(_flops, flops), _megabytes(largest), f"{seconds:,.1f}")
    table.add_section()
    flops = [estimate.flops.get(name, 0) for name in names]
    table.add_row("FLOPs", *map(_flops, flops), "", f"{estimate.arithmetic:,.1f}")
    table.add_row("measured a second", *(_flops(estimate.rates.flops[name]) for name in names), "", "")
    return table


def work_lines(estimate: Estimate) -> Iterator[str]:
    """Time and memory in words, and the files."""
    read, written = estimate.plan.bytes
    yield (
        f"expected: {_duration(estimate.seconds)}: {_duration(estimate.arithmetic)} of arithmetic, beside which the "
        f"disk reads {_megabytes(read)} and writes {_megabytes(written)} ({_duration(estimate.disk)} at "
        f"{estimate.rates.disk / 1e9:.1f} GB/s), and {_duration(estimate.check)} to read it again and compare it"
    )
    yield f"memory: at most {_megabytes(estimate.memory)}"
    yield f"files: {', '.join(f'{name} {_megabytes(size)}' for name, size in estimate.plan.shards.items())}"


def _flops(count: float) -> str:
    return f"{count:.1e}" if count else "-"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def audit_tables(audit: Audit) -> Iterator[Table]:
    """By layer: condition numbers of the matrices; then the errors to expect, of q, k, v and of M's outputs."""
    letters = [letter for letter in "qkvp" if any(letter in seam.matrices for seam in audit.seams)]
    rows: dict[int, dict[str, str]] = {}
    for seam in audit.seams:
        row = rows.setdefault(seam.layer, {})
        row |= {letter: _condition(matrix) for letter, matrix in seam.matrices.items()}
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
    for kind, what in AUDITED:
        if seams := [seam for seam in audit.seams if seam.kind == kind and seam.ways]:
            stored = {dtype for seam in seams for dtype in seam.stored.values()}
            dtypes = [name for name in DTYPE_NAMES if name in stored or name != "float64"]
            wide = any(len(seam.ways) > 2 for seam in seams)  # more than a terminal holds side by side
            for shown in [[dtype] for dtype in dtypes] if wide else [dtypes]:
                yield _loss_table(seams, shown, f"relative error of {what}: original's, and multiples")


def _loss_table(seams: Sequence[SeamAudit], dtypes: Sequence[str], title: str) -> Table:
    """Seams of one kind, for each dtype: the original's error, and each way's multiple of it; red if it is not safe."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("layer", justify="right")
    ways = list(dict.fromkeys(way for seam in seams for way in seam.ways))
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
        for way in ways:
            table.add_column({"p": "merged", "head": "pivoted"}.get(way, way), justify="right")
    for seam in seams:
        cells: list[Text | str] = [str(seam.layer)]
        for dtype in dtypes:
            cells.append(f"{max(seam.original[dtype].values()):.1e}")
            cells += [_loss(seam, way, dtype) if way in seam.ways else "" for way in ways]
        table.add_row(*cells)
    return table


def _loss(seam: SeamAudit, way: str, dtype: str) -> Text | str:
    worst = max(error / (seam.original[dtype][name] or 1) for name, error in seam.ways[way].errors[dtype].items())
    text = f"{worst:.1f}x" if worst < 10 else f"{worst:.0f}x" if worst < 1e4 else f"{worst:.0e}x"
    return Text(text, "red") if dtype in seam.problems[way] else text


def audit_lines(audit: Audit) -> Iterator[Text | str]:
    """What an audit comes to, in words."""
    if audit.moves:
        yield Text.assemble(
            ("safe to move", "green"), f": {audit.moves:,} numbers, with the same options: skipless fuse"
        )
        yield from map(printable, audit.stays)
        return
    if not any(seam.asked for seam in audit.seams):
        yield "nothing to remove: every seam of this model is closed already, or left open on request"
        return
    if audit.reason:
        yield f"basis {audit.basis}: {audit.reason}"
    if audit.together is not None and any(seam.asked and seam.kind not in REMOVABLE for seam in audit.seams):
        multiple = audit.together.multiple
        yield f"all together, stored in {audit.together.dtype}: {multiple:.2f} times the error of the original"
    yield from (Text.assemble(("not safe:", "red"), f" {printable(problem)}") for problem in audit.problems)
    if norms := [seam for seam in audit.seams if seam.kind == "norms" and not seam.blocked]:
        yield f"norms: {len(norms)} gains or norms go into what they stand beside, and lose nothing but by rounding"
    if audit.alternatives:
        yield f"safe instead: {' or '.join(audit.alternatives)}"
    if audit.safe:
        layout = "" if audit.layout is None else f" --layout {audit.layout}"
        yield Text.assemble(("safe to remove", "green"), f", with the same options: skipless fuse{layout}")
    elif audit.problems != audit.if_skipless:
        yield from (f"nor without skips and norms: {problem}" for problem in audit.if_skipless)
        if not audit.if_skipless:
            yield "a model with these matrices and without skips and norms could be rewritten safely"
    parts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in audit.as_is.items() if count)
    total = sum(audit.as_is.values())
    yield f"exactly removable besides: {total:,} ({total / audit.parameters:.2%}): {parts}"
    if audit.left_out:
        yield f"skipless fuse --layout skipless leaves {audit.left_out:,} numbers out"
    if audit.by_fuse:
        yield f"skipless fuse moves {audit.by_fuse:,} of them into the matrices beside them"
    yield from map(printable, audit.stays)


def _condition(spectrum: Spectrum) -> str:
    return f"{spectrum.condition:.1e}" + ("" if spectrum.rank == min(spectrum.shape) else f" (rank {spectrum.rank})")


def report_table(report: Report) -> Table:
    """The comparison, two lines a dtype: B, and what the dtype alone does to the original."""
    title = f"compared with A in fp64, on {report.tokens_seen:,} of {report.vocab_size:,} tokens"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("run in", "", "error", "at most", "KL, nats", "top-1", "greedy", "verdict"):
        table.add_column(column, justify="right" if column not in ("run in", "") else "left", no_wrap=True)
    for row in report.rows:
        verdict = (Text("same", "green") if row.passed else Text("differs", "red")) if row.judged else "-"
        table.add_row(row.dtype, "B", *_losses(row.b, f"{row.limit:.1e}"), verdict)
        table.add_row("", "A", *_losses(row.a, ""), "", style="dim")
    return table


def _losses(loss: Loss, limit: str) -> tuple[str, ...]:
    error, *others = loss.cells()
    return error, limit, *others


def report_lines(report: Report) -> Iterator[str]:
    """What was compared beside the runs, and the verdict, last."""
    for line in (*report.data.function, *report.data.generation):
        yield f"differs: {line}"
    yield from report.data.notes
    if report.tensors:
        yield f"tensors: {len(report.tensors):,} are others than in A: {', '.join(report.tensors[:3])}"
    yield from report.covered()
    yield from report.caches
    yield report.note


def bench_line(bench: Bench) -> str:
    """The roofline: what the machine reads a second, and what follows from it."""
    ceilings = ", ".join(
        f"{_rate(speed.decoding[0].ceiling / speed.decoding[0].batch)} for {_megabytes(speed.bytes_per_token)}"
        for speed in bench.speeds
    )
    return f"read bandwidth {bench.bandwidth / 1e9:,.1f} GB/s: at most {ceilings} a token"


def bench_table(bench: Bench) -> Table:
    """Models side by side: decoding at each batch beside the ceiling that reading the weights sets, prompts, memory."""
    speeds, work = bench.speeds, bench.work
    table = Table(title=f"{bench.engine}, {bench.dtype}, after {work.context} tokens", box=box.SIMPLE_HEAD)
    for column in ("", *(speed.name for speed in speeds)):
        table.add_column(column, justify="right" if column else "left", overflow="fold")

    def add(name: str, values: Iterable[str]) -> None:
        table.add_row(name, *values)

    add("read a token", (_megabytes(speed.bytes_per_token) for speed in speeds))
    add("fewer bytes", (f"{speeds[0].bytes_per_token / speed.bytes_per_token:.2f}x" for speed in speeds))
    for decodings in zip(*(speed.decoding for speed in speeds), strict=True):
        table.add_section()
        add(f"tokens/s, batch {decodings[0].batch}", (_rate(one.tokens_per_second) for one in decodings))
        add("  from ... to", (" ... ".join(_rate(end(one.rounds)) for end in (min, max)) for one in decodings))
        add("  ceiling", (_rate(one.ceiling) for one in decodings))
        add("  weights read", (f"{one.bytes_per_second / 1e9:,.1f} GB/s" for one in decodings))
        add("  of the bandwidth", (f"{one.share:.0%}" for one in decodings))
        add("  speed-up", (f"{one.speedup:.2f}x" for one in decodings))
    table.add_section()
    add("time to first token", (f"{speed.first_token * 1e3:,.0f} ms" for speed in speeds))
    if work.prefill:
        add(f"prompt of {work.prefill}, tokens/s", (_rate(speed.prefill or 0) for speed in speeds))
        add("  speed-up", (f"{speed.prefill_speedup or 0:.2f}x" for speed in speeds))
    if all(speed.peak_memory for speed in speeds):
        add("peak memory", (_megabytes(speed.peak_memory or 0) for speed in speeds))
        add("load time", (f"{speed.load_seconds or 0:.1f} s" for speed in speeds))
    return table


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def demo_table(demo: Demo) -> Table:
    """Before and after, in one table."""
    table = Table(title="the same function with fewer weights", box=box.SIMPLE_HEAD)
    for column in ("", "original", "fused", ""):
        table.add_column(column, justify="left" if not column else "right")
    before, after = demo.plan.parameters
    table.add_row("parameters", f"{before:,}", f"{after:,}", f"{after / before - 1:.1%}")
    original, fused = demo.bench.speeds
    table.add_row("MB in float32", _megabytes(4 * before), _megabytes(4 * after), f"{after / before - 1:.1%}")
    table.add_row(
        "MB read a token",
        _megabytes(original.bytes_per_token),
        _megabytes(fused.bytes_per_token),
        f"{fused.bytes_per_token / original.bytes_per_token - 1:.1%}",
    )
    for row in demo.report.rows:
        if row.judged:
            table.add_row(f"logit error in {row.dtype}", f"{row.a.error:.1e}", f"{row.b.error:.1e}", "")
    table.add_row("generated tokens", "", "the same" if demo.same_tokens else Text("different", "red"), "")
    table.add_row("cache", *(Text("broken", "red") if problem else "as without it" for problem in demo.caches), "")
    table.add_row(
        "tokens/s, batch 1",
        _rate(original.decoding[0].tokens_per_second),
        _rate(fused.decoding[0].tokens_per_second),
        f"{fused.decoding[0].speedup:.2f}x",
    )
    return table


def _megabytes(size: int) -> str:
    return f"{size / MEGABYTE:,.1f} MB"


def count_rows(counts: Sequence[Count], batch: int = 1) -> list[tuple[str, ...]]:
    """A table of counts, as text: a row of names, then a row for each thing that is counted. batch: a step's tokens."""
    rows = [("", *(printable(count.name) for count in counts))]

    def add(label: str, value: Callable[[Count], object]) -> None:
        values = [value(count) for count in counts]
        rows.append((label, *(f"{item:,}" if isinstance(item, int) else str(item) for item in values)))

    def shape(count: Count) -> str:
        a = count.architecture
        attention = "MHA" if a.query_width == a.value_width else "MQA" if a.num_key_value_heads == 1 else "GQA"
        ffn = f"{a.num_local_experts} experts" if a.ffn_type == "moe" else a.ffn_type.upper()
        return f"{a.block_type}, {attention}, {ffn}"

    add("family", lambda count: count.family)
    add("layer", shape)
    add("d, layers", lambda count: f"{count.architecture.hidden_size:,}, {count.architecture.num_hidden_layers}")
    add(
        "heads, kv heads, head_dim",
        lambda count: (
            f"{count.architecture.num_attention_heads}, {count.architecture.num_key_value_heads}, "
            f"{count.architecture.head_dim}"
        ),
    )
    add(
        "e, f, vocabulary",
        lambda count: (
            f"{count.architecture.value_width:,}, {count.architecture.intermediate_size:,}, "
            f"{count.architecture.vocab_size:,}"
        ),
    )
    for letter in "qkvpmo":
        rows.append((f"{letter.upper()} a layer", *(f"{count.per_layer[letter]:,}" for count in counts)))
    add("embeddings", lambda count: f"{count.embeddings:,}{' (tied)' * count.architecture.tie_word_embeddings}")
    add("weights", lambda count: count.weights)
    add("parameters", lambda count: count.parameters)
    for name, what in (("qp", "Q and P"), ("kp", "K and P"), ("vp", "V and P")):
        rows.append((f"without {what}, trained so", *(_removal(count.nominal[name]) for count in counts)))
    add("exactly, if skipless", lambda count: _removal(count.exact))
    add("at most, if skipless", lambda count: f"{count.limit:,} ({count.limit / count.weights:.1%})")
    add("of that, by all seams", lambda count: f"{count.everything:,} ({count.everything / (count.limit or 1):.2%})")
    add("exactly, as it is", lambda count: f"{(gone := sum(count.as_is.values())):,} ({gone / count.parameters:.1%})")
    add("of that, by fuse", lambda count: "-" if count.by_fuse is None else f"{count.by_fuse:,}")
    add("of that, --layout skipless", lambda count: "-" if count.left_out is None else f"{count.left_out:,}")
    add("layer 0 as a table", lambda count: _looked_up(count, batch))
    return rows


def _looked_up(count: Count, batch: int) -> str:
    """What precomputing layer 0 adds, and by what factor a step then reads less of it."""
    if count.first_layer is None:
        return "-"
    before, after = count.first_layer.reads(batch)
    return f"{count.first_layer.grows:+,} ({count.first_layer.grows / count.weights:+.1%}), {before / after:,.0f}x"


def limit_table(limit: Limit) -> Table:
    """What carries no information, and what rewriting removes of it."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("without information")
    table.add_column("parameters", justify="right")
    for name, count in limit.terms.items():
        table.add_row(name, f"{count:,}")
    total = f"{'at least ' * bool(limit.at_least)}{limit.removable:,}"
    table.add_row("together", f"{total} ({limit.removable / limit.parameters:.2%} of {limit.parameters:,})")
    removed = sum(limit.removed.values())
    for kind, count in limit.removed.items():
        table.add_row(f"removed with --remove {kind}", f"{count:,}")
    table.add_row("removed together", f"{removed:,} ({removed / (limit.removable or 1):.2%} of that)")
    return table


def limit_lines(limit: Limit, certificate: Certificate | None) -> Iterator[str]:
    """What stays, and the count of a small copy."""
    yield from limit.blocked
    if limit.at_least:
        yield f"there may be more: {limit.at_least}"
    if certificate is not None:
        before, after = certificate.before, certificate.after
        least = "" if certificate.exact else "at least "
        yield (
            f"small copy: {before.parameters:,} parameters, rank {before.rank:,}: {before.free:,} without information, "
            f"{least}{certificate.expected:,} by the formula"
        )
        if after is not None:
            yield (
                f"fused ({', '.join(certificate.kinds)}): {after.parameters:,} parameters, rank {after.rank:,}: "
                f"{after.free:,} without information and in no block that could be removed"
            )
        yield "the certificate holds" if certificate.holds else "the certificate does not hold"


def count_notes(counts: Sequence[Count], conditions: Conditions) -> Iterator[str]:
    """What the numbers of count_rows mean, and what stays."""
    machine = ""
    if conditions.bandwidth and conditions.peak:
        machine = f", at {conditions.bandwidth / 1e9:g} GB/s and {conditions.peak / 1e12:g} TFLOP/s (roofline)"
    yield (
        f"speed-up: decoding at batch {conditions.batch} with {conditions.context:,} tokens of context, by what is "
        f"read of {conditions.dtype} weights and {conditions.cache_dtype} cache{machine}"
    )
    yield (
        f"layer 0 as a table (arXiv:2402.13388): of what it makes of each token before any attention: weights added, "
        f"less those that go, and how many times fewer of these a step of batch {conditions.batch} reads"
    )
    for count in counts:
        if reason := count.architecture.first_layer_stays:
            yield f"{count.name}: no layer 0 as a table: {reason}"
        for reason in count.exact.blocked:
            yield f"{count.name}, if skipless: {reason}"
        d, own = count.architecture.hidden_size, count.architecture.own_state
        if own < d:
            yield (
                f"{count.name}, if skipless: of a token's own state, V passes {own:,} of {d:,} dimensions a layer; MHA "
                "and parallel layers pass all (docs/train.md)"
            )
        if count.architecture.query_width != count.architecture.hidden_size:
            yield f"{count.name}: Q is not square, so 'trained so' counts Q and P without saying what replaces them"


def paper_rows(pairs: Sequence[tuple[Count, Count]]) -> list[tuple[str, ...]]:
    """The paper's table, arXiv:2404.12362."""
    counts = [counted for counted, _ in pairs]
    rows = _paper_shapes(counts)
    left = [c.weights - c.parts["q"] - c.parts["p"] for c in counts]
    ratios = [c.weights / weights for c, weights in zip(counts, left, strict=True)]
    rows.append(("total without Q+P", *map(_billions, left)))
    rows.append(("saved", *(f"{1 - weights / c.weights:.0%}" for c, weights in zip(counts, left, strict=True))))
    rows.append(("possible batch-1 decode speed-up", *(f"{ratio:.2f}x" for ratio in ratios)))
    return rows


def _paper_shapes(counts: Sequence[Count], experts: bool = False) -> list[tuple[str, ...]]:
    """What both papers' tables say of models before anything is removed. experts: whether they have a row."""
    rows = [("", *(count.name for count in counts))]

    def add(label: str, *values: str) -> None:
        rows.append((label, *values))

    add("d, layers", *(f"{c.architecture.hidden_size}, {c.architecture.num_hidden_layers}" for c in counts))
    add(
        "heads, kv heads",
        *(f"{c.architecture.num_attention_heads}, {c.architecture.num_key_value_heads}" for c in counts),
    )
    add("e", *(f"{c.architecture.value_width}" for c in counts))
    add("f, vocab", *(f"{c.architecture.intermediate_size}, {c.architecture.vocab_size}" for c in counts))
    if experts:
        add("experts", *(f"{c.architecture.num_local_experts or 1}" for c in counts))
    for label, letters in (("Q+P a layer", "qp"), ("K+V a layer", "kv"), ("FFN a layer", "mo")):
        add(label, *(f"{sum(c.per_layer[letter] for letter in letters):,}" for c in counts))
    add("embeddings (in + out)", *(f"{c.embeddings:,}" for c in counts))
    add("total", *(_billions(c.weights) for c in counts))
    return rows


def _billions(weights: int) -> str:
    return f"{weights / 1e9:.1f}B"


def first_layer_paper(pairs: Sequence[tuple[Count, Count]]) -> list[list[tuple[str, ...]]]:
    """The two tables of arXiv:2402.13388; in the second, layers of experts count as parallel ones."""
    counts = [counted for counted, _ in pairs]
    parallel = [in_parallel(c) if c.architecture.ffn_type == "moe" else c for c in counts]
    layers = [each for c in parallel if (each := c.first_layer) is not None]
    names = (f"{c.name}{', parallel' * (c is not before)}" for c, before in zip(parallel, counts, strict=True))
    rows = [("", *names)]
    rows.append(("weights that go", *(f"{each.removed:,}" for each in layers)))
    for label, number in (("before", 0), ("after", 1)):
        rows.append((f"reads {label}, batch 1", *(f"{each.reads(1)[number]:,}" for each in layers)))
    for batch in (1, 16, 256, 1024):
        reads = (each.reads(batch) for each in layers)
        rows.append((f"fewer, batch {batch:,}", *(f"{before / after:,.0f}x" for before, after in reads)))
    rows.append(("embeddings grow by", *(f"{each.added:,}" for each in layers)))
    rows.append(("memory grows by", *(f"{each.grows:,}" for each in layers)))
    shares = (each.grows / c.weights for each, c in zip(layers, parallel, strict=True))
    rows.append(("of all weights", *(f"{share:.0%}" for share in shares)))
    return [_paper_shapes(counts, experts=True), rows]


def paper_notes(pairs: Sequence[tuple[Count, Count]], first: bool = False) -> Iterator[str]:
    """What the papers' numbers are, and where a published config differs from what they count. first: of the first
    layer's paper.
    """
    if first:
        yield "the paper's reads are of layer 0 alone: a row of the table for each token, and the weights that go, once"
    else:
        yield "the paper's speed-up is the ratio of all weights, embeddings included"
    for counted, published in pairs:
        if (theirs := counted.architecture.vocab_size) != (ours := published.architecture.vocab_size):
            yield (
                f"{counted.name}: the paper's vocabulary is {theirs:,}, the published config's {ours:,}: its "
                f"embeddings have {published.embeddings:,} weights"
            )
        if first and counted.architecture.ffn_type == "moe":
            router = counted.architecture.hidden_size * counted.architecture.num_local_experts
            yield (
                f"{counted.name}: a parallel version is hypothetical; the paper leaves its router's {router:,} weights "
                f"out"
            )


def count_table(rows: Sequence[tuple[str, ...]]) -> Table:
    """Rows of count_rows or paper_rows for a terminal."""
    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def markdown(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|---|{'---:|' * (len(rows[0]) - 1)}", *lines[1:]])


def _removal(removal: Saving | None) -> str:
    if removal is None:
        return "-"
    return f"{removal.removed:,} ({removal.saving:.1%}), {removal.speedup:.2f}x"

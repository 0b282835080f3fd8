"""What verify has found, in the model card of what fuse has written."""

from collections.abc import Iterator
from pathlib import Path

from skipless.reports.verification import Report
from skipless.rewrite.card import named, plain, put_verified
from skipless.version import __version__


def write_verdict(report: Report, a: Path, b: Path) -> None:
    """Write a report that says B is the same function as A into B's card. Raises as put_verified does."""
    assert report.same
    put_verified(b, _lines(report, named(str(a))))


def _lines(report: Report, original: str) -> Iterator[str]:
    yield f"By `skipless verify` {__version__}, compared with {plain(original)}: {report.note}."
    yield ""
    yield "| run in | error | at most | the original's own | KL, nats | top-1 equal | greedy tokens equal |"
    yield "|---|---|---|---|---|---|---|"
    for row in report.rows:
        error, *others = row.b.cells()
        cells = (row.dtype, error, f"{row.limit:.1e}", row.a.cells()[0], *others)
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield (
        f"An error is the root mean square difference of a token's logits from the original's in float64, over their "
        f"standard deviation, on {report.tokens_seen:,} of {report.vocab_size:,} tokens."
    )
    yield ""
    yield from (f"- {line}" for line in report.covered())

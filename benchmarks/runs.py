"""The runs of benchmarks/pays.py, as its CSV has them."""

import csv
import math
import statistics
from pathlib import Path

Row = dict[str, str]


def read(file: Path) -> list[Row]:
    """The runs that are done; of a last line that was cut short, nothing."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def losses(rows: list[Row]) -> list[float]:
    return [float(row["held_out_loss"]) for row in rows]


def ended(rows: list[Row]) -> list[Row]:
    """Those whose loss is a number."""
    return [row for row in rows if not math.isnan(float(row["held_out_loss"]))]


def final(rows: list[Row], size: str, kind: str) -> dict[float, list[Row]]:
    """The final runs of a kind, by learning rate."""
    found: dict[float, list[Row]] = {}
    for row in rows:
        if (row["size"], row["kind"], row["phase"]) == (size, kind, "final"):
            found.setdefault(float(row["rate"]), []).append(row)
    return found


def best(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """The final runs of each size and kind at one rate: that of the most seeds whose loss is a number, then the least.

    Those whose loss is not a number are among them.
    """

    def order(group: list[Row]) -> tuple[int, float]:
        found = losses(ended(group))
        return -len(found), statistics.mean(found) if found else math.nan

    kinds = dict.fromkeys((row["size"], row["kind"]) for row in rows if row["phase"] == "final")
    return {kind: min(final(rows, *kind).values(), key=order) for kind in kinds}

"""A terminal on which text means what it says, whoever wrote it, and on which no number is cut in two."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from skipless.errors import printable

# Wider than any table.
ENDLESS = 10**5


class Terminal(Console):
    """Prints each str as it is, as one line: no markup ([red]), no emoji (:cat:), and control characters are escaped.

    What is to be coloured is a rich Text.
    """

    def __init__(self, stderr: bool = False):
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich does it, with every character that does not print escaped."""
        return super().render_str(printable(text), **options)

    def print_lines(self, text: str) -> None:
        """Print a text of our own of several lines."""
        for line in text.split("\n"):
            self.print(line, soft_wrap=True)

    def print_table(self, table: Table) -> None:
        """Print a table, in parts with some of its columns each if they do not fit side by side word by word."""
        for part in self._parts(table):
            self.print(part)

    def _parts(self, table: Table) -> Iterator[Table]:
        """Each has the columns of labels, which stand on the left, and as many others as fit."""
        first = len(list(takewhile(lambda column: column.justify == "left", table.columns[:-1]))) or 1
        labels, others = table.columns[:first], table.columns[first:]
        while others:
            count = len(others)
            while count > 1 and self._measured(_with(table, [*labels, *others[:count]])).minimum > self.width:
                count -= 1
            part = _with(table, [*labels, *others[:count]])
            self._lay_out(part)
            yield part
            table, others = _with(table, table.columns, title=None), others[count:]

    def _lay_out(self, table: Table) -> None:
        """If a table does not fit but its words do, make its widest columns narrower, none narrower than a word."""
        whole = self._measured(table)
        if not whole.minimum <= self.width < whole.maximum:
            return
        cells = ([self._measured(cell) for cell in (column.header, *column.cells)] for column in table.columns)
        columns = [Measurement(*map(max, zip(*measured, strict=True))) for measured in cells]
        room = self.width - whole.minimum + sum(column.minimum for column in columns)

        def widths(most: int) -> list[int]:
            return [max(column.minimum, min(column.maximum, most)) for column in columns]

        most = max(most for most in range(self.width) if sum(widths(most)) <= room)
        for column, width in zip(table.columns, widths(most), strict=True):
            column.width = width

    def _measured(self, content: Any) -> Measurement:
        """Of a table or a cell: how wide its longest words are, and how wide it is whole."""
        return Measurement.get(self, self.options.update(width=ENDLESS), content)


def _with(table: Table, columns: Sequence[Column], **others: Any) -> Table:
    """A table that has these columns of another's."""
    part = copy.copy(table)
    part.columns = [dataclasses.replace(column, _index=number) for number, column in enumerate(columns)]
    for name, value in others.items():
        setattr(part, name, value)
    return part

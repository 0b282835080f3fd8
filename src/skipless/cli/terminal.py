"""A terminal on which text means what it says, whoever wrote it."""

from typing import Any

from rich.console import Console
from rich.text import Text

from skipless.errors import printable


class Terminal(Console):
    """Prints each str as one line: [red] is no markup, :cat: no picture, and control characters are escaped.

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

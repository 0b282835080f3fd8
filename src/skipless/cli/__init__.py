"""The command line: one module a command, tables, plots and bars. Imports everything; nothing imports it."""

from skipless.cli.group import main

__all__ = ["main"]

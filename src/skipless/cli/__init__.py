"""The command line: one function a command, tables, plots and bars. Imports everything; nothing imports it."""

from skipless.cli.commands import main

__all__ = ["main"]

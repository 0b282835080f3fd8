"""The library's log. What it quotes - names of files, of tensors, values of configs - cannot control a terminal."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from skipless.errors import printable


class Printable(logging.Filter):
    """Makes each record one line, with every character that does not print escaped, whatever handles it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Put the escaped message in the record; it is always logged."""
        record.msg, record.args = printable(record.getMessage()), None
        return True


logger = logging.getLogger("skipless")
logger.addFilter(Printable())


class PrintableRecord(logging.LogRecord):
    """A record whose message is such a line."""

    def getMessage(self) -> str:  # noqa: N802  (logging's name)
        """The escaped message."""
        return printable(super().getMessage())


def is_first() -> bool:
    """Whether this is the process that prints and writes: the first of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes torchrun has started; 1 where it has not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def printable_logs() -> Iterator[None]:
    """Other libraries' records are such lines, too, inside the block; afterwards as before."""
    factory = logging.getLogRecordFactory()
    logging.setLogRecordFactory(PrintableRecord)
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)

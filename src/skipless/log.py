"""The library's log. What it quotes - names of files, of tensors, values of configs - cannot control a terminal."""

import logging
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


@contextmanager
def printable_logs() -> Iterator[None]:
    """Other libraries' records are such lines, too, inside the block; afterwards as before."""
    factory = logging.getLogRecordFactory()
    logging.setLogRecordFactory(PrintableRecord)
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)

"""The library's log. What it quotes - names of files, of tensors, values of configs - cannot control a terminal."""

import logging

from skipless.errors import printable


class Printable(logging.Filter):
    """Makes each record one line, with every character that does not print escaped, whatever handles it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Put the escaped message in the record; it is always logged."""
        record.msg, record.args = printable(record.getMessage()), None
        return True


logger = logging.getLogger("skipless")
logger.addFilter(Printable())

"""What a user can be told: input that cannot be used (exit code 2), or that we have made a mistake (3)."""

from collections.abc import Iterator
from contextlib import contextmanager

# Characters of a message: room for a path (4,096 at most) and what is to be said of it.
LONGEST = 6000
# Exit code of Ctrl-C, as a shell counts it: 128 + SIGINT.
INTERRUPTED = 130


class InputError(ValueError):
    """Bad input or usage. The message is one line: tensor or field, expected, found, what to do.

    Whatever it quotes: characters that do not print are escaped, and of more than LONGEST the middle is left out.
    """

    def __init__(self, message: str):
        super().__init__(_shortened(printable(_shortened(message))))


def printable(text: str) -> str:
    """Text from outside - a file's name, a value - as one line that cannot control a terminal: what does not print is
    escaped.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2 - 3
    return f"{text[:half]} ... {text[-half:]}"


class StorageError(InputError):
    """Reading or writing has failed, not what was read: another attempt may succeed."""


class DisagreementError(InputError):
    """What was computed twice is not the same: which is right is not known, and nothing can be kept."""


class BugError(Exception):
    """What came out is not what was promised, and no input is to blame (exit code 3)."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports that need an extra of this name. Raises InputError where they fail."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{name}: expected the [{name}] extra, found no {error.name}; pip install 'skipless[{name}]'"
        ) from error

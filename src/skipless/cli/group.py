"""The command line: parse, call, print, and every error in its form."""

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from skipless import __version__
from skipless.cli.commands import audit, bench, count, demo, export, fuse, limit, refresh, report, train, verify
from skipless.cli.help import COMPLETION, add_help
from skipless.cli.output import err
from skipless.errors import INTERRUPTED, InputError, printable
from skipless.log import printable_logs


class Usage(click.ClickException):
    """A usage error, in one line, exit code 2."""

    exit_code = 2

    def __init__(self, error: click.ClickException):
        context = getattr(error, "ctx", None)
        advice = "" if context is None else f"; see {context.command_path} --help"
        super().__init__(f"{printable(error.format_message()).rstrip('.')}{advice}")

    def show(self, file: Any = None) -> None:
        """Print it."""
        err.print(f"skipless: {self.message}", style="red", soft_wrap=True)


@contextmanager
def _usage_errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.ClickException as error:
        raise Usage(error) from None


class Group(click.Group):
    """A click group that turns bad input into one line on stderr and exit code 2."""

    def make_context(self, *arguments: Any, **others: Any) -> click.Context:
        """As click does."""
        with _usage_errors_in_one_line():
            return super().make_context(*arguments, **others)

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that files are cleaned up
        try:
            with printable_logs(), _usage_errors_in_one_line():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise  # usage, --help
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except (InputError, OSError) as error:
            err.print(f"skipless: {error}", style="red", soft_wrap=True)
            sys.exit(2)
        except Exception as error:  # a traceback's usual exit code, 1, would say "not the same function"
            for part in traceback.format_exception(error):  # of these, frames alone have several lines of ours
                (err.print_lines if part.startswith("  File ") else err.print)(part.strip("\n"))
            err.print("skipless: this is a bug in skipless; please report it with the lines above", style="red")
            sys.exit(3)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]}, epilog=COMPLETION)
@click.version_option(__version__)
def main() -> None:
    """Remove, exactly, the weights a transformer without skip connections does not need.

    Exit codes: 0 done, 1 the answer is no (not the same function), 2 bad input or usage, 3 a bug.
    """


for command in (
    demo.demo,
    audit.audit,
    fuse.fuse,
    verify.verify,
    report.report,
    count.count_command,
    limit.limit_command,
    export.export,
    refresh.refresh,
    bench.bench,
    train.train,
):
    add_help(command)
    main.add_command(command)

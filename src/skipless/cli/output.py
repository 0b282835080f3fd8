"""Where results go, stdout, and everything else, stderr; bars of what is under way."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from skipless.cli.terminal import Terminal
from skipless.log import is_first

out = Terminal()
err = Terminal(stderr=True)


def plain(value: Any) -> Any:
    """A value as JSON can say it: what it has no number for (infinity, NaN) becomes null."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(plain(value), allow_nan=False))


def _progress(verb: str, *columns: ProgressColumn) -> Progress:
    """On stderr, if that is a terminal, of one process; it goes when it is done."""
    first = (TextColumn(verb, markup=False), BarColumn(bar_width=20))
    shown = err.is_terminal and is_first()
    return Progress(*first, *columns, console=err, transient=True, disable=not shown)


def _shown(bar: Progress) -> AbstractContextManager[Any]:
    """The bar, if it is shown: an old rich ends also one that is not with an empty line."""
    return nullcontext() if bar.disable else bar


@contextmanager
def waiting(verb: str) -> Iterator[None]:
    """A bar that moves, and the time, for work of which nobody knows how long it takes."""
    bar = _progress(verb, TimeElapsedColumn())
    bar.add_task("", total=None)
    with _shown(bar):
        yield


@contextmanager
def count_bar(verb: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar for work of equal steps, called with how many are done, of how many (None: nobody knows)."""
    bar = _progress(verb, MofNCompleteColumn(), TimeRemainingColumn())
    number = bar.add_task("", total=None)
    with _shown(bar):
        yield lambda done, total: bar.update(number, completed=done, total=total)


@contextmanager
def step_bar(verb: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for work of named steps, called with what is done next, steps done, and their number."""
    bar = _progress(verb, MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
    number = bar.add_task("", total=None)
    with _shown(bar):
        yield lambda step, done, total: bar.update(number, description=step, completed=done, total=total)


@contextmanager
def work_bar(verb: str) -> Iterator[Callable[[Any, Any], None]]:
    """A bar for fuse's `progress`, by FLOPs and bytes, with GFLOP/s and the time left; then for what it checks."""
    bar = _progress(verb, TaskProgressColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    number = bar.add_task("", total=None, rate="")
    last, done = time.monotonic(), 0

    def advance(plan: Any, task: Any) -> None:
        nonlocal last, done
        from skipless.rewrite.cost import cost

        now = time.monotonic()
        if task is None:
            bar.update(number, total=sum(cost(plan, each).total + plan.moved(each) for each in plan.tasks))
        else:
            done += 1
            flops = cost(plan, task).total
            bar.update(number, advance=flops + plan.moved(task))
            if flops:
                bar.update(number, rate=f"{flops / (now - last) / 1e9:,.0f} GFLOP/s")
            if done == len(plan.tasks):
                bar.update(number, visible=False)
                bar.add_task("", total=None, rate="checking what was written")
        last = now

    with _shown(bar):
        yield advance


def tell_of_other_model_files(*folders: Path) -> None:
    """Say of each folder whose model files are not this version's that they are not, in a line on stderr."""
    from skipless.rewrite.model_files import other_model_files

    for folder in folders:
        if folder.is_dir() and (others := other_model_files(folder)):
            line = f"{folder}: {' and '.join(others)}: not this version's; to replace: skipless refresh {folder}"
            err.print(line, soft_wrap=True)

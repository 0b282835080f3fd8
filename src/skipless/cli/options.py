"""Options that commands have in common, and what they are parsed to."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from skipless.architecture.folds import FOLDS
from skipless.architecture.seams import AUTO, BASES, KINDS, PARALLEL_REMOVES, REMOVABLE
from skipless.dtypes import DTYPE_NAMES
from skipless.errors import InputError

as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of a table.")


def removal_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What fuse is asked for, and audit asked about."""
    options = [
        click.option(
            "--basis",
            type=click.Choice([AUTO, *BASES]),
            default=AUTO,
            show_default=True,
            help="What becomes the identity: q_proj (k, v: MHA only), or the best columns of all three.",
        ),
        click.option(
            "--dtype", type=click.Choice(DTYPE_NAMES), help="Store every tensor in this dtype [default: as it is]."
        ),
        click.option(
            "--rest-dtype",
            type=click.Choice(["float32"]),
            help="Store rest_proj, what pivoted leaves of Q, K, V, in this dtype.",
        ),
        click.option("--layers-open", default="", metavar="I,J,...", help="Layers that keep their projections."),
        click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu or cuda."),
        click.option(
            "--remove",
            metavar="KINDS",
            help=f"Kinds of seams to close: of {', '.join(KINDS)} [default: {','.join(REMOVABLE)}]. Of a model with "
            f"skips and norms: of {', '.join(FOLDS)} [default: all].",
        ),
        click.option(
            "--parallel-removes",
            type=click.Choice(PARALLEL_REMOVES),
            default=PARALLEL_REMOVES[0],
            show_default=True,
            help="What a parallel model loses: Q (or what the basis says), or P.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def known_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes the names that count and limit know, or else files."""
    from skipless.reports.counting import table

    names = [CompletionItem(name) for name in table()["models"] if name.startswith(incomplete)]
    return names or [CompletionItem(incomplete, type="file")]


def expect_weights(model: str | Path) -> None:
    """Refuse a name that count and limit know where weights are needed: such a name has none."""
    from skipless.reports.counting import table

    if str(model).lower() in table()["models"] and not Path(model).exists():
        raise InputError(
            f"{model}: expected a model folder, found a known name, of which there is only the config: ask skipless "
            f"count {model}, and skipless limit {model} for what blocks a removal"
        )


def parse_removal(layers_open: str, remove: str | None, **others: Any) -> dict[str, Any]:
    """The values of removal_options as fuse and audit take them."""
    return {
        "layers_open": parse_layers(layers_open),
        "remove": None if remove is None else tuple(kind.strip() for kind in remove.split(",")),
        **others,
    }


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"--layers-open: expected layer numbers with commas between them, found {text!r}") from None


def parse_size(option: str, text: str) -> int:
    """A size such as 5GB or 200MB in bytes."""
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?) ?(MB|GB)", text.strip().upper())
    size = int(float(match[1]) * {"MB": 10**6, "GB": 10**9}[match[2]]) if match else 0
    if size < 1:
        raise InputError(f"{option}: expected a number and MB or GB, such as 5GB; found {text!r}")
    return size

"""What `--help` says of each command beside its own text: a line in the list of all, examples, exit codes."""

from dataclasses import dataclass

import click


@dataclass(frozen=True)
class Page:
    """What `--help` adds to a command's own text.

    short: what it is for, in a few words. examples: what a user types; my-model is a skipless model folder, fused what
    fuse has made of it. no: what exit code 1 means.
    """

    short: str
    examples: tuple[str, ...]
    no: str = ""


PAGES = {
    "demo": Page("Try all of it on the bundled model", ("skipless demo",), "not the same function"),
    "audit": Page(
        "What can be removed, and is it safe?",
        ("skipless audit my-model", "skipless audit my-model --dtype bfloat16 --json"),
        "what the options ask for is not safe",
    ),
    "fuse": Page(
        "Remove it: write the smaller model",
        (
            "skipless fuse my-model fused",
            "skipless fuse my-model fused16 --dtype bfloat16",
            "skipless fuse my-model another --dry-run",
        ),
    ),
    "verify": Page(
        "Are two models the same function?",
        ("skipless verify my-model fused", "skipless verify fused"),
        "not the same function, or not as it was written",
    ),
    "report": Page(
        "Show it on one HTML page, with plots",
        ("skipless report my-model fused --html report.html",),
        "not the same function",
    ),
    "count": Page(
        "How many weights, and how many could go?",
        ("skipless count mistral-7b gpt2", "skipless count my-model/config.json --markdown"),
    ),
    "limit": Page(
        "How much carries no information?",
        ("skipless limit mistral-7b", "skipless limit my-model --check"),
        "--check counts other than the formula",
    ),
    "export": Page("Write a model for another engine", ("skipless export fused fused-onnx --to onnx",)),
    "refresh": Page("Renew the model files of a folder", ("skipless refresh fused --dry-run",)),
    "bench": Page(
        "Time models in turns",
        ("skipless bench my-model fused --dtype bfloat16",),
        "a model's cache is broken",
    ),
    "train": Page(
        "Train a skipless model",
        ("skipless train stdlib trained", "skipless train stdlib trained --resume"),
    ),
    "eval": Page(
        "Loss and perplexity on a text",
        ("skipless eval trained --data 'texts/*.txt'", "skipless eval trained --data held-out.jsonl"),
    ),
}
COMPLETION = """\b
Complete commands, options and names with Tab, in bash:
  eval "$(_SKIPLESS_COMPLETE=bash_source skipless)"
in zsh:
  eval "$(_SKIPLESS_COMPLETE=zsh_source skipless)"
in fish:
  _SKIPLESS_COMPLETE=fish_source skipless | source
The line can stand in ~/.bashrc, ~/.zshrc or config.fish."""


def exit_codes(page: Page) -> dict[int, str]:
    """What a command exits with, and what that means."""
    no = {1: f"no: {page.no}"} if page.no else {}
    return {0: "done", **no, 2: "bad input or usage, in one line", 3: "a bug in skipless", 130: "stopped by Ctrl-C"}


def add_help(command: click.Command) -> None:
    """Give a command its page."""
    page = PAGES[str(command.name)]
    examples = "\n".join(f"  {example}" for example in page.examples)
    codes = "\n".join(f"  {code:<4} {meaning}" for code, meaning in exit_codes(page).items())
    command.short_help = page.short
    command.epilog = f"\b\nExamples:\n{examples}\n\n\b\nExit codes:\n{codes}"  # \b: its lines stay as they are

"""What a terminal shows: help with examples that run, completion, tables of any width, colours, bars."""

import inspect
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.table import Table

from skipless import cli
from skipless.architecture.folds import FOLDS
from skipless.architecture.seams import AUTO, BASES, KINDS
from skipless.bundled import BUNDLED
from skipless.cli import output
from skipless.cli.help import PAGES, exit_codes
from skipless.cli.terminal import Terminal
from skipless.rewrite.executors import EXECUTORS
from skipless.serving.engines import ENGINES
from tests.models import build, save

EXAMPLES = [example for page in PAGES.values() for example in page.examples]
# Of these, what takes minutes is only parsed: training, and what other tests run.
LONG = ("skipless demo", "skipless train", "skipless eval")


def run(*arguments, code=0, **settings):
    result = CliRunner().invoke(cli.main, list(map(str, arguments)), **settings)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """my-model, fused and, in the order of the list, what the examples write."""
    folder = tmp_path_factory.mktemp("examples")
    save(build(max_position_embeddings=1024), folder / "my-model")
    return folder


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("name", ["", *PAGES])
def test_help_fits_and_has_examples_and_exit_codes(name, width):
    text = run(*name.split(), "--help", terminal_width=width).stdout
    assert max(map(len, text.splitlines())) <= width
    if not name:
        assert all(page.short in text for page in PAGES.values())
        return
    lines = [line.strip() for line in text.splitlines()]
    assert set(PAGES[name].examples) <= set(lines)
    for code, meaning in exit_codes(PAGES[name]).items():
        assert f"{code:<4} {meaning}" in lines
    assert (1 in exit_codes(PAGES[name])) == ("sys.exit(1 if " in source(name) or "sys.exit(0 if " in source(name))


def source(name):
    return inspect.getsource(inspect.getmodule(inspect.unwrap(cli.main.commands[name].callback)))


def test_every_command_has_a_page():
    assert cli.main.commands.keys() == PAGES.keys()


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_can_be_parsed(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, name, *arguments = shlex.split(example)
    assert program == "skipless"
    cli.main.commands[name].make_context(name, arguments)


def on_a_terminal(monkeypatch, yes):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(output.err, "_force_terminal", yes)
    monkeypatch.setattr(output.err, "is_interactive", yes)


@pytest.mark.slow
def test_examples_run_one_after_the_other_with_bars_where_it_takes_long(folder, monkeypatch):
    monkeypatch.chdir(folder)
    on_a_terminal(monkeypatch, True)
    bars = {"export": "exporting for onnx", "bench": "timing", "report": "reporting"}
    bars |= {"limit my-model --check": "counting", "fuse my-model another --dry-run": "planning"}
    order = ("fuse", "audit", "verify", "report", "count", "limit", "export", "refresh", "bench")
    examples = [example for example in EXAMPLES if not example.startswith(LONG)]
    for example in sorted(examples, key=lambda example: order.index(example.split()[1])):
        _, command = example.split(" ", 1)
        shown = run(*shlex.split(command)).stderr
        assert bars.get(command, bars.get(command.split()[0], "")) in shown


def completed(words, shell="bash"):
    environment = {**os.environ, "_SKIPLESS_COMPLETE": f"{shell}_complete", "COMP_WORDS": words}
    environment |= {"COMP_CWORD": str(len(shlex.split(words)) - (not words.endswith(" ")))}
    code = "from skipless import cli; cli.main(prog_name='skipless')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("skipless au", ["audit"]),
        ("skipless fuse a b --bas", ["--basis"]),
        ("skipless fuse a b --basis ", ["auto", "q", "k", "v", "pivoted"]),
        ("skipless count gpt-j", ["gpt-j-6b"]),
        ("skipless limit my-", ["my-"]),
    ],
    ids=str,
)
def test_completion(words, found):
    assert completed(words) == found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_what_a_shell_reads(shell):
    assert f"_SKIPLESS_COMPLETE={shell}_source skipless" in run("--help").stdout
    environment = {**os.environ, "_SKIPLESS_COMPLETE": f"{shell}_source"}
    code = "from skipless import cli; cli.main(prog_name='skipless')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "_SKIPLESS_COMPLETE" in done.stdout
    if program := shutil.which(shell):
        subprocess.run([program, "-n" if shell != "fish" else "--no-execute"], input=done.stdout, text=True, check=True)


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize(
    "arguments",
    ["count mistral-7b llama-3.1-8b gpt2 pythia-6.9b", "limit gpt2", "count --paper", "count --paper 2402.13388"],
)
def test_no_number_is_cut_at_any_width(arguments, width, monkeypatch):
    monkeypatch.setattr(output.out, "_width", 1000)
    whole = run(*arguments.split()).stdout
    monkeypatch.setattr(output.out, "_width", width)
    text = run(*arguments.split()).stdout
    table = [line for line in text.splitlines() if "─" in line or line.startswith("  ")]
    assert max(map(len, table)) <= width
    assert "…" not in text
    assert set(whole.replace("─", "").split()) == set(text.replace("─", "").split())


@pytest.mark.slow
def test_an_audit_fits(monkeypatch):
    for width, parts in ((60, 6), (80, 5)):  # where a table is parted, layers are numbered again
        monkeypatch.setattr(output.out, "_width", width)
        text = run("audit", BUNDLED).stdout
        tables = text.partition("basis ")[0]
        assert max(map(len, tables.splitlines())) <= width
        assert "…" not in text
        assert tables.count("max|R|") == 1
        assert tables.count("layer") == parts


def test_a_word_that_is_wider_than_the_terminal_is_folded(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(terminal, "_width", 20)
    table = Table()
    table.add_column("name")
    table.add_column("value", overflow="fold")
    table.add_row("a", "0123456789" * 4)
    terminal.print_table(table)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 20
    assert sum(map(str.isdigit, shown)) == 40


@pytest.mark.parametrize(
    ("settings", "coloured"), [({"FORCE_COLOR": "1"}, True), ({}, False), ({"NO_COLOR": "1"}, False)]
)
def test_colours(settings, coloured):
    """NO_COLOR wins over a terminal; what is piped has none."""
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    if "NO_COLOR" in settings:
        settings = {**settings, "FORCE_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "skipless", "count", "no-such-model"],
        env={**environment, "TERM": "xterm-256color", **settings}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert ("\x1b[31m" in done.stderr) == coloured


@pytest.mark.parametrize(
    ("command", "verb"),
    [
        ("fuse my-model bar", "fusing"),
        ("audit my-model", "auditing"),
        ("verify my-model bar", "verifying"),
        ("verify bar", "reading"),
        pytest.param("demo", "timing", marks=pytest.mark.slow),
    ],
)
def test_what_takes_long_has_a_bar_on_a_terminal_alone(folder, command, verb, monkeypatch):
    monkeypatch.chdir(folder)
    if " bar" in command and verb != "fusing" and not Path("bar").exists():
        run("fuse", "my-model", "bar")
    on_a_terminal(monkeypatch, True)
    shown = run(*command.split()).stderr
    assert verb in shown
    if verb == "fusing":
        assert "checking what was written" in shown
    on_a_terminal(monkeypatch, False)
    if verb not in ("fusing", "timing"):  # of these once is enough
        assert verb not in run(*command.split()).stderr


# What takes seconds to import. Here it says so, and stops.
SLOW_TO_IMPORT = ("torch", "transformers", "numpy", "scipy", "datasets", "accelerate")
SAYS_SO = "import sys; print(f'importing {__name__}', file=sys.stderr, flush=True); sys.exit(9)"


@pytest.fixture(scope="module")
def nothing_to_import(tmp_path_factory):
    """The environment of a program in which these packages have no more than that."""
    folder = tmp_path_factory.mktemp("packages")
    for name in SLOW_TO_IMPORT:
        (folder / f"{name}.py").write_text(SAYS_SO)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR", "RANK")}
    return {**environment, "PYTHONPATH": path, "TERM": "xterm-256color"}


def shown_on_a_terminal(arguments, environment):
    """All that a program writes when stdout and stderr are one terminal."""
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "skipless", *arguments]
    with subprocess.Popen(command, env=environment, stdin=its, stdout=its, stderr=its):
        os.close(its)
        shown = b""
        with suppress(OSError):  # which the end of the program is
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    return shown.decode()


@pytest.mark.parametrize(
    "command",
    [
        "demo", "audit a", "fuse a b", "verify a b", "report a b --html page.html", "limit gpt2 --check",
        "export a b --to onnx", "bench a", "train stdlib a", "eval a --data b", f"count {BUNDLED}", f"limit {BUNDLED}",
        "refresh a",
    ],
)  # fmt: skip
def test_a_terminal_shows_a_bar_before_anything_slow_is_imported(command, nothing_to_import):
    before, importing, _ = shown_on_a_terminal(command.split(), nothing_to_import).partition("importing ")
    assert importing
    assert "starting" in before


def test_such_a_bar_has_no_colours_with_no_color_and_is_not_piped_nor_of_other_processes(nothing_to_import):
    shown = shown_on_a_terminal(["demo"], {**nothing_to_import, "NO_COLOR": "1"})
    assert "starting" in shown
    assert not re.search(r"\x1b\[[\d;]+m", shown.replace("\x1b[0m", ""))
    assert "starting" not in shown_on_a_terminal(["demo"], {**nothing_to_import, "RANK": "1"})
    command = [sys.executable, "-m", "skipless", "demo"]
    piped = subprocess.run(command, env=nothing_to_import, capture_output=True, text=True, check=False)
    assert piped.stdout == ""
    assert re.fullmatch(r"importing \w+\n", piped.stderr)


def test_choices_are_the_registries():
    """A removal, an executor or an engine that is added is on the command line, too."""
    fuse, bench = ({option.name: option for option in cli.main.commands[name].params} for name in ("fuse", "bench"))
    assert set(fuse["basis"].type.choices) == {AUTO, *BASES}
    assert set(fuse["engine"].type.choices) == set(EXECUTORS)
    assert set(bench["engine"].type.choices) == set(ENGINES)
    assert all(kind in fuse["remove"].help for kind in (*KINDS, *FOLDS))

"""Usage: exit codes, and where the text goes."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from skipless import __version__, cli
from skipless.rewrite import fusion
from tests.models import build, save

COMMANDS = ["demo", "audit", "fuse", "verify", "bench", "export", "train"]


def run(*arguments):
    return CliRunner().invoke(cli.main, list(map(str, arguments)))


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    assert "--json" in result.stdout
    assert command in run("--help").stdout


def test_version():
    assert __version__ in run("--version").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fuse"], "Missing argument 'SRC'"),
        (["fuse", "a"], "Missing argument 'DST'"),
        (["fuse", "a", "b", "--dtyp", "float32"], "No such option"),
        (["fuse", "a", "b", "--dtype", "fp32"], "'fp32' is not one of"),
        (["verify", "a", "b", "--tokens", "0"], "0 is not in the range"),
        (["audit", "Llama-3.1-8B"], "found a known name"),
        (["fuse", "gpt2", "fused"], "found a known name"),
        (["bench"], "expected model folders, or --shape"),
        (["forget"], "No such command"),
        (["--forget"], "No such option"),
    ],
    ids=str,
)
def test_bad_usage_exits_with_2_and_no_traceback(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize("options", [[], ["--json"]], ids=str)
def test_as_a_module(options):
    done = subprocess.run(
        [sys.executable, "-m", "skipless", "count", "gpt2", *options], capture_output=True, text=True, check=True
    )
    assert done.stdout == run("count", "gpt2", *options).stdout


def test_a_folder_may_be_called_as_a_known_model_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert "gpt2/config.json: expected" in run("audit", "gpt2").stderr


@pytest.mark.slow
def test_bench_without_a_model(tmp_path):
    result = run("bench", tmp_path / "nothing")
    assert result.exit_code == 2
    assert "nothing: expected a model folder, found nothing" in result.stderr


def test_a_bug_does_not_exit_with_the_code_that_means_no(tmp_path, monkeypatch):
    monkeypatch.setattr(fusion, "fuse", lambda *_, **__: 1 / 0)
    result = run("fuse", save(build(), tmp_path / "source"), tmp_path / "fused")
    assert result.exit_code == 3
    assert "ZeroDivisionError" in result.stderr
    assert "this is a bug" in result.stderr

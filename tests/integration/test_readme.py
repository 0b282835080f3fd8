"""What the README shows is what happens: its commands and its Python run, and print what it says, numbers aside."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(console|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "src").symlink_to(ROOT / "src")
    return folder


def shape(text):
    """The words of a text: numbers as #, spaces and rules left out."""
    text = re.sub(r"[\d.,]*\d(e[-+]\d+)?", "#", re.sub(r"[─━\s]+", " ", text))
    return text.strip()


def steps():
    for language, block in BLOCKS:
        if language == "python":
            yield pytest.param([sys.executable, "-c", block], None, id="python")
            continue
        for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            yield pytest.param(["bash", "-c", command], output, id=command)


@pytest.mark.parametrize(("command", "output"), list(steps()))
def test_it_runs_and_prints_what_the_readme_says(folder, command, output):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "COLUMNS": "80", "PATH": path, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if output is not None:
        assert shape(done.stdout) == shape(output)


def test_the_readme_shows_commands_and_python():
    assert {language for language, _ in BLOCKS} == {"console", "python"}
    assert "@@" not in README


@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_the_makefile_makes_what_the_readme_says(target):
    help_text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"make {target}" in help_text
    plan = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ".venv/bin/" in plan

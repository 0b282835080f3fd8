"""What the README shows is what happens: its commands and its Python run, and print what it says, numbers aside."""

import subprocess
import sys

import pytest

from tests.pages import README, ROOT, blocks, commands, run, shape

pytestmark = pytest.mark.alone

BLOCKS = blocks(README, "console", "python")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "src").symlink_to(ROOT / "src")
    return folder


def steps():
    for language, block in BLOCKS:
        if language == "python":
            yield pytest.param([sys.executable, "-c", block], None, id="python")
            continue
        for command, output in commands(block):
            yield pytest.param(["bash", "-c", command], output, id=command)


@pytest.mark.parametrize(("command", "output"), list(steps()))
def test_it_runs_and_prints_what_the_readme_says(folder, command, output):
    printed = run(command, folder)
    if output is not None:
        assert shape(printed) == shape(output)


def test_the_readme_shows_commands_and_python():
    assert {language for language, _ in BLOCKS} == {"console", "python"}
    assert "@@" not in README


@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_the_makefile_makes_what_the_readme_says(target):
    help_text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"make {target}" in help_text
    plan = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ".venv/bin/" in plan

"""What the README and the pages of commands show is what happens: they run, and print what is said, numbers aside."""

import subprocess
import sys

import pytest

from tests.pages import README, ROOT, blocks, commands, page, run, shape

pytestmark = pytest.mark.alone

PAGES = {"README": README, "removals": page("removals"), "count": page("count")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each page, whose commands find there what earlier ones of it have written."""
    found = {}
    for name in PAGES:
        found[name] = tmp_path_factory.mktemp(name)
        (found[name] / "src").symlink_to(ROOT / "src")
    return found


def steps():
    for name, text in PAGES.items():
        for language, block in blocks(text, "console", "python"):
            if language == "python":
                yield pytest.param(name, [sys.executable, "-c", block], None, id=f"{name}: python")
                continue
            for command, output in commands(block):
                yield pytest.param(name, ["bash", "-c", command], output, id=f"{name}: {command}")


@pytest.mark.parametrize(("name", "command", "output"), list(steps()))
def test_it_runs_and_prints_what_the_page_says(folders, name, command, output):
    printed = run(command, folders[name])
    if output is not None:
        assert shape(printed) == shape(output)


@pytest.mark.parametrize("name", PAGES)
def test_each_page_shows_commands(name):
    assert any(language == "console" for language, _ in blocks(PAGES[name], "console", "python"))
    assert "@@" not in PAGES[name]


@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_the_makefile_makes_what_the_readme_says(target):
    help_text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"make {target}" in help_text
    plan = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ".venv/bin/" in plan

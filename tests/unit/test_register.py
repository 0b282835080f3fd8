"""integrations/llama.cpp/register.py adds its lines at the places it names, or nothing."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "integrations" / "llama.cpp" / "register.py"
PLACES = runpy.run_path(str(SCRIPT))["PLACES"]


@pytest.fixture
def tree(tmp_path):
    """A tree with the places alone."""
    for place in PLACES:
        file = tmp_path / place.file
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            stream.write(f"// {place.name}\n{place.anchor or '#pragma once'} // as it is there\n\n")
    return tmp_path


def register(tree):
    return subprocess.run([sys.executable, SCRIPT, tree], capture_output=True, text=True, check=False)


def texts(tree):
    return {str(file.relative_to(tree)): file.read_text() for file in tree.rglob("*") if file.is_file()}


def test_it_adds_lines_and_files(tree):
    before = texts(tree)
    assert register(tree).stderr == ""
    after = texts(tree)
    assert after.keys() - before.keys() == {"src/models/skipless.cpp", "src/models/skipless.h"}
    for place in PLACES:
        lines = after[place.file].splitlines()
        (at,) = (number for number, line in enumerate(lines) if line.startswith(place.anchor or "#pragma once"))
        added = place.lines.splitlines()
        if place.anchor is None:
            assert lines[-len(added) :] == added
        else:
            start = at + 1 if place.after else at - len(added)
            assert lines[start : start + len(added)] == added
    for name, text in before.items():
        kept = text.splitlines()
        assert [line for line in after[name].splitlines() if line in kept and line] == [line for line in kept if line]


def test_a_second_time_it_says_so(tree):
    register(tree)
    before = texts(tree)
    found = register(tree)
    assert found.returncode == 1
    assert "expected a tree without the architecture, found it there" in found.stderr
    assert texts(tree) == before


@pytest.mark.parametrize("place", PLACES[:-1], ids=lambda place: place.name)
@pytest.mark.parametrize("times", [0, 2])
def test_another_release_is_refused_by_the_name_of_the_place(place, times, tree):
    file = tree / place.file
    lines = [line for line in file.read_text().splitlines() if not line.startswith(place.anchor)]
    file.write_text("\n".join([*lines, *[place.anchor] * times]))
    before = texts(tree)
    found = register(tree)
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert found.stderr.startswith(f"{place.file}: {place.name}: expected one line that begins with")
    assert f"found {times}; use the llama.cpp of llama-cpp-python 0.3.36" in found.stderr
    assert texts(tree) == before


def test_what_is_no_tree(tmp_path):
    found = register(tmp_path)
    assert found.returncode == 1
    assert "llama-arch.h" in found.stderr

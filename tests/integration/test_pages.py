"""What pages show is what happens: their commands run, one after the other, and print what is said, numbers aside."""

import subprocess
import sys

import pytest

from tests.pages import PAGES, ROOT, blocks, commands, run, shape

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each page, with the files that it shows. Its commands find there what earlier ones have written."""
    found = {}
    for name, text in PAGES.items():
        found[name] = folder = tmp_path_factory.mktemp("page")
        for room in ("src", "benchmarks", "examples"):
            (folder / room).symlink_to(ROOT / room)
        for block in blocks(text):
            if block.file and not block.by:
                (folder / block.file).write_text(block.text)
    return found


def steps():
    for name, text in PAGES.items():
        for block in filter(lambda block: block.runs, blocks(text)):
            if block.language == "python":
                yield pytest.param(name, [sys.executable, "-c", block.text], None, id=f"{name}: python")
                continue
            for command, output in commands(block.text):
                yield pytest.param(name, ["bash", "-c", command], output, id=f"{name}: {command}")


@pytest.mark.parametrize(("name", "command", "output"), list(steps()))
def test_it_runs_and_prints_what_the_page_says(folders, name, command, output):
    for engine in ("openvino", "onnx", "gguf"):
        if engine in command[-1]:
            pytest.importorskip(engine, reason=f"needs the [{engine}] extra: pip install 'skipless[{engine}]'")
    printed = run(command, folders[name])
    if output is not None:
        assert shape(printed) == shape(output)


@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_the_makefile_makes_what_the_readme_says(target):
    help_text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"make {target}" in help_text
    plan = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ".venv/bin/" in plan

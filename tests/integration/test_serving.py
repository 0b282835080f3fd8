"""What docs/serving.md shows is what happens: its commands, one after the other, and its Python for PyTorch."""

import re
import sys

import pytest

from tests.pages import ROOT, SERVING, blocks, commands, run, shape

pytestmark = pytest.mark.alone

PYTHON = [block for _, block in blocks(SERVING, "python")]
STEPS = [step for _, block in blocks(SERVING, "console") for step in commands(block)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where they run, with the scripts that the page shows."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "src").symlink_to(ROOT / "src")
    for block in PYTHON:
        if name := re.match(r"# (\w+\.py)\n", block):
            (folder / name[1]).write_text(block)
    return folder


@pytest.mark.parametrize(("command", "output"), STEPS, ids=[command for command, _ in STEPS])
def test_commands(folder, command, output):
    for engine in ("openvino", "onnx", "gguf"):
        if f"--to {engine}" in command:
            pytest.importorskip(engine, reason=f"needs the [{engine}] extra: pip install 'skipless[{engine}]'")
    assert shape(run(["bash", "-c", command], folder)) == shape(output)


def test_pytorch(folder):
    (block,) = (block for block in PYTHON if "prepare_decoding" in block)
    assert run([sys.executable, "-c", block], folder).startswith("class Stack:\n    def __init__(self, *args")

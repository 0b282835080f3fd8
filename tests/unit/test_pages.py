"""Every block of every page is run by a test, or says why not."""

import re
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT, Block, blocks

PROGRAMS = "accelerate|cp|curl|git|lm_eval|make|mkdir|pip|pytest|python3?|ray|skipless|torchrun|vllm"
# How a command begins, in a block and where its indentation alone makes a block.
COMMAND = re.compile(rf"^(?:\$ |(?:\.venv/bin/)?(?:{PROGRAMS})\s)", re.MULTILINE)
INDENTED = re.compile(COMMAND.pattern.replace("^", r"^(?:    |\t)", 1), re.MULTILINE)


def complaints(text):
    """What is wrong with a page's blocks."""
    fences = re.findall(r"^```", text, re.MULTILINE)
    found = blocks(text)
    if len(fences) != 2 * len(found):
        yield "a fence that is not closed, or that the tests cannot read"
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (f"not in a block with a language: {line[0].strip()}" for line in INDENTED.finditer(outside))
    for block in found:
        first = block.text.partition("\n")[0]
        if block.why or block.by:
            if block.why and len(block.why.split()) < 3:
                yield f"no reason for which it is not run: {first}"
        elif block.language == "console" and not block.text.startswith("$ "):
            yield f"no command: {first}"
        elif not (block.runs or block.file) and (COMMAND.search(block.text) or block.language == "sh"):
            yield f"not run, and no reason: {first}"


@pytest.mark.parametrize("name", PAGES)
def test_every_command_is_run_or_says_why_not(name):
    assert list(complaints(PAGES[name])) == []
    assert "@@" not in PAGES[name]


@pytest.mark.parametrize("name", PAGES)
def test_who_is_said_to_run_a_block_reads_it(name):
    for block in blocks(PAGES[name]):
        if block.by:
            reads = rf'(page|files|module|documented)\("{Path(name).stem}"'
            assert re.search(reads, (ROOT / block.by).read_text(encoding="utf-8")), block.by


@pytest.mark.parametrize(
    "text",
    [
        "    skipless fuse A B\n",
        "```\n$ make demo\n```\n",
        "```sh\nmake demo\n```\n",
        "```sh\nray start\n",
        "<!-- not run: slow -->\n```console\n$ make test\n```\n",
        "```console\nmake test\n```\n",
    ],
)
def test_what_is_not_run_is_found(text):
    assert list(complaints(text))
    assert not list(complaints("<!-- not run: it takes five hours -->\n```console\n$ make benchmarks\n```\n"))
    assert blocks("```console\n$ make demo\n```\n") == [Block("console", "$ make demo\n")]

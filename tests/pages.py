"""What pages show, to be tried: their commands with what they print, numbers aside.

A block of a page is run by tests/integration/test_pages.py, unless a comment before it says another test that runs it,
or why none does:

    <!-- run by: tests/unit/test_removals.py -->
    <!-- not run: it needs two machines -->

`console`: commands, each after "$ ", and what they print on stdout. `python`: a program. Any block whose first line
names a file, as "# recipe.toml", is written to that file before the page's commands run.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*.md")))
}
BLOCK = re.compile(r"(?:^<!-- (run by|not run): (.*?) -->\n\n?)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A code block. why: the reason for which it is not run; by: the test file that runs it, if it is another."""

    language: str
    text: str
    why: str = ""
    by: str = ""

    @property
    def file(self) -> str:
        """The name of the file that it is, if it is one."""
        found = re.match(r"# ([\w/-]+\.\w+)\n", self.text)
        return found[1] if found else ""

    @property
    def runs(self) -> bool:
        """Whether test_pages runs it."""
        return self.language in ("console", "python") and not (self.why or self.by or self.file)


def page(name: str) -> str:
    """The text of a page of docs/."""
    return PAGES[f"docs/{name}.md"]


def blocks(text: str, *languages: str) -> list[Block]:
    """A page's code blocks, of these languages or of all."""
    found = []
    for marker, words, language, inside in BLOCK.findall(text):
        if not languages or language in languages:
            by, why = (words if marker == each else "" for each in ("run by", "not run"))
            found.append(Block(language, inside, why, by))
    return found


def files(name: str) -> dict[str, str]:
    """The files that a page of docs/ shows, by their names; several blocks may be of one."""
    found: dict[str, str] = {}
    for block in blocks(page(name)):
        if block.file:
            found[block.file] = found.get(block.file, "") + block.text
    return found


def module(name: str, file: str, **names: Any) -> ModuleType:
    """A Python file that a page of docs/ shows, as a module in which these names are there already."""
    found = ModuleType(Path(file).stem)
    found.__dict__.update(names)
    exec(files(name)[file], found.__dict__)
    return found


def commands(block: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, and what it shows of their output."""
    yield from re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)


def shape(text: str) -> str:
    """The words of a text: numbers as #, spaces and rules left out."""
    text = re.sub(r"[\d.,]*\d(e[-+]\d+)?", "#", re.sub(r"[─━\s]+", " ", text))
    return text.strip()


def run(command: Sequence[str], folder: Path) -> str:
    """What a command prints on stdout in a folder; it must succeed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "COLUMNS": "80", "PATH": path, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout

"""What pages show, to be tried: their commands with what they print, numbers aside."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def page(name: str) -> str:
    """The text of a page of docs/."""
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


SERVING = page("serving")


def blocks(page: str, *languages: str) -> list[tuple[str, str]]:
    """Language and text of a page's code blocks."""
    return re.findall(rf"^```({'|'.join(languages)})\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


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

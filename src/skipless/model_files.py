"""The two files of the model that travel with every checkpoint, so that it loads where skipless is not installed."""

import difflib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from skipless.checkpoint.headers import check_file
from skipless.errors import InputError

MODEL_FILES = tuple(
    Path(__file__).parent / "model" / name for name in ("configuration_skipless.py", "modeling_skipless.py")
)
AUTO_MAP = {
    "AutoConfig": "configuration_skipless.SkiplessConfig",
    "AutoModel": "modeling_skipless.SkiplessModel",
    "AutoModelForCausalLM": "modeling_skipless.SkiplessForCausalLM",
}
# Bytes of a model file that are looked at: ours has 32 thousand.
MOST = 10**6


def copy_model_files(folder: Path) -> None:
    """Put this version's files into a folder, in the place of others."""
    for file in MODEL_FILES:
        new = folder / f".{file.name}.new"
        shutil.copyfile(file, new)
        with new.open("rb") as written:
            os.fsync(written.fileno())
        new.replace(folder / file.name)


def other_model_files(folder: Path) -> list[str]:
    """Which of a folder's model files are not this version's, absent ones included; none if it has none at all."""
    here = [file for file in MODEL_FILES if (folder / file.name).exists()]
    return [file.name for file in MODEL_FILES if here and _text(folder / file.name) != _text(file)]


def changes(folder: Path) -> Iterator[str]:
    """What replacing a folder's model files by this version's would change, as the lines of a unified diff."""
    for file in MODEL_FILES:
        before, after = (_text(path).splitlines() for path in (folder / file.name, file))
        names = f"{folder / file.name}", f"{folder / file.name} (skipless's)"
        yield from difflib.unified_diff(before, after, *names, lineterm="")


def _text(file: Path) -> str:
    """A file's text, of none nothing. Raises InputError for what is no text."""
    if not os.path.lexists(file):
        return ""
    if (size := check_file(file, "a model file")) > MOST:
        raise InputError(f"{file}: expected a model file of at most {MOST:,} bytes, found {size:,}; remove it")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: expected a model file, found {error}; remove it") from error

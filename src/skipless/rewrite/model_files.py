"""The two files of the model that travel with every checkpoint, so that it loads where skipless is not installed."""

import difflib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from skipless.checkpoint import family, files
from skipless.checkpoint.headers import MOST_CONFIG, Folder, check_file, read_json_object
from skipless.errors import InputError
from skipless.rewrite.record import RECORD, digest, read_record, replace_record

MODEL_FILES = tuple(
    Path(__file__).parents[1] / "model" / name for name in ("configuration_skipless.py", "modeling_skipless.py")
)
# What a fuse writes itself, whatever the source has by these names.
OURS = frozenset({RECORD, *(file.name for file in MODEL_FILES)})
AUTO_MAP = {
    "AutoConfig": "configuration_skipless.SkiplessConfig",
    "AutoModel": "modeling_skipless.SkiplessModel",
    "AutoModelForCausalLM": "modeling_skipless.SkiplessForCausalLM",
}
# Bytes of a model file that are looked at: ours has 45 thousand.
MOST = 10**6


def copy_model_files(folder: Path) -> None:
    """Replace a folder's model files by this version's, each atomically."""
    for file in MODEL_FILES:
        files.copy(file, folder / file.name, files.replace)


def refresh(folder: Path, tell: Callable[[str], None], dry_run: bool = False) -> bool:
    """Replace a skipless folder's model files by this version's, and what skipless.json says of them.

    Returns whether anything had to be replaced. tell: called with each line of what will change. dry_run: stop then.

    Raises InputError for another model's folder, for one that carries no model files, and for one whose tensors are not
    those of this version's model.
    """
    config = read_json_object(folder / "config.json", MOST_CONFIG, folder)
    if config.get("model_type") != "skipless":
        raise InputError(
            f"{folder}: expected a skipless model folder, found model_type {config.get('model_type')!r} in config.json"
        )
    if not any((folder / file.name).exists() for file in MODEL_FILES):
        raise InputError(
            f"{folder}: expected {' and '.join(file.name for file in MODEL_FILES)}, found neither; skipless itself "
            f"runs this folder"
        )
    if any(folder.glob("*.safetensors")):
        family.check(Folder(folder))
    record = read_record(folder)
    stale = other_model_files(folder)
    for line in changes(folder):
        tell(line)
    told = {} if record is None else record["files"]
    written = {file.name: {"bytes": file.stat().st_size, "sha256": digest(file)} for file in MODEL_FILES}
    outdated = [name for name in written if record is not None and told.get(name) != written[name]]
    if not dry_run and stale:
        copy_model_files(folder)
    if not dry_run and record is not None and outdated:
        replace_record(folder, {**record, "files": {**told, **written}})
    return bool(stale or outdated)


def other_model_files(folder: Path) -> list[str]:
    """The folder's model files that differ from this version's or are absent; none if it has none at all."""
    here = [file for file in MODEL_FILES if (folder / file.name).exists()]
    return [file.name for file in MODEL_FILES if here and _text(folder / file.name, folder) != _text(file)]


def changes(folder: Path) -> Iterator[str]:
    """The unified diff from a folder's model files to this version's, line by line."""
    for file in MODEL_FILES:
        before, after = _text(folder / file.name, folder).splitlines(), _text(file).splitlines()
        names = f"{folder / file.name}", f"{folder / file.name} (skipless's)"
        yield from difflib.unified_diff(before, after, *names, lineterm="")


def _text(file: Path, folder: Path | None = None) -> str:
    """A file's text, of none nothing; folder: as for check_file. Raises InputError for what is no text."""
    if not os.path.lexists(file):
        return ""
    if (size := check_file(file, "a model file", folder)) > MOST:
        raise InputError(f"{file}: expected a model file of at most {MOST:,} bytes, found {size:,}; remove it")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: expected a model file, found {error}; remove it") from error

"""skipless.json: where a fused folder comes from, how it was made, and the SHA-256 of all that is in it.

It is written last, by fuse, and lies beside the weights for good: whoever has the folder can see at any time whether it
is what was written (`skipless verify FOLDER`), and whoever has the source, too, of which bytes it was made. Who changes
the folder can change the record: it tells damage and mixtures, not forgery.
"""

import dataclasses
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from skipless.algebra.forecast import Outcome
from skipless.checkpoint import files
from skipless.checkpoint.headers import check_file, read_json_object
from skipless.checkpoint.reader import CheckpointReader
from skipless.checkpoint.writer import to_json, write_json
from skipless.errors import InputError

RECORD = "skipless.json"
FORMAT = 1


def write_record(
    folder: Path,
    reader: CheckpointReader,
    made: Mapping[str, Any],
    sources: Mapping[str, str],
    outcomes: Iterable[Outcome],
    shards: Mapping[str, str],
    copy: Collection[str] = (),
) -> None:
    """Write the record into a folder that is complete otherwise.

    made: by what and how. sources: SHA-256 of the source's tensors, as they were read. shards: SHA-256 of the files of
    weights in the folder. copy: patterns of what was copied along beside the usual (Folder.other_files).
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    written = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": shards.get(name) or digest(folder / name)}
        for name in names
        if name != RECORD  # that an earlier process has left
    }
    record = {"format": FORMAT, **made, "source": {**_source(reader, copy), "tensors": dict(sorted(sources.items()))}}
    record |= {"seams": [dataclasses.asdict(outcome) for outcome in outcomes], "files": written}
    write_json(folder / RECORD, record)


def replace_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Put a record in the place of the one that a folder has: whole or not at all."""
    files.replace(folder / RECORD, [to_json(record)])


def _source(reader: CheckpointReader, copy: Collection[str]) -> dict[str, Any]:
    """What the source is called, and the SHA-256 of its files; of shards, of their headers, as the tensors' follow."""
    others = [Path("config.json"), *reader.other_files(copy)]
    digests = {str(name): digest(reader.fetch(name)) for name in others}
    starts = {header.shard: header.start for header in sorted(reader.headers.values(), key=lambda each: -each.start)}
    headers = {shard: digest(reader.path(shard), start) for shard, start in sorted(starts.items())}
    return {"name": reader.name.rstrip("/").rpartition("/")[2], "files": digests, "headers": headers}


def digest(file: Path, size: int | None = None, start: int = 0) -> str:
    """SHA-256 of a file, or of `size` bytes of it from `start` on."""
    sha256 = hashlib.sha256()
    with files.opened(file) as stream:
        stream.seek(start)
        for block in stream.blocks(size):
            sha256.update(block)
    return sha256.hexdigest()


def read_record(folder: Path) -> dict[str, Any] | None:
    """A folder's record, or None if it has none. Raises InputError, naming the field, for one not written by fuse."""
    if not (folder / RECORD).exists():
        return None
    record = read_json_object(folder / RECORD, folder=folder)

    def expect(condition: bool, field: str, what: str) -> None:
        if not condition:
            raise InputError(f"{folder / RECORD}: {field}: expected {what}, found another; remove it, or fuse again")

    expect(record.get("format") == FORMAT, "format", str(FORMAT))
    source, files = record.get("source", None), record.get("files", None)
    expect(isinstance(source, dict), "source", "an object")
    expect(isinstance(files, dict), "files", "an object")
    assert isinstance(source, dict)
    assert isinstance(files, dict)
    for name in ("files", "headers", "tensors"):
        expect(_digests(source.get(name)), f"source.{name}", "names and their SHA-256")
    expect(all(isinstance(entry, dict) for entry in files.values()), "files", "objects")
    expect(_digests({name: entry.get("sha256") for name, entry in files.items()}), "files", "names and their SHA-256")
    expect(all(type(entry.get("bytes")) is int for entry in files.values()), "files", "their sizes in bytes")
    expect(all(_inside(name) for name in files), "files", "names of files in this folder")
    return record


def _digests(digests: Any) -> bool:
    return isinstance(digests, dict) and all(
        isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in digests.values()
    )


def _inside(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and name.isprintable()


def differences(folder: Path, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where a folder is no longer what the record says: names of files, and what is wrong, in words."""
    for name, entry in record["files"].items():
        file = folder / name
        if not file.exists():
            yield name, "expected as it was written, found no such file"
        elif (size := check_file(file, "a file", folder)) != entry["bytes"]:
            yield name, f"expected {entry['bytes']:,} bytes, as it was written, found {size:,}"
        elif digest(file) != entry["sha256"]:
            yield name, "expected the bytes that were written, found others"
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in record["files"] and name != RECORD:
            yield name, "expected no file that was not written with it, found one"

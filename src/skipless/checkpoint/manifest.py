"""The state of an unfinished fuse: the job that it was begun for, and the tasks that are on disk.

The job (of what source, with which options, by which versions) is written once, and never changes. The journal gets a
line when a task's tensors are on disk, so that a process that is killed loses the tasks it was at and no other.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from skipless.checkpoint import files
from skipless.checkpoint.headers import MOST_INDEX, MOST_TENSORS, parse_json
from skipless.errors import InputError, StorageError

JOB, JOURNAL = "job.json", "journal.jsonl"
FORMAT = 2
# Bytes of job.json, or of a line of the journal; what follows a longer one does not count. Lines of the journal: each
# is of a task that writes a tensor, and may have been done again.
MOST_BYTES, MOST_LINES = MOST_INDEX, 2 * MOST_TENSORS
# Characters of what job.json says of how the basis was chosen.
MOST_REASON = 1000


@dataclass(frozen=True)
class Entry:
    """A finished task.

    digests, sources: the SHA-256 of each tensor that it wrote, and that it read. outcomes: what became of its seams
    (forecast.Outcome, as JSON has it).
    """

    digests: Mapping[str, str]
    sources: Mapping[str, str]
    outcomes: tuple[Mapping[str, Any], ...]


class Manifest:
    """The job and the journal in `folder`. done: number of a task -> what it gave, by the last line that says so;
    unread: how many whole lines say no such thing.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]):
        self.folder, self.job = folder, job
        self.done: dict[int, Entry] = {}
        self.unread = 0
        self._size = 0  # bytes of the journal's whole lines

    @classmethod
    def begin(cls, folder: Path, job: Mapping[str, Any]) -> "Manifest":
        """Write a new job file atomically."""
        job = {"format": FORMAT, **job}
        files.replace(folder / JOB, [json.dumps(job, indent=2).encode()])
        files.sync(folder)
        return cls(folder, job)

    @classmethod
    def load(cls, folder: Path) -> "Manifest | None":
        """What is in `folder`, of which nothing is changed; None if nothing had been begun.

        Raises InputError for a job that no fuse can have written; of the journal, what cannot be read does not count.
        """
        job = read_job(folder)
        if job is None:
            return None
        manifest, file = cls(folder, job), folder / JOURNAL
        try:
            with files.reopen(file) as journal:
                manifest._read(journal)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StorageError(f"{file}: could not be read: {error.strerror or error}") from error
        return manifest

    def _read(self, journal: files.File) -> None:
        """Read the journal's whole lines. A line that a kill cut short does not count."""
        for line in islice(_lines(journal), MOST_LINES):
            self._size += len(line) + 1
            try:
                task, entry = _entry(parse_json(line))
            except ValueError:
                self.unread += 1
            else:
                self.done[task] = entry

    def check(self, job: Mapping[str, Any]) -> None:
        """Raise InputError, naming the first difference, unless this is the same job."""
        for name, then, now in _differences(self.job, json.loads(json.dumps({"format": FORMAT, **job}))):
            raise InputError(
                f"{name}: expected {json.dumps(then)}, as when this fuse was begun, found {json.dumps(now)}; give it "
                f"again as it was, or remove {self.folder} to begin anew"
            )

    def add(self, task: int, entry: Entry) -> None:
        """Add a line to the journal: a task's tensors are on disk."""
        fields = {"task": task, "tensors": entry.digests, "sources": entry.sources, "outcomes": entry.outcomes}
        line = json.dumps(fields).encode() + b"\n"
        with self._journal() as file:
            file.resize(self._size)
            file.seek(self._size)
            file.write(line)
            file.sync()
        self._size += len(line)
        self.done[task] = entry

    def _journal(self) -> files.File:
        try:
            return files.reopen(self.folder / JOURNAL, writing=True)
        except FileNotFoundError:
            return files.create(self.folder / JOURNAL)


def read_job(folder: Path) -> dict[str, Any] | None:
    """The job in a folder, or None. Raises InputError for a file that no fuse can have written."""
    file = folder / JOB
    try:
        job = parse_json(files.read(file, MOST_BYTES))
        _check_job(job)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{file}: could not be read: {error.strerror or error}") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{file}: expected what a fuse writes there, found {error}; remove {folder}") from error
    return job


def _check_job(job: object) -> None:
    """Raise ValueError for a job that no fuse writes."""
    if not isinstance(job, dict) or job.get("format") != FORMAT:
        raise ValueError(f"another format than {FORMAT}")
    for name in ("basis", "reason"):
        value = job.get(name)
        if not isinstance(value, str) or not value.isprintable() or len(value) > MOST_REASON:
            raise ValueError(f"no {name}")


def _lines(journal: files.File) -> Iterator[bytes]:
    """The whole lines, up to the first that is longer than a fuse writes."""
    rest = b""
    for block in journal.blocks():
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
        if len(rest) > MOST_BYTES:
            return


def _entry(fields: object) -> tuple[int, Entry]:
    """Parse a line of the journal. Raises ValueError for a line that no fuse writes."""
    if not isinstance(fields, dict) or fields.keys() != {"task", "tensors", "sources", "outcomes"}:
        raise ValueError("other fields")
    task, tensors, sources, outcomes = (fields[name] for name in ("task", "tensors", "sources", "outcomes"))
    if type(task) is not int or task < 0:
        raise ValueError("no number of a task")
    if not isinstance(outcomes, list) or not all(isinstance(outcome, dict) for outcome in outcomes):
        raise ValueError("no outcomes")
    if not all(isinstance(digests, dict) and all(map(_is_digest, digests.values())) for digests in (tensors, sources)):
        raise ValueError("no tensors and their SHA-256")
    return task, Entry(tensors, sources, tuple(outcomes))


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _differences(then: object, now: object, name: str = "job") -> Iterator[tuple[str, object, object]]:
    """The paths of fields whose values differ."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*then, *now)):
            path = str(key) if name == "job" else f"{name}.{key}"
            yield from _differences(then.get(key), now.get(key), path)
    elif then != now:
        yield name, then, now

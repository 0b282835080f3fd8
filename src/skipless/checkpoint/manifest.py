"""What is known of an unfinished fuse: for which job it was begun, and what of it is on disk.

The job (of what source, with which options, by which versions) is written once, and never changes. The journal gets a
line when a task's tensors are on disk, so that a process that is killed loses the tasks it was at and no other.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipless.errors import InputError

JOB, JOURNAL = "job.json", "journal.jsonl"
FORMAT = 2


@dataclass(frozen=True)
class Entry:
    """A finished task: the SHA-256 of each of the tensors that it wrote and that it read, and what became of its seams
    (prediction.Outcome, as JSON has it).
    """

    digests: Mapping[str, str]
    sources: Mapping[str, str]
    outcomes: tuple[Mapping[str, Any], ...]


class Manifest:
    """The job and the journal in `folder`. done: number of a task -> what it gave."""

    def __init__(self, folder: Path, job: Mapping[str, Any]):
        self.folder, self.job = folder, job
        self.done: dict[int, Entry] = {}
        self._size = 0  # bytes of the journal's whole lines

    @classmethod
    def begin(cls, folder: Path, job: Mapping[str, Any]) -> "Manifest":
        """Write down a new job, whole or not at all."""
        job = {"format": FORMAT, **job}
        new = folder / f"{JOB}.new"
        with new.open("w", encoding="utf-8") as file:
            json.dump(job, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        new.rename(folder / JOB)
        sync(folder)
        return cls(folder, job)

    @classmethod
    def load(cls, folder: Path) -> "Manifest | None":
        """What is in `folder`, of which nothing is changed; None if nothing had been begun."""
        file = folder / JOB
        if not file.exists():
            return None
        try:
            job = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(job, dict) or job.get("format") != FORMAT or not {"basis", "reason"} <= job.keys():
                raise ValueError(f"another format than {FORMAT}")
            manifest = cls(folder, job)
            if (file := folder / JOURNAL).exists():
                # a line that a kill has cut short does not count
                for line in file.read_bytes().splitlines(keepends=True):
                    if line.endswith(b"\n"):
                        fields = json.loads(line)
                        entry = Entry(fields["tensors"], fields["sources"], tuple(fields["outcomes"]))
                        manifest.done[fields["task"]] = entry
                        manifest._size += len(line)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{file}: expected what a fuse writes there, found {error}; remove {folder}") from error
        return manifest

    def check(self, job: Mapping[str, Any]) -> None:
        """Raise InputError, naming the first difference, if this is not the same job."""
        for name, then, now in _differences(self.job, json.loads(json.dumps({"format": FORMAT, **job}))):
            raise InputError(
                f"{name}: expected {json.dumps(then)}, as when this fuse was begun, found {json.dumps(now)}; give it "
                f"again as it was, or remove {self.folder} to begin anew"
            )

    def add(self, task: int, entry: Entry) -> None:
        """Write down that a task's tensors are on disk."""
        fields = {"task": task, "tensors": entry.digests, "sources": entry.sources, "outcomes": entry.outcomes}
        line = json.dumps(fields).encode() + b"\n"
        with (self.folder / JOURNAL).open("ab") as file:
            file.truncate(self._size)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(line)
        self.done[task] = entry


def sync(path: Path) -> None:
    """See to it that a file, or a folder's list of files, is on disk; where folders cannot be, nothing."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _differences(then: object, now: object, name: str = "job") -> Iterator[tuple[str, object, object]]:
    """Fields whose values are not the same, by their path."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*then, *now)):
            path = str(key) if name == "job" else f"{name}.{key}"
            yield from _differences(then.get(key), now.get(key), path)
    elif then != now:
        yield name, then, now

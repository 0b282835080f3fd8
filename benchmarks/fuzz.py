"""Hostile checkpoints: each works or is refused in one clean line, soon, and with little memory.

    python benchmarks/fuzz.py --cases 100000 --seed 0

First the largest files that are read at all, made to take as much memory as they can, each in a process of its own;
then small checkpoints of several families, changed at random (tests/hostile.py): opened, their tensors read, counted,
planned. One case in twenty is a fuse that was stopped: its job, journal or shards are changed, and it is gone on with,
to the same bytes or a refusal. A case is a failure if it ends in anything but a result or an InputError, or takes
longer than --limit; its seed makes it again (--cases 1 --seed N). Exit code 1 if there is one, or if memory is beyond
its bound.
The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import hostile
from transformers.utils import logging

from skipless.checkpoint.gguf_file import GGUFReader
from skipless.checkpoint.headers import (
    MOST_CONFIG,
    MOST_HEADER,
    MOST_INDEX,
    MOST_MEMORY,
    MOST_VALUES,
    SINGLE,
    Folder,
    read_header,
    read_json_object,
)  # fmt: skip
from skipless.errors import InputError

# Bytes that all small cases together may add to the process: what Python and torch keep for later.
SMALL_MEMORY = 64 * 10**6
# The part of the cases that go on with a fuse that was stopped.
UNFINISHED = 0.05

logging.set_verbosity_error()


def peak() -> int:
    """The process's largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def repeat(file: Path, before: bytes, piece: str, times: int, after: bytes, header: bool = False) -> Path:
    """Write a piece, in which %d counts, many times, with commas between; with a length before it, as a header."""
    with file.open("wb") as stream:
        stream.write(bytes(8) * header + before)
        for number in range(times):
            stream.write((piece % number if "%d" in piece else piece).encode() + b"," * (number < times - 1))
        stream.write(after)
        if header:
            length = stream.tell() - 8
            stream.seek(0)
            stream.write(struct.pack("<Q", length))
    return file


def read_index(file: Path) -> object:
    return read_json_object(file, MOST_INDEX)


def large(folder: Path) -> dict[str, tuple[Callable[[Path], object], Path]]:
    """Cases as large as is allowed, or beyond: name -> what opens it, the file."""
    config, index, header = folder / "config", folder / "index", folder / "header"
    config.mkdir()
    index.mkdir()
    header.mkdir()

    wide = "\U0001f600".encode()
    whole = index / "model"
    whole.mkdir()
    repeat(whole / "config.json", b"{}", "", 0, b"")
    tensor = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    repeat(whole / SINGLE, b"{", tensor, MOST_VALUES // 9 - 2, b"}", True)
    sparse, huge = config / "sparse.json", header / "huge.safetensors"
    with sparse.open("wb") as stream:
        stream.truncate(10**11)
    with huge.open("wb") as stream:
        stream.write(struct.pack("<Q", 10**11 - 8))
        stream.truncate(10**11)
    values = MOST_VALUES - 10
    vocabulary = folder / "tokens.gguf"
    with vocabulary.open("wb") as stream:
        stream.write(struct.pack("<IIQQQ11sIIQ", 0x46554747, 3, 0, 1, 11, b"tokenizer.x", 9, 8, values))
        stream.write(bytes(8 * values + 64))
    spaces = b'{"a":"' + b" " * (MOST_CONFIG - 20) + wide
    return {
        "config: empty lists": (read_json_object, repeat(config / "1", b'{"a":[', "[]", values // 2, b"]}")),
        "config: objects of one": (read_json_object, repeat(config / "2", b'{"a":[', '{"a":0}', values // 2, b"]}")),
        "config: keys": (read_json_object, repeat(config / "3", b"{", '"%d":0', MOST_CONFIG // 13, b"}")),
        "config: wide characters": (read_json_object, repeat(config / "4", spaces, "", 0, b'"}')),
        "config: 100 GB": (read_json_object, sparse),
        "index: keys": (read_index, repeat(index / "1", b'{"weight_map":{', '"%d":"a"', values, b"}}")),
        "index: floats": (read_index, repeat(index / "2", b'{"weight_map":[', "0.1", values, b"]}")),
        "header: metadata, wide": (
            read_header,
            repeat(
                header / "1",
                b'{"__metadata__":{"":"' + b"x" * (MOST_HEADER - 27 * 10**6) + wide + b'",',
                '"%d":""',
                values,
                b"}}",
                True,
            ),
        ),
        "header: dimensions": (
            read_header,
            repeat(header / "2", b'{"a":{"dtype":"U8","data_offsets":[0,0],"shape":[', "0", values, b"]}}", True),
        ),
        "header: spaces": (read_header, repeat(header / "3", b"{}" + b" " * (MOST_HEADER - 2), "", 0, b"", True)),
        "header: one wide name": (
            read_header,
            repeat(
                header / "4",
                b'{"' + b"x" * (MOST_HEADER - 100) + wide + b'":{"dtype":"U8","data_offsets":[0,0],"shape":[0]}}',
                "",
                0,
                b"",
                True,
            ),
        ),
        "header: 100 GB": (read_header, huge),
        "folder: tensors": (Folder, whole),
        "GGUF: tokens": (GGUFReader, vocabulary),
    }


def open_large(case: tuple[Callable[[Path], object], Path, float]) -> tuple[bool, float, int, str]:
    """Whether it was accepted, seconds, bytes, and what else went wrong."""
    opens, file, limit = case
    before, start = peak(), time.perf_counter()
    accepted, problem = True, ""
    try:
        with alarm(limit):
            opens(file)
    except InputError:
        accepted = False
    except BaseException:
        problem = traceback.format_exc()
    return accepted, time.perf_counter() - start, peak() - before, problem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next have the next")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a case may take")
    arguments = parser.parse_args()
    problems: list[str] = []

    memory, accepted, slowest, journals = 0, 0, (0.0, 0), Counter[str]()
    getLogger("skipless").setLevel(ERROR)  # which lines of a journal are done again
    with tempfile.TemporaryDirectory() as place:
        folder, unfinished = Path(place) / "case", hostile.Unfinished(Path(place))
        assert unfinished.attempt(unfinished.files) is None
        bases = sorted(hostile.BASES)
        for name in bases:
            hostile.attempt(hostile.write(folder, hostile.BASES[name]))
        before, start = peak(), time.perf_counter()
        for seed in range(arguments.seed, arguments.seed + arguments.cases):
            random = Random(seed)
            if resumed := random.random() < UNFINISHED:
                files = unfinished.changed(random)
            else:
                files = hostile.changed(random, hostile.BASES[random.choice(bases)])
                path = hostile.write(folder, files)
            began = time.perf_counter()
            try:
                with alarm(arguments.limit):
                    if resumed:
                        journals["refused" if unfinished.attempt(files) else "accepted"] += 1
                    else:
                        accepted += hostile.attempt(path, (hostile.any_request(random),)) is None
            except KeyboardInterrupt:
                raise
            except BaseException:  # a panic of safetensors' is no Exception
                problems.append(f"--cases 1 --seed {seed}: {traceback.format_exc()}")
            slowest = max(slowest, (time.perf_counter() - began, seed))
        seconds, memory = time.perf_counter() - start, peak() - before

    with (
        tempfile.TemporaryDirectory() as place,
        multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool,
    ):
        found = {}
        for name, case in large(Path(place)).items():
            found[name] = pool.apply(open_large, ((*case, arguments.limit),))
    print("largest files                accepted   seconds   MB above start")
    for name, (fine, took, size, problem) in found.items():
        print(f"  {name:27}{'yes' if fine else 'no':>8}{took:10.2f}{size / 1e6:17.0f}")
        if problem:
            problems.append(f"{name}: {problem}")
    largest = max(size for _, _, size, _ in found.values())
    print(f"  bound: {MOST_MEMORY / 1e6:,.0f} MB")
    accepted += journals["accepted"]
    refused = arguments.cases - accepted - len(problems)
    print(f"{arguments.cases:,} cases from seed {arguments.seed}: {refused:,} refused, {accepted:,} accepted")
    print(f"of these, gone on with: {journals['accepted']:,} to the same bytes, {journals['refused']:,} refused")
    print(f"{arguments.cases / seconds:,.0f} cases/s; the slowest took {slowest[0]:.2f} s (--seed {slowest[1]})")
    print(f"memory: {memory / 1e6:.0f} MB above start, bound {SMALL_MEMORY / 1e6:.0f} MB")
    for problem in problems:
        print(f"FAILED: {problem}")
    for size, bound in ((largest, MOST_MEMORY), (memory, SMALL_MEMORY)):
        if size > bound:
            problems.append("memory")
            print(f"FAILED: {size / 1e6:,.0f} MB, more than {bound / 1e6:,.0f} MB")
    result = {
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "cases": arguments.cases,
        "seed": arguments.seed,
        "refused": refused,
        "accepted": accepted,
        "failed": len(problems),
        "unfinished": dict(journals),
        "cases_per_second": arguments.cases / seconds,
        "slowest_seconds": slowest[0],
        "slowest_seed": slowest[1],
        "peak_bytes": memory,
        "peak_bound": SMALL_MEMORY,
        "largest_files": {name: {"seconds": took, "peak_bytes": size} for name, (_, took, size, _) in found.items()},
        "largest_bound": MOST_MEMORY,
    }
    print(json.dumps(result))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()

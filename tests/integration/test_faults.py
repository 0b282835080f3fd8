"""Every call to the system that makes, reads or changes a file of a folder in the making fails once, or is the last.

All of them go through one module, files.py. Whatever n is: when the n-th call fails, the source is as it was, there is
no DST (or a whole one, if it had its name by then), and going on gives the same bytes.
"""

import errno
import json
import os
import shutil
import threading
from collections import Counter

import pytest
import torch

from skipless import fuse
from skipless.checkpoint import files
from skipless.checkpoint.staging import KEPT, LocalDestination
from skipless.errors import StorageError
from skipless.rewrite import fusion
from skipless.rewrite.probe import Checked
from tests.models import SMALL, SMALL_FILES, build, save, stop_fuse

KILLED = 77
# Calls that change what is on the disk: killed at another one, a process leaves what it leaves killed at the next.
CHANGES = {"open", "write", "ftruncate", "mkdir", "unlink", "rmdir", "replace", "rename"}
# Calls that a full disk lets fail.
TAKES_ROOM = {"open", "write", "ftruncate", "mkdir", "replace", "rename", "fsync", "close"}


class Faults:
    """The os module, of whose calls the n-th fails: with an error, of whatever was to be written half of it; or it is
    the process's last ("kill").
    """

    def __init__(self, number, fault=None):
        self.number, self.fault, self.made = number, fault, []
        self._lock = threading.Lock()

    def __getattr__(self, name):
        found = getattr(os, name)
        if not callable(found) or name == "lseek":
            return found

        def call(*arguments):
            with self._lock:
                self.made.append(name if name != "open" or arguments[1] & (os.O_WRONLY | os.O_RDWR) else "open to read")
                hit = len(self.made) == self.number
            if hit:
                if name == "write":
                    found(arguments[0], arguments[1][: len(arguments[1]) // 2])
                if name == "close":
                    found(*arguments)
                if self.fault == "kill":
                    os._exit(KILLED)
                raise OSError(self.fault, os.strerror(self.fault))
            return found(*arguments)

        return call


def tree(folder):
    """The bytes of every file, less the forecasts of skipless.json."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record = json.loads(found["skipless.json"])
    record.pop("check")
    return found | {"skipless.json": json.dumps(record).encode()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A source, what an uninterrupted fuse of it gives, and one that was killed in the middle."""
    folder = tmp_path_factory.mktemp("faults")
    source = save(build(dtype=torch.float32, **SMALL), folder / "source")
    (source / "sub").mkdir()
    (source / "sub" / "notes.md").write_text("notes")
    fuse(source, folder / "whole", **SMALL_FILES)
    return source, tree(folder / "whole"), stop_fuse(source, folder / "fused", -2, **SMALL_FILES)


@pytest.fixture
def quick(monkeypatch):
    """What has nothing to do with files takes no time."""
    plans, prepare = [], fusion.prepare
    monkeypatch.setattr(fusion, "prepare", lambda *options: (plans or plans.append(prepare(*options)) or plans)[0])
    monkeypatch.setattr(fusion, "check_fused", lambda *arguments: Checked((), ()))


def attempt(source, destination, faults, **options):
    """Fuse with a fault; what was said, or None. A kill is one of a process of its own."""
    if faults.fault == "kill":
        child = os.fork()
        if not child:
            try:
                files.os = faults
                fuse(source, destination, **SMALL_FILES, **options)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
        return None
    files.os = faults
    try:
        fuse(source, destination, **SMALL_FILES, **options)
    except StorageError as error:
        return str(error)
    finally:
        files.os = os
    return None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("begun", [False, True], ids=["anew", "resumed"])
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, "kill"], ids=["ENOSPC", "EIO", "kill"])
def test_every_call(made, quick, tmp_path, fault, begun):
    source, whole, template = made
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.rglob("*") if path.is_file()}
    destination = tmp_path / "fused"
    unfinished = LocalDestination(destination).unfinished

    def prepare():
        if begun:
            shutil.copytree(template, unfinished)

    prepare()
    counted = Faults(0)
    assert attempt(source, destination, counted, resume=begun) is None
    assert tree(destination) == whole
    shutil.rmtree(destination)
    ends = Counter()
    hit = {"kill": CHANGES, errno.ENOSPC: TAKES_ROOM, errno.EIO: set(counted.made)}[fault]
    for number, name in enumerate(counted.made, 1):
        where = f"{number}: {name}"
        if name not in hit:
            continue
        prepare()
        said = attempt(source, destination, Faults(number, fault), resume=begun)
        assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before}, where
        if destination.exists():
            assert tree(destination) == whole, where
            assert said is None, where
            ends["whole"] += 1
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            left = (unfinished / "job.json").exists()
            assert said is not None or fault == "kill", where
            if said is not None:
                assert said.isprintable(), where
                assert left or KEPT not in said, (where, said)
                assert not unfinished.exists() or "nothing was left behind" not in said, (where, said)
            fuse(source, destination, resume=left, **SMALL_FILES)
            assert tree(destination) == whole, where
            assert not unfinished.exists(), where
            ends["gone on with" if left else "begun anew"] += 1
        shutil.rmtree(destination)
    print(f"{fault}: {len(counted.made)} calls, {dict(Counter(counted.made))}; failed {ends.total()}: {dict(ends)}")
    assert set(ends) >= {"whole", "gone on with"} | (set() if begun else {"begun anew"})

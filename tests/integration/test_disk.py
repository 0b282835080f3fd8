"""A disk that is really full, or cannot be written: a small tmpfs, mounted where only the test sees it."""

import shutil
import subprocess
import sys

import pytest
import torch

from skipless import fuse
from tests.models import build, save

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def mounts_work(folder):
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "x", str(folder)], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """Runs Python in a namespace in which tmp_path/disk is a tmpfs of a size; `mount(options)` mounts it again."""
    (tmp_path / "disk").mkdir()
    if not mounts_work(tmp_path / "disk"):
        pytest.skip("mounting a tmpfs needs user namespaces")
    save(build(dtype=torch.float32), tmp_path / "source")

    def run(size, code):
        begin = f"""
import os, subprocess, sys
from pathlib import Path
import skipless
from skipless import InputError, cli, fuse
source, disk = Path({str(tmp_path / "source")!r}), Path({str(tmp_path / "disk")!r})
def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "x", str(disk)], check=True)
def message(*arguments, **options):
    try:
        fuse(*arguments, **options)
    except InputError as error:
        return str(error)
mount("size={size}")
"""
        done = subprocess.run([*NAMESPACE, sys.executable, "-c", begin + code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_too_small_from_the_start(disk):
    out = disk("100k", "print(message(source, disk / 'fused')); print(os.listdir(disk))")
    assert "fused: expected " in out
    assert "bytes of free disk space, found 102,400" in out
    assert out.endswith("[]\n")


@pytest.mark.slow
def test_read_only(disk):
    out = disk("1m", "mount('remount,ro'); print(message(source, disk / 'fused'))")
    assert "disk: expected a folder that can be written, found one that cannot" in out


@pytest.mark.slow
def test_full_in_the_middle_and_resumed(disk, tmp_path):
    fuse(tmp_path / "source", tmp_path / "whole", basis="q")
    out = disk(
        "1m",
        """
def fill(plan, task):
    if task is plan.tasks[2]:
        try:
            (disk / "filler").write_bytes(bytes(2**20))
        except OSError:
            pass
print(message(source, disk / "fused", basis="q", progress=fill))
print((disk / "fused").exists(), (disk / ".fused.unfinished" / "journal.jsonl").exists())
(disk / "filler").unlink()
fuse(source, disk / "fused", basis="q", resume=True)
print(sorted(os.listdir(disk)))
for file in (disk / "fused").iterdir():
    print(file.read_bytes() == (source.parent / "whole" / file.name).read_bytes())
""",
    )
    first, exists, left, *same = out.splitlines()
    assert "fused: could not be written: No space left on device; what is done is kept: go on with --resume" in first
    assert (exists, left) == ("False True", "['fused']")
    assert set(same) == {"True"}

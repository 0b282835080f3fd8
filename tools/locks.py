"""Renew the lock files: `make locks` renews the hashes, `make locks UPGRADE=--upgrade` the releases, too.

requirements.lock and requirements-tools.lock are resolved from pyproject.toml, and keep the releases that they have
where nothing asks for others. Of the other files the releases are changed by hand, and their hashes are renewed here.
torch stays what it is: its CPU builds for Linux are in PyTorch's own index, so all its hashes are changed by hand.
"""

import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
UV = Path(sysconfig.get_path("scripts")) / "uv"
OPTIONS = ("--quiet", "--generate-hashes", "--no-annotate", "--no-header")
EXTRAS = ("gguf", "onnx", "openvino", "ray", "report", "train")
# Lock file -> what it is resolved from, for the oldest Python that is supported.
RESOLVED = {
    "requirements.lock": ("pyproject.toml", "--group", "dev", *(f"--extra={extra}" for extra in EXTRAS)),
    "requirements-tools.lock": ("--group", "tools"),
}
CUDA = ROOT / "requirements-torch-cuda.lock"


def blocks(text: str) -> dict[str, str]:
    """Of a lock file: name -> the lines that lock it."""
    return {block.partition("==")[0]: block for block in re.findall(r"^[\w.-]+==.*\n(?:[ ]+.*\n)*", text, re.MULTILINE)}


def merged(old: str, new: str, resolved: bool) -> str:
    """The new locks under the old comment: torch's are the old ones, and what its CUDA build alone needs is left out.

    Where nothing was resolved, names, releases and markers are the old ones, too.
    """
    before, after = blocks(old), blocks(new)
    if resolved:
        cuda = blocks(CUDA.read_text(encoding="utf-8")).keys() - {"torch"}
        after = {name: block for name, block in after.items() if name not in cuda}
    else:
        for name, block in after.items():
            after[name] = "\n".join([before[name].partition("\n")[0], block.partition("\n")[2]])
    if "torch" in before:
        after["torch"] = before["torch"]
    comment = re.match(r"(?:#.*\n)*", old)
    assert comment
    return comment[0] + "".join(after.values())


def renew(lock: Path, upgrade: list[str]) -> None:
    """Write a lock file anew."""
    old = lock.read_text(encoding="utf-8")
    kept = old.replace("+cpu", "")
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / lock.name
        found.write_text(kept, encoding="utf-8")
        resolved = lock.name in RESOLVED
        if resolved:
            python = re.search(r'^requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
            assert python
            asked = [*RESOLVED[lock.name], f"--python-version={python[1]}", *upgrade]
            if torch := blocks(old).get("torch"):
                (Path(folder) / "torch.txt").write_text(torch.split()[0], encoding="utf-8")
                asked += ["--constraints", f"{folder}/torch.txt"]
        else:
            (Path(folder) / "releases.txt").write_text(kept, encoding="utf-8")
            asked = [f"{folder}/releases.txt", "--no-deps"]
        subprocess.run([UV, "pip", "compile", *OPTIONS, *asked, f"--output-file={found}"], cwd=ROOT, check=True)
        lock.write_text(merged(old, found.read_text(encoding="utf-8"), resolved), encoding="utf-8")


if __name__ == "__main__":
    for lock in sorted([*ROOT.glob("requirements*.lock"), *ROOT.glob("benchmarks/requirements*.lock")]):
        renew(lock, sys.argv[1:])
        print(lock.relative_to(ROOT))

"""What make installs is named by its SHA-256, and nothing in the lock files says where a machine has it from."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = sorted([*ROOT.glob("requirements*.lock"), *ROOT.glob("benchmarks/requirements*.lock")])
MAKEFILE = (ROOT / "Makefile").read_text().replace("\\\n", " ")


def requirements(lock):
    """Name -> version and the rest of each requirement."""
    text = re.sub(r"^#.*\n", "", lock.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = [line.partition("==") for line in text.splitlines()]
    return {name: rest for name, _, rest in found}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_requirement_is_a_release_with_its_hashes(lock):
    found = requirements(lock)
    assert found
    for name, rest in found.items():
        assert re.fullmatch(r"[\w.+]+( ; [^;\\]+?)?(\s+--hash=sha256:[0-9a-f]{64})+", rest), name
        hashes = re.findall(r"sha256:(\w+)", rest)
        assert len(hashes) == len(set(hashes)), name
    assert not re.search(r"://|@ |^\s*-|/\w+/", re.sub(r"^\s+--hash=.*$", "", lock.read_text(), flags=re.MULTILINE))


def test_make_installs_by_hash_alone():
    """Except for skipless itself, which is here, and for the targets that are there to try other releases."""
    recipes = MAKEFILE.replace("$(INSTALL)", re.search("^INSTALL := (.*)$", MAKEFILE, re.MULTILINE)[1])
    lines = [
        line for line in recipes.splitlines() if line.startswith("\t") and re.search("pip (install|download)", line)
    ]
    assert len(lines) >= 5
    for command in (command for line in lines for command in line.split("||")):
        assert "--require-hashes" in command or re.search(r"\$\((NEWEST|OLDEST)\)", command), command
    skipless = re.search("^INSTALL_SKIPLESS := (.*)$", MAKEFILE, re.MULTILINE)[1]
    assert {"--no-deps", "--no-build-isolation", "."} <= set(skipless.split())
    for lock in LOCKS:
        assert str(lock.relative_to(ROOT)) in recipes


def test_skipless_is_built_by_what_is_locked():
    build = re.search(r'^requires = \["(\w+)"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    for lock in ("requirements.lock", "requirements-vllm.lock"):
        assert {build, "editables"} <= requirements(ROOT / lock).keys()


def test_torch_is_one_release_and_never_the_cuda_build_where_a_cpu_build_is_meant():
    every = {lock.stem: requirements(lock)["torch"].split() for lock in LOCKS if "torch" in requirements(lock)}
    versions = {name: found[0].partition("+")[0] for name, found in every.items()}
    assert set(versions.values()) == {versions["requirements"]}
    cpu, cuda = set(every["requirements-torch-cpu"][1:]), set(every["requirements-torch-cuda"][1:])
    assert not cpu & cuda
    assert cpu < set(every["requirements"][1:]) < cpu | cuda
    assert every["requirements"] == every["requirements-vllm"]


def test_what_the_site_has_of_others_is_locked_by_its_hash():
    packages = json.loads((ROOT / "tools" / "site" / "package-lock.json").read_text())["packages"]
    asked = json.loads((ROOT / "tools" / "site" / "package.json").read_text())["dependencies"]
    assert packages.pop("")["dependencies"] == asked
    assert all(package["integrity"].startswith("sha512-") for package in packages.values())
    assert packages["node_modules/pyodide"]["version"] == asked["pyodide"]
    assert not any("resolved" in package for package in packages.values())

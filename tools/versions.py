"""Write the tables of docs/versions.md again, from pyproject.toml and the lock files: `make versions`."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
START, END = "<!-- make versions -->\n", "<!-- end -->\n"


def locked(name: str) -> str | None:
    """The release of a package that the tests run with."""
    for part in ("", "-executorch", "-mlx", "-vllm"):
        lock = f"requirements{part}.lock"
        text = (ROOT / lock).read_text(encoding="utf-8")
        if found := re.search(rf"^{re.escape(name)}==([^\s+]+)", text, re.MULTILINE | re.IGNORECASE):
            return found[1]
    return None


def rows(requirements: list[str], extra: str) -> Iterator[str]:
    """A row for each requirement of pyproject.toml."""
    for requirement in requirements:
        found = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(.*)", requirement)
        assert found
        name, supported = found.groups()
        tested = locked(name.replace("_", "-")) or locked(f"{name}-cpu")
        yield f"| {name} | {extra} | {supported.replace(',', ', ')} | {tested or '-'} |"


def tables() -> str:
    """Python, and every package that the metadata names: what it admits, and what the lock files have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    python = ", ".join(
        name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r":: Python :: 3\.\d+$", name)
    )
    lines = [
        "| package | extra | supported | tested |",
        "|---|---|---|---|",
        f"| Python | | {project['requires-python']} | {python} |",
        *rows(project["dependencies"], ""),
    ]
    for extra, requirements in project["optional-dependencies"].items():
        lines += rows(requirements, f"`{extra}`")
    return "\n".join(line.replace("|  |", "| |") for line in lines) + "\n"


def written(page: str) -> str:
    """The page with its tables made anew."""
    before, _, rest = page.partition(START)
    return f"{before}{START}\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

"""The oldest release of each dependency that the metadata admits, a line each, for pip; of torch, the locked one."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def oldest() -> list[str]:
    """Of the library's own requirements, and of those of the train extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    bounds = [re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<\d+)?", requirement) for requirement in requirements]
    assert all(bounds), requirements
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound and bound[1] != "torch"]


if __name__ == "__main__":
    print("\n".join(oldest()))

"""How exact fusing is, over the architectures and removals that the tests name: fp64, and bf16 beside the original's.

    python benchmarks/equivalence.py

Tiny random models (tests/models.py). Errors are of the logits, relative to each token's largest. In fp64 the weights
are those of the test of named cases, in bf16 those of the test of half precision; a bf16 error is given as a
multiple of what the original loses in bf16. The last line is one JSON object.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

import skipless

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.integration.test_equivalence import CASES, NAMED, conditioned
from tests.models import build, load, relative_error, save


def measure(fields: dict, basis: str, options: dict) -> tuple[float, float]:
    """The error in fp64, and the multiple in bf16."""
    options = {"basis": basis, "remove": ("stream", "p"), **options}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build(**fields)
        skipless.fuse(save(model, folder / "a"), folder / "b", **options)
        exact = relative_error(load(folder / "b"), model)
        model = conditioned(fields, basis, {"remove": options["remove"]})
        source = save(model, folder / "c")
        skipless.fuse(source, folder / "d", dtype="bfloat16", **options)
        fused, own = (relative_error(load(folder / at, torch.bfloat16), model) for at in ("d", "c"))
        return exact, fused / own


def main() -> None:
    print("| case | fp64 | bf16, x the original's |\n|---|---|---|")
    found = {}
    for name, case in zip(NAMED, CASES, strict=True):
        found[name] = measure(*case)
        print(f"| {name} | {found[name][0]:.1e} | {found[name][1]:.2f} |", flush=True)
    exact, half = zip(*found.values(), strict=True)
    print(json.dumps({"cases": len(found), "worst_fp64": max(exact), "worst_bf16": max(half)}))


if __name__ == "__main__":
    main()

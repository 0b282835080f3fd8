"""Can `skipless verify` be fooled, and does it cry wolf? How small a change of one weight does it see?

    python benchmarks/verdicts.py [--fuses 200]

1. Functions that are not A's (tests/other_functions.py), as copies of A and as fused models without their record, in
   fp32, bf16 and fp16: none may be called the same.
2. Random models (tests/random_models.py), stored in those dtypes, fused by random options: none may be called another
   function, unless fuse itself has warned that storing it so loses too much.
3. The bundled model, fused in each dtype: one weight of a matrix that fusing rewrites is multiplied by 1 + x; the
   smallest x that changes the verdict, without the record, and how many of the weight's rounding errors that is. With
   the record, any changed byte is seen.
4. How long the command takes for the bundled model and its fuse: the median of three runs.

The last line is one JSON object.
"""

import argparse
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from tests.models import build, save
from tests.other_functions import OTHERS
from tests.random_models import draw_fields, draw_runs, fuse_what_goes
from transformers.utils import logging as transformers_logging

import skipless
from skipless.algebra.rounding import rounding_error
from skipless.bundled import BUNDLED

DTYPES = ("float32", "bfloat16", "float16")
WEIGHT = "model.layers.2.mlp.up_proj.weight"


def others(dtype: str) -> tuple[int, list[str]]:
    """How many were tried, and which were called the same."""
    tried, fooled = 0, []
    for name, other in OTHERS.items():
        for fused in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                a, b = Path(folder) / "a", Path(folder) / "b"
                save(other.model(dtype), a)
                if fused:
                    skipless.fuse(a, b)
                    (b / "skipless.json").unlink()
                else:
                    shutil.copytree(a, b)
                other.change(b)
                tried += 1
                if skipless.verify(a, b, tokens=8, dtypes=()).same:
                    fooled.append(f"{name} ({'fused' if fused else 'a copy'}, {dtype})")
    return tried, fooled


def fuses(count: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """What was found of so many fuses, and those that were called another function for no reason."""
    found, wrong = Counter(), []
    for _ in track(range(count), console=None):
        while True:
            seed += 1
            generator = random.Random(seed)
            fields = draw_fields(generator.choice)
            run, dtype = draw_runs(generator.choice, fields["num_hidden_layers"])[0], generator.choice(DTYPES)
            with tempfile.TemporaryDirectory() as folder:
                a, b = Path(folder) / "a", Path(folder) / "b"
                save(build(seed, getattr(torch, generator.choice(("float32", dtype))), **fields), a)
                if fuse_what_goes({**run, "dtype": dtype}, a, b):
                    continue  # refused
                record = json.loads((b / "skipless.json").read_text())
                warned = bool(record["losses"]) or any(seam["problem"] for seam in record["seams"])
                report = skipless.verify(a, b, tokens=8, dtypes=())
                if report.note.startswith("cannot be judged: A itself"):
                    found["A gives NaN"] += 1  # a norm with eps 0 of nothing but zeros
                    continue
                found["same" if report.same else "not, and fuse has warned" if warned else "not"] += 1
                if not report.same and not warned:
                    wrong.append(f"seed {seed}, {dtype}, {run}: {report.note}")
                break
    return found, wrong


def smallest(dtype: str, folder: Path) -> float:
    """The smallest change of one weight that is seen, to half of it: each is 1.5 times the last."""
    fused = folder / f"fused {dtype}"
    skipless.fuse(BUNDLED, fused, dtype=dtype)
    (fused / "skipless.json").unlink()
    tensors = load_file(fused / "model.safetensors")
    place = divmod(int(tensors[WEIGHT].abs().argmax()), tensors[WEIGHT].shape[1])
    weight, change = tensors[WEIGHT][place].clone(), rounding_error(getattr(torch, dtype))
    while True:
        tensors[WEIGHT][place] = weight * (1 + change)
        save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
        if tensors[WEIGHT][place] != weight and not skipless.verify(BUNDLED, fused, tokens=8, dtypes=()).same:
            return change
        change *= 1.5


def seconds(fused: Path) -> float:
    """Of the command, from its start to its end, the median of three runs on all cores."""
    command = [str(Path(sys.executable).with_name("skipless")), "verify", str(BUNDLED), str(fused)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    times = []
    for _ in range(3):
        start = time.monotonic()
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        times.append(time.monotonic() - start)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fuses", type=int, default=200)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    tried, fooled = 0, []
    for dtype in DTYPES:
        count, same = others(dtype)
        tried, fooled = tried + count, fooled + same
    print(f"{tried} other functions, {len(fooled)} called the same", *fooled, sep="\n  ", flush=True)
    found, wrong = fuses(arguments.fuses)
    print(f"{arguments.fuses} fuses: {dict(found)}", *wrong, sep="\n  ", flush=True)
    changes = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            changes[dtype] = smallest(dtype, Path(folder))
            errors = changes[dtype] / rounding_error(getattr(torch, dtype))
            print(f"{dtype}: seen from {changes[dtype]:.1e} on, {errors:.0f} rounding errors", flush=True)
        skipless.fuse(BUNDLED, Path(folder) / "fused")
        took = seconds(Path(folder) / "fused")
        print(f"verify of the bundled model and its fuse: {took:.1f} s", flush=True)
    result = {"others": tried, "false_same": fooled, "fuses": dict(found), "false_no": wrong, "smallest": changes}
    result["seconds"] = took
    print(json.dumps(result))
    sys.exit(1 if fooled or wrong else 0)


if __name__ == "__main__":
    main()

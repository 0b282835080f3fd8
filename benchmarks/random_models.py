"""How many of random models, over the whole product of switches and removals, are fused wrongly? None may be.

    python benchmarks/random_models.py [--models 10000] [--processes 2]

Each tiny model (tests/random_models.py) has random values in every tensor, is fused once or twice with random options,
and is compared with the original in fp64: logits, relative to each token's largest. The last line is one JSON object.
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.progress import track
from tests.random_models import draw_fields, draw_runs, judge
from tests.tolerances import FP64
from transformers.utils import logging as transformers_logging

MEMORY = Path("/dev/shm")


def one(seed: int) -> tuple[int, str, float | None]:
    """The model of a seed: what was refused, if all was, and the error."""
    generator = random.Random(seed)
    fields = draw_fields(generator.choice)
    runs = draw_runs(generator.choice, fields["num_hidden_layers"])
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        refusal, error = judge(fields, runs, seed, Path(folder))
    return seed, refusal, error


def quiet() -> None:
    """No warnings of losses in half precision, which are not what is asked here."""
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()


def results(models: int, processes: int) -> Iterator[tuple[int, str, float | None]]:
    with multiprocessing.get_context("spawn").Pool(processes, quiet) as pool:
        yield from track(pool.imap_unordered(one, range(models), chunksize=8), total=models, console=None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    start, errors, reasons, wrong = time.monotonic(), [], Counter(), []
    for seed, refusal, error in results(arguments.models, arguments.processes):
        if error is None:
            reasons[" ".join(refusal.split()[:8])] += 1
            continue
        errors.append(error)
        if not error <= FP64:
            wrong.append(seed)
            print(f"seed {seed}: {error:.1e}", flush=True)
    print("refused, most often because:")
    for reason, count in reasons.most_common(12):
        print(f"  {count:5}  {reason} ...")
    found = {"models": arguments.models, "fused": len(errors), "refused": reasons.total(), "wrong": wrong}
    print(json.dumps(found | {"worst": max(errors), "seconds": round(time.monotonic() - start)}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

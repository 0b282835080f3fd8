"""A token's time at batch 1 for each kind of block that benchmarks/pays.py trains.

    python benchmarks/pace.py [--width 2048] [--rounds 7] [--only KIND ...]

Each kind as pays.py has it, but so wide that its weights fit no cache: random, in bf16, in torch's fast path. Models
decode in turns, each in a process of its own; the ratio is the median of those of a round. Beside them the loss of the
kind at width 256 (pays.csv). Prints Markdown.
"""

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import runs
from pays import SIZES, kinds, model_of
from skipless.serving.bench import Work, measure
from skipless.serving.shapes import write
from skipless.serving.worker import Worker

SIZE = "4M"
# The first is what others are compared with. At width 2048, all of them fit into 24 GB.
SHOWN = (
    "pre-norm with skips", "pre-norm with skips without QP", "SAS", "SAS-P", "serial MHA", "serial MHA without QP",
    "serial MQA", "serial MQA without QP", "parallel MHA", "parallel MHA without QP",
)  # fmt: skip
WORK = Work(batches=(1,), context=128, tokens=32, prefill=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    d, f, layers = SIZES[SIZE]
    trained = runs.best(runs.read(Path(__file__).with_name("pays.csv")))
    parser.add_argument("--only", nargs="+", choices=list(kinds(d, f)), default=SHOWN, help="the first: 1.00x")
    arguments = parser.parse_args()
    scale = arguments.width // d
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        loaded = []
        for kind in arguments.only:
            folder = Path(temporary) / kind
            write(model_of(kind, scale * d, scale * f, layers), "bfloat16", folder)
            loaded.append((kind, stack.enter_context(Worker.of("torch", folder, "bfloat16", compiled=True))))
        found = measure(loaded, WORK, arguments.rounds, "torch, compiled", "bfloat16")
    print(f"width {scale * d}, read bandwidth {found.bandwidth / 1e9:.1f} GB/s\n")
    print("| kind | MB a token | ms a token | speed | of the bandwidth | held-out nats a token at width 256 |")
    print("|---|---|---|---|---|---|")
    for speed in found.speeds:
        (decoding,) = speed.decoding
        losses = runs.losses(runs.ended(trained.get((SIZE, speed.name), [])))
        print(
            f"| {speed.name} | {speed.bytes_per_token / 1e6:,.0f} | {1e3 / decoding.tokens_per_second:.1f} | "
            f"{decoding.speedup:.2f}x | {decoding.share:.0%} | {f'{statistics.mean(losses):.3f}' if losses else ''} |"
        )


if __name__ == "__main__":
    main()

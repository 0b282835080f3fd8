"""Time and memory of choosing a basis and rounding in bf16, beside the plain fp64 fold of the same layer.

    python benchmarks/fold.py             # Mistral-7B's layer: d = 4096, Q, K, V 6144 wide, f = 14336

One layer of random matrices. The fold is O S (the writer) and P M (gate and up). Rounds alternate; ratios of paired
rounds, their median. Memory: the process's peak, less what it held before, over the layer in fp64.
The last line is one JSON object.
"""

import argparse
import json
import platform
import resource
import statistics
import time

import torch

from skipless.eliminate import Affine
from skipless.prediction import OpenStream
from skipless.rounding import round_stream
from skipless.seams import Seam

READERS = ("q_proj", "k_proj", "v_proj")


def peak() -> int:
    """The process's largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=4096, help="hidden_size")
    parser.add_argument("--m", type=int, default=6144, help="outputs of Q, K and V together")
    parser.add_argument("--f", type=int, default=14336, help="intermediate_size")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    d, m, f = arguments.d, arguments.m, arguments.f
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64).mul_(rows**-0.5)

    before = peak()
    e = (m - d) // 2
    o, p, up = draw(d, f).T, draw(d, d), draw(2 * f, d).T
    readers = {name: draw(width, d).T for name, width in zip(READERS, (d, e, e), strict=True)}
    seam = Seam("stream", 0, d, ("o",), READERS, {"pivoted": READERS}, d * d, rest="rest_proj", order="column_order")
    affines = {"o": Affine(o), **{name: Affine(weight) for name, weight in readers.items()}}
    size = 8 * sum(tensor.numel() for tensor in (o, p, up, *readers.values()))
    folds, extras = [], []
    steps: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        stream = None  # what the round before it made
        folded = (readers["q_proj"].T @ o.T).T, p @ up
        folds.append(time.perf_counter() - start)
        del folded

        start = time.perf_counter()
        opened = OpenStream(seam, affines)
        basis = opened.basis("pivoted")
        chosen = time.perf_counter() - start
        stream = opened.close(basis)  # O S is part of the fold; R = S^-1 A_r, which the plain way needs, too, is not
        closing = time.perf_counter() - start - chosen
        begin = time.perf_counter()
        round_stream(stream, opened.weights, opened.extra_weights, {"o": torch.bfloat16, "rest": torch.bfloat16})
        rounding = time.perf_counter() - begin
        extras.append(chosen + rounding)
        for name, value in (("basis", chosen), ("close", closing), ("round", rounding)):
            steps.setdefault(name, []).append(value)
    ratios = [extra / fold for extra, fold in zip(extras, folds, strict=True)]
    flops = 2 * f * d * d + 4 * d * d * f
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "fold_seconds": statistics.median(folds),
        "fold_gflops": flops / statistics.median(folds) / 1e9,
        **{f"{name}_seconds": statistics.median(values) for name, values in steps.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "peak_over_layer": (peak() - before) / size,
        "layer_gb": size / 1e9,
    }
    print(f"layer: {size / 1e9:.2f} GB in fp64")
    print(f"fold: {result['fold_seconds']:.1f} s, {result['fold_gflops']:.0f} GFLOP/s")
    for name in steps:
        print(f"  {name}: {result[f'{name}_seconds']:.2f} s")
    print(f"basis and rounding over the fold: {result['ratio']:.2f}x (each: {', '.join(f'{r:.2f}' for r in ratios)})")
    print(f"peak memory, the layer included: {result['peak_over_layer']:.2f}x the layer in fp64")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

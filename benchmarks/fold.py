"""Seconds, FLOPs, memory and error of one layer: the plain way in numpy, and as fuse does it, rounded with feedback.

    python benchmarks/fold.py             # Mistral-7B's layer in bf16: d = 4096, K and V 1024 wide, f = 14336
    OMP_NUM_THREADS=1 python benchmarks/fold.py --d 2048 --kv 512 --f 7168

Random matrices. The plain way: everything in fp64, numpy.linalg.inv(Q), O Q, Q^-1 K, Q^-1 V, P gate, P up, then a cast
to bf16. Ours: run_task for the layer's two tasks, by q and pivoted. Roofline: FLOPs of each precision (cost.py) at the
rate of the product of two square matrices in it, measured in the same round. Rounds alternate; ratios are medians of
paired rounds. On one thread, the clock is the process's, which does not count what others do on the machine.
Errors: of q, k, v, and of gate and up, for white inputs, in fp64 arithmetic. The last line is one JSON object.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch

from skipless.algebra.linalg import multiply
from skipless.architecture.config import Architecture
from skipless.checkpoint.reader import CheckpointReader, TensorInfo
from skipless.rewrite.cost import cost, steps
from skipless.rewrite.execution import run_task
from skipless.rewrite.planning import Plan, Task, make_plan
from skipless.rewrite.request import Request

Tensors = Mapping[str, torch.Tensor]
SIDE, SAMPLE = 4096, 256  # of the square matrices whose products are timed; rows on which errors are measured


class Memory:
    """A checkpoint of two random layers in bf16: all that make_plan asks a reader for. Tensors are made when read."""

    def __init__(self, d: int, kv: int, f: int, head_dim: int = 128):
        self.config = {
            "model_type": "skipless",
            "hidden_size": d,
            "intermediate_size": f,
            "vocab_size": 32000,
            "num_hidden_layers": 2,
            "num_attention_heads": d // head_dim,
            "num_key_value_heads": kv // head_dim,
            "head_dim": head_dim,
            "ffn_type": "glu",
            "hidden_act": "silu",
            "block_type": "serial",
            "residual": "none",
            "norm_type": "none",
            "position_type": "rope",
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
        }
        shapes = Architecture.from_config(self.config).tensors()
        self.tensors = {name: TensorInfo(shape, torch.bfloat16, "memory") for name, shape in shapes.items()}

    def check(self, *_: object) -> None:
        """Nothing can be wrong."""

    def tensor(self, name: str) -> torch.Tensor:
        shape = self.tensors[name].shape
        generator = torch.Generator().manual_seed(sorted(self.tensors).index(name))
        weight = torch.empty(shape, dtype=torch.bfloat16)
        for rows in weight.split(1024):
            rows.copy_(torch.randn(rows.shape, generator=generator).mul_(shape[1] ** -0.5))
        return weight


def task_of(plan: Plan, kind: str, layer: int) -> Task:
    """The task that closes a seam."""
    return next(task for task in plan.tasks if any((kind, layer) == (seam.kind, seam.layer) for seam in task.seams))


def notebook(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The layer without Q and P, as one would write it down."""
    o, q, k, v, p, gate, up = (tensor.double().numpy() for tensor in tensors.values())
    inverse = np.linalg.inv(q)  # weights are stored transposed: (O Q)^T = Q^T O^T
    products = {"o": q @ o, "k": k @ inverse, "v": v @ inverse, "gate": gate @ p, "up": up @ p}
    return {name: torch.from_numpy(product).bfloat16() for name, product in products.items()}


def errors(tensors: Tensors, found: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Relative errors of what is read in the end."""
    o, q, k, v, p, gate, up = tensors.values()
    rows = torch.randint(o.shape[1], (SAMPLE,), generator=torch.Generator().manual_seed(1))
    x = o[:, rows].double().T
    exact = {name: x @ weight.double().T for name, weight in {"q": q, "k": k, "v": v}.items()}
    y = found["o"][:, rows].double().T
    if "rest" in found:
        read = torch.cat([y, y @ found["rest"].double().T], 1)[:, found["order"].long()]
        parts = dict(zip("qkv", read.split([len(q), len(k), len(v)], 1), strict=True))
    else:
        parts = {"q": y, "k": y @ found["k"].double().T, "v": y @ found["v"].double().T}
    outputs = rows % len(gate)
    for name, weight in (("gate", gate), ("up", up)):
        exact[name], parts[name] = weight[outputs].double() @ p.double(), found[name][outputs].double()
    return {
        name: (torch.linalg.norm(parts[name] - whole) / torch.linalg.norm(whole)).item()
        for name, whole in exact.items()
    }


def ours(plan: Plan, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The layer as fuse does it: its stream seam, and its P-M seam."""
    short = {"down_proj": "o", "k_proj": "k", "v_proj": "v", "rest_proj": "rest", "gate_proj": "gate", "up_proj": "up"}
    found = {}
    for kind, layer in (("stream", 1), ("p", 0)):
        for name, tensor in run_task(plan, task_of(plan, kind, layer), tensors.__getitem__).tensors:
            found["order" if name.endswith("order") else short[name.split(".")[-2]]] = tensor
    return found


def rates(clock: Callable[[], float], side: int) -> dict[str, float]:
    """FLOP/s of products of square matrices, by precision."""
    found = {}
    for name in ("float64", "float32", "bfloat16"):
        left, right = (torch.randn(side, side).to(getattr(torch, name)) for _ in range(2))
        start = clock()
        multiply(left, right)
        found[name] = 2 * side**3 / (clock() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=4096, help="hidden_size")
    parser.add_argument("--kv", type=int, default=1024, help="outputs of K, and of V")
    parser.add_argument("--f", type=int, default=14336, help="intermediate_size")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    reader = Memory(arguments.d, arguments.kv, arguments.f)
    plans = {basis: make_plan(cast(CheckpointReader, reader), Request(basis)) for basis in ("q", "pivoted")}
    names = [f"model.layers.{name}.weight" for name in ("0.mlp.down_proj", *(f"1.self_attn.{x}_proj" for x in "qkv"))]
    names += [f"model.layers.0.{name}.weight" for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")]
    tensors = {name: reader.tensor(name) for name in names}
    ways: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "q": lambda: ours(plans["q"], tensors),
        "pivoted": lambda: ours(plans["pivoted"], tensors),
        "notebook": lambda: notebook(tensors),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, "roofline q", "roofline pivoted")}
    measured: dict[str, list[float]] = {}
    lost: dict[str, dict[str, float]] = {}
    memory: dict[str, int] = {}
    flops: dict[str, dict[str, float]] = {}
    for basis, plan in plans.items():
        costs = [cost(plan, task_of(plan, *place)) for place in (("stream", 1), ("p", 0))]
        flops[basis] = {name: sum(each.flops.get(name, 0.0) for each in costs) for name in costs[0].flops}
        memory[f"{basis} bound"] = max(each.memory for each in costs)
    for _ in range(arguments.rounds):
        now = rates(clock, min(SIDE, arguments.d))
        for name, rate in now.items():
            measured.setdefault(name, []).append(rate)
        for basis, count in flops.items():
            seconds[f"roofline {basis}"].append(sum(each / now[name] for name, each in count.items()))
        for name, way in ways.items():
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, clock()
            found = way()
            seconds[name].append(clock() - start)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            memory[name] = max(memory.get(name, 0), 1024 * (after - before))  # of the first to need so much
            lost.setdefault(name, errors(tensors, found))

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))

    middle = {name: statistics.median(values) for name, values in seconds.items()}
    speed = {name: statistics.median(values) for name, values in measured.items()}
    faster = {basis: ratio("notebook", basis) for basis in plans}
    slower = {basis: ratio(basis, f"roofline {basis}") for basis in plans}
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "clock": clock.__name__,
        "rates": speed,
        "seconds": middle,
        "notebook_over_ours": faster,
        "ours_over_roofline": slower,
        "flops": flops,
        "errors": lost,
        "memory": memory,
    }
    for basis, plan in plans.items():
        print(f"by {basis}:")
        for place in (("stream", 1), ("p", 0)):
            for name, (kind, number) in steps(plan, task_of(plan, *place)).items():
                print(f"  {name:32} {number / 1e9:8.1f} GFLOP in {kind}")
    print("rates:", ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in speed.items()))
    for name in ways:
        shown = ", ".join(f"{module} {error:.1e}" for module, error in lost[name].items())
        print(f"{name:9} {middle[name]:7.1f} s; errors: {shown}")
    for basis in plans:
        print(
            f"{basis}: the plain way takes {faster[basis]:.2f}x as long; the roofline is "
            f"{middle[f'roofline {basis}']:.1f} s, of which this is "
            f"{slower[basis]:.2f}x; memory {memory[basis] / 1e9:.2f} GB beside the layer's, "
            f"by cost.py {memory[f'{basis} bound'] / 1e9:.2f} GB with it"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()

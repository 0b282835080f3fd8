"""What starting values, shaping and optimizer are worth to a small model without skips and norms.

    python benchmarks/starts.py WORK [--tokens 128000] [--only KIND ...]

Each kind trains on the same tokens of the standard library's source. Prints one row of a Markdown table a kind:
held-out nats a token, mean and spread over seeds. SOAP is pytorch-optimizer's (pip install pytorch-optimizer); without
it, its rows are left out.
"""

import argparse
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from fade import SHAPE, VOCABULARY, trained
from pays import text_of
from skipless.train.recipe import Start

SEEDS, RATE = (0, 1), 0.003
BATCH, LAYERS = 4, 6


def normal(weight: torch.Tensor) -> torch.Tensor:
    """In the place of orthogonal matrices: entries of variance 1 / inputs."""
    return nn.init.normal_(weight, std=weight.shape[1] ** -0.5)


def adamw(matrices: list[torch.Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(matrices, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)


def soap(matrices: list[torch.Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(matrices, lr=lr, betas=(0.95, 0.95), weight_decay=weight_decay, precondition_frequency=10)


def instead_of_muon(make: Callable[..., torch.optim.Optimizer]) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: patch.object(torch.optim, "Muon", make)


Kind = tuple[dict[str, Any], tuple[float, ...], Callable[[], AbstractContextManager[Any]]]
VALUE, FULL = {"attention_shaping": "value"}, {"attention_shaping": "full"}
KINDS: dict[str, Kind] = {
    "value shaping, K = 0": (VALUE, (), nullcontext),
    "value shaping, K = Q": (VALUE, (1.0, 1.0), nullcontext),
    "full shaping, K = 0": (FULL, (), nullcontext),
    "plain, K = Q": ({}, (), nullcontext),
    "plain, K = 0": ({}, (0.0, 0.0), nullcontext),
    "plain, K = 3 Q": ({}, (3.0, 3.0), nullcontext),
    "plain, K = Q to 3 Q": ({}, (1.0, 3.0), nullcontext),
    "plain, K = Q, normal, not orthogonal": ({}, (), lambda: patch.object(nn.init, "orthogonal_", normal)),
    "value shaping, K = 0, AdamW": (VALUE, (), instead_of_muon(adamw)),
    "value shaping, K = 0, SOAP": (VALUE, (), instead_of_muon(soap)),
    "plain, K = 3 Q, SOAP": ({}, (3.0, 3.0), instead_of_muon(soap)),
}


def loss(kind: str, seed: int, tokens: int, text: Path, out: Path) -> float:
    """Held-out nats a token of one run."""
    fields, sharpness, within = KINDS[kind]
    model = SHAPE | {"num_hidden_layers": LAYERS, "gate_bias": True} | fields
    with within():
        return trained(
            out, text, tokens, seed, rate=RATE, batch=BATCH, model=model, start=Start(sharpness=sharpness)
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokens", type=int, default=128_000)
    parser.add_argument("--only", nargs="+", default=list(KINDS))
    arguments = parser.parse_args()
    text, out = text_of(arguments.work, VOCABULARY), arguments.work / "starts"
    print("| starting values | held-out nats a token | spread of seeds |\n|---|---|---|", flush=True)
    for kind in arguments.only:
        if "SOAP" in kind and importlib.util.find_spec("pytorch_optimizer") is None:
            continue
        losses = [loss(kind, seed, arguments.tokens, text, out) for seed in SEEDS]
        mean = sum(losses) / len(losses)
        print(f"| {kind} | {mean:.3f} | {max(losses) - min(losses):.3f} |", flush=True)


if __name__ == "__main__":
    main()

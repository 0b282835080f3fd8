"""How fast do models decode at batch 1? Interleaved rounds, medians, and the ceiling that reading the weights sets.

Each token reads every weight once (of the embedding table one row), so tokens/s <= bandwidth / bytes per token.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel

from skipless.errors import InputError
from skipless.inference import greedy_config, load

PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Speed:
    """One model's decoding: tokens/s of each round, their median, bytes read per token, and bandwidth / those bytes.

    The bandwidth is measured on a buffer of the model's own size, in bytes/s, so that a model that fits the cache is
    compared with the cache.
    """

    name: str
    rounds: tuple[float, ...]
    tokens_per_second: float
    bytes_per_token: int
    ceiling: float


def decode(
    models: Sequence[tuple[str, PreTrainedModel]], *, tokens: int = 64, rounds: int = 7
) -> tuple[tuple[Speed, ...], tuple[float, ...]]:
    """Decode `tokens` greedy tokens per round with each model in turn, alternating the order.

    Returns each model's Speed, and for each model the median over rounds of its speed over the first model's.
    """
    for name, model in models:
        limit = model.config.max_position_embeddings
        if PROMPT_TOKENS + tokens > limit:
            raise InputError(f"tokens: expected at most {limit - PROMPT_TOKENS} for {name}, found {tokens}")
    measured: list[list[float]] = [[] for _ in models]
    for _, model in models:
        _tokens_per_second(model, tokens)  # warm up
    for turn in range(rounds):
        order = range(len(models))
        for index in order if turn % 2 == 0 else reversed(order):
            measured[index].append(_tokens_per_second(models[index][1], tokens))
    speeds = []
    for (name, model), found in zip(models, measured, strict=True):
        size = bytes_per_token(model)
        speeds.append(Speed(name, tuple(found), median(found), size, read_bandwidth(size) / size))
    ratios = tuple(median(b / a for a, b in zip(measured[0], found, strict=True)) for found in measured)
    return tuple(speeds), ratios


def bench(
    folders: Sequence[str | Path], *, dtype: str = "float32", tokens: int = 64, rounds: int = 7
) -> tuple[tuple[Speed, ...], tuple[float, ...]]:
    """`decode` on model folders, loaded in `dtype`."""
    return decode(
        [(str(folder), load(Path(folder), getattr(torch, dtype))) for folder in folders], tokens=tokens, rounds=rounds
    )


def bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of weights read to decode one token at batch 1: all but the tables that are only looked up in."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    output = model.get_output_embeddings()
    if output is not None:
        tables.discard(id(output.weight))
    return sum(weight.nbytes for weight in model.parameters() if id(weight) not in tables)


def read_bandwidth(size: int, repeats: int = 15) -> float:
    """Bytes/s at which torch sums a buffer of `size` bytes, the best of several repeats."""
    buffer = torch.ones(max(1, size // 4), dtype=torch.float32)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best


@torch.no_grad()
def _tokens_per_second(model: PreTrainedModel, tokens: int) -> float:
    ids = torch.zeros((1, PROMPT_TOKENS), dtype=torch.long)
    config = greedy_config(tokens)
    config.output_logits = False
    start = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return tokens / (time.perf_counter() - start)

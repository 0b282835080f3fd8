"""Are two checkpoints the same function? Logits, distributions and greedy tokens of B against A, in several dtypes.

The reference is always A in fp64, which is the arbiter: an error that fp64 does not remove is not rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipless.checkpoint.reader import CheckpointReader
from skipless.dtypes import DTYPE_NAMES
from skipless.errors import InputError
from skipless.inference import greedy_config, load, load_tokenizer
from skipless.tolerances import TOLERANCES, tolerance

# A dtype in which the original itself is so wrong that any other model would pass proves nothing.
LARGEST_TOLERANCE = 0.25

# What is compared: at most so many positions, and so many logits (512 MB in fp64).
MAX_POSITIONS = 4096
MAX_LOGITS = 2**26

DEFAULT_DTYPES = ("float64", "float32", "bfloat16")
DEFAULT_PROMPT = 'def read(path):\n    """Read'


@dataclass(frozen=True)
class Row:
    """B in one dtype against A in fp64; the fields that begin with own_ are A's in the same dtype.

    logit_error: max |difference| / max |logit of A|. kl: mean KL(A || B) per token, in nats. top1: fraction of
    positions with the same most likely token. greedy: fraction of greedy tokens before the first difference (a tie,
    within the tolerance, is not one). judged: whether the dtype is at least as fine as B's stored weights.
    """

    dtype: str
    logit_error: float
    own_logit_error: float
    tolerance: float
    kl: float
    own_kl: float
    top1: float
    own_top1: float
    greedy: float
    own_greedy: float
    judged: bool
    passed: bool


@dataclass(frozen=True)
class Report:
    """The verdict, B's coarsest stored dtype, how many tokens of the vocabulary were tried, and what to make of it."""

    same: bool
    stored: str
    tokens_seen: int
    vocab_size: int
    rows: tuple[Row, ...]
    note: str


@dataclass(frozen=True)
class _Inputs:
    """Sequences to compute logits of and prompts to continue by `tokens`, (batch, length) each, and their coverage."""

    sequences: tuple[Tensor, ...]
    prompts: tuple[Tensor, ...]
    tokens: int
    tokens_seen: int
    vocab_size: int


@dataclass(frozen=True)
class _Outcome:
    """What one model did: logits (positions, vocab) in fp64, and greedy tokens with the logits they were chosen by."""

    logits: Tensor
    greedy: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]


def verify(
    a: str | Path,
    b: str | Path,
    *,
    dtypes: Sequence[str] = DEFAULT_DTYPES,
    prompt: str = DEFAULT_PROMPT,
    tokens: int = 64,
    seed: int = 0,
) -> Report:
    """Compare model folder B with the original A on a prompt (if A has a tokenizer) and on random tokens.

    tokens: length of the sequences that walk through the vocabulary, and of the greedy continuations. Tokens beyond the
    first MAX_POSITIONS are not tried: the report says how many were. Raises InputError for folders that do not load
    whole, or whose vocabularies differ.
    """
    a, b = Path(a), Path(b)
    readers = CheckpointReader(a), CheckpointReader(b)
    for name in dtypes:
        if name not in DTYPE_NAMES:
            raise InputError(f"dtype: expected one of {', '.join(DTYPE_NAMES)}, found {name!r}")
    stored = max(
        (info.dtype for info in readers[1].tensors.values() if not info.is_index),
        key=lambda dtype: torch.finfo(dtype).eps,
    )
    stored_name = str(stored).removeprefix("torch.")
    dtypes = tuple(dict.fromkeys((*dtypes, stored_name)))  # the dtype that is always judged
    inputs = _inputs(a, [reader.config for reader in readers], prompt, tokens, seed)

    reference = _run(a, torch.float64, inputs)
    own = {name: reference if name == "float64" else _run(a, getattr(torch, name), inputs) for name in dtypes}
    tolerances = {name: tolerance(getattr(torch, name), _logit_error(own[name], reference)) for name in dtypes}
    rows = []
    for name in dtypes:
        outcome = _run(b, getattr(torch, name), inputs)
        largest = max(tolerances[name], tolerances[stored_name])
        error = _logit_error(outcome, reference)
        greedy, alike = _greedy(outcome, reference, largest)
        half = stored not in TOLERANCES or getattr(torch, name) not in TOLERANCES
        rows.append(
            Row(
                dtype=name,
                logit_error=error,
                own_logit_error=_logit_error(own[name], reference),
                tolerance=largest,
                kl=_kl(outcome, reference),
                own_kl=_kl(own[name], reference),
                top1=_top1(outcome, reference),
                own_top1=_top1(own[name], reference),
                greedy=greedy,
                own_greedy=_greedy(own[name], reference, largest)[0],
                judged=torch.finfo(getattr(torch, name)).eps <= torch.finfo(stored).eps,
                passed=error <= largest <= LARGEST_TOLERANCE and (alike or half),
            )
        )
    same = all(row.passed for row in rows if row.judged)
    note = _note(rows, same, stored_name)
    return Report(same, stored_name, inputs.tokens_seen, inputs.vocab_size, tuple(rows), note)


def _inputs(folder: Path, configs: Sequence[dict[str, Any]], prompt: str, tokens: int, seed: int) -> _Inputs:
    """One long sequence of random tokens; short ones that walk through the vocabulary; the prompt, if A can read it."""
    vocab_size, other = (_size(config, "vocab_size", None) for config in configs)
    if vocab_size != other:
        raise InputError(f"vocab_size: expected {vocab_size} as in A, found {other} in B")
    limit = min(_size(config, "max_position_embeddings", 2**31) for config in configs)
    generator = torch.Generator().manual_seed(seed)
    positions = max(4 * tokens, min(MAX_POSITIONS, MAX_LOGITS // vocab_size))
    long = torch.randint(vocab_size, (1, min(limit, positions // 2)), generator=generator)
    width = min(tokens, limit)
    order = torch.randperm(vocab_size, generator=generator)
    rows = max(1, (positions - long.shape[1]) // width)
    walk = order.repeat(-(-rows * width // vocab_size))[: rows * width].view(rows, width)
    sequences = [long, *walk.split(8)]
    prompts = [walk[:1, : max(1, min(tokens, limit - tokens) // 4)]]
    if prompt and (folder / "tokenizer.json").exists():
        encoded = load_tokenizer(folder)(prompt, return_tensors="pt").input_ids
        if encoded.shape[1] and int(encoded.max()) < vocab_size:
            sequences.append(encoded)
            prompts.append(encoded)
    if any(start.shape[1] + tokens > limit for start in prompts):
        raise InputError(
            f"tokens: expected a prompt and {tokens} tokens to fit in {limit} positions; use fewer --tokens"
        )
    seen = torch.cat([ids.flatten() for ids in sequences]).unique().numel()
    return _Inputs(tuple(sequences), tuple(prompts), tokens, seen, vocab_size)


def _size(config: dict[str, Any], name: str, default: int | None) -> int:
    value = config.get(name, default)
    if type(value) is not int or value < 1:
        raise InputError(f"config.json: {name}: expected a positive integer, found {value!r}")
    return value


@torch.no_grad()
def _run(folder: Path, dtype: torch.dtype, inputs: _Inputs) -> _Outcome:
    model = load(folder, dtype)
    logits = torch.cat([model(input_ids=ids).logits.flatten(0, 1).double() for ids in inputs.sequences])
    greedy, scores = [], []
    for ids in inputs.prompts:
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=greedy_config(inputs.tokens)
        )
        greedy.append(output.sequences[0, ids.shape[1] :])
        scores.append(torch.cat(output.logits).double())
    return _Outcome(logits, tuple(greedy), tuple(scores))


def _logit_error(outcome: _Outcome, reference: _Outcome) -> float:
    error = (outcome.logits - reference.logits).abs().max() / reference.logits.abs().max()
    return error.item() if error.isfinite() else math.inf


def _kl(outcome: _Outcome, reference: _Outcome) -> float:
    """Mean over positions of KL(reference || outcome), in nats."""
    target, found = reference.logits.log_softmax(-1), outcome.logits.log_softmax(-1)
    return (target.exp() * (target - found)).sum(-1).mean().clamp(min=0).item()


def _top1(outcome: _Outcome, reference: _Outcome) -> float:
    return (outcome.logits.argmax(-1) == reference.logits.argmax(-1)).double().mean().item()


def _greedy(outcome: _Outcome, reference: _Outcome, tolerance: float) -> tuple[float, bool]:
    """Fraction of equal tokens before the first difference, and whether every first difference is a tie."""
    equal, total, alike = 0, 0, True
    for found, expected, scores in zip(outcome.greedy, reference.greedy, reference.scores, strict=True):
        different = (found != expected).nonzero()
        first = int(different[0]) if len(different) else len(expected)
        equal, total = equal + first, total + len(expected)
        if first < len(expected):
            gap = scores[first, expected[first]] - scores[first, found[first]]
            alike &= bool(gap <= 2 * tolerance * scores[first].abs().max())
    return equal / total, alike


def _note(rows: Sequence[Row], same: bool, stored: str) -> str:
    """What a reader should make of the table, in a sentence."""
    blind = [row.dtype for row in rows if row.judged and not row.tolerance <= LARGEST_TOLERANCE]
    if blind:
        return (
            f"cannot be judged: in {blind[0]}, the original itself is too far from what it is in fp64; fuse with "
            f"--dtype float32 or finer and verify that"
        )
    if not same:
        if stored == "float64":
            return "not the same function: in fp64, rounding cannot explain the difference"
        return (
            f"not the same function as stored in {stored}; to tell rounding from a bug, fuse with --dtype float64 and "
            f"verify that: fp64 leaves no room for rounding"
        )
    same_as = f"the same function as stored in {stored}"
    if worse := [row for row in rows if not row.judged and not row.passed]:
        names = " or ".join(row.dtype for row in worse)
        factors = " and ".join(f"{row.logit_error / max(row.own_logit_error, 1e-300):.0f}" for row in worse)
        same_as += f"; do not run it in {names}, where its error is {factors} times the original's"
    return same_as

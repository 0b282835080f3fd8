"""Are two checkpoints the same function? Logits, distributions and greedy tokens of B against A, in several dtypes.

The reference is always A in fp64, which is the arbiter: an error that fp64 does not remove is not rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

import skipless.model  # noqa: F401  (registers the AutoClasses)
from skipless.checkpoint.reader import CheckpointReader
from skipless.dtypes import DTYPE_NAMES
from skipless.errors import InputError
from skipless.quiet import no_library_bars

# Largest logit error, relative to the largest logit, that an exact rewrite shows when stored and run in this dtype.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
# In a half-precision dtype: at most this many times the error that the original itself shows there.
HALF_PRECISION_FACTOR = 2.5

DEFAULT_DTYPES = ("float64", "float32", "bfloat16")
DEFAULT_PROMPT = 'def read(path):\n    """Read'


@dataclass(frozen=True)
class Row:
    """B in one dtype against A in fp64; the fields that begin with own_ are A's in the same dtype.

    logit_error: max |difference| / max |logit of A| at the worst position. kl: mean KL(A || B) per token, in nats.
    top1: fraction of positions with the same most likely token. greedy: fraction of greedy tokens before the first
    difference (a tie, within the tolerance, is not one). judged: whether the dtype is at least as fine as B's weights.
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
    """The verdict, the row of each dtype, B's storage dtype, and what to make of it."""

    same: bool
    stored: str
    rows: tuple[Row, ...]
    note: str


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

    tokens: length of the random sequences and of the greedy continuations. Raises InputError for folders that do not
    load whole, or whose vocabularies differ.
    """
    a, b = Path(a), Path(b)
    readers = CheckpointReader(a), CheckpointReader(b)
    vocabularies = [reader.config.get("vocab_size") for reader in readers]
    if vocabularies[0] != vocabularies[1]:
        raise InputError(f"vocab_size: expected {vocabularies[0]} as in {a}, found {vocabularies[1]} in {b}")
    stored = max((info.dtype for info in readers[1].tensors.values()), key=lambda dtype: torch.finfo(dtype).eps)
    stored_name = str(stored).removeprefix("torch.")
    for name in dtypes:
        if name not in DTYPE_NAMES:
            raise InputError(f"dtype: expected one of {', '.join(DTYPE_NAMES)}, found {name!r}")
    if stored not in TOLERANCES and stored_name not in dtypes:
        dtypes = (*dtypes, stored_name)

    sequences, prompts = _inputs(a, readers[0].config, prompt, tokens, seed)
    reference = _run(a, torch.float64, sequences, prompts, tokens)
    own = {
        name: reference if name == "float64" else _run(a, getattr(torch, name), sequences, prompts, tokens)
        for name in dtypes
    }
    rows = []
    for name in dtypes:
        tolerance = max(_tolerance(other, own, reference) for other in {name, stored_name})
        outcome = _run(b, getattr(torch, name), sequences, prompts, tokens)
        error = _logit_error(outcome, reference)
        greedy, alike = _greedy(outcome, reference, tolerance)
        half = stored not in TOLERANCES or getattr(torch, name) not in TOLERANCES
        rows.append(
            Row(
                dtype=name,
                logit_error=error,
                own_logit_error=_logit_error(own[name], reference),
                tolerance=tolerance,
                kl=_kl(outcome, reference),
                own_kl=_kl(own[name], reference),
                top1=_top1(outcome, reference),
                own_top1=_top1(own[name], reference),
                greedy=greedy,
                own_greedy=_greedy(own[name], reference, tolerance)[0],
                judged=torch.finfo(getattr(torch, name)).eps <= torch.finfo(stored).eps,
                passed=error <= tolerance and (alike or half),
            )
        )
    same = all(row.passed for row in rows if row.judged)
    return Report(same, stored_name, tuple(rows), _note(rows, same, stored_name))


def _inputs(
    folder: Path, config: dict[str, Any], prompt: str, tokens: int, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences to compute logits of, and prompts to continue greedily, each (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    limit = config.get("max_position_embeddings") or 2**31
    random_tokens = torch.randint(config["vocab_size"], (4, min(tokens, limit)), generator=generator)
    sequences, prompts = [random_tokens], [random_tokens[:1, : max(1, min(tokens, limit - tokens) // 4)]]
    if (folder / "tokenizer.json").exists() and prompt:
        encoded = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
        if encoded.shape[1]:
            sequences.append(encoded)
            prompts.append(encoded)
    if any(start.shape[1] + tokens > limit for start in prompts):
        raise InputError(
            f"tokens: expected a prompt and {tokens} tokens to fit in {limit} positions; use fewer --tokens"
        )
    return sequences, prompts


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model folder whole, in `dtype`, for inference. Code in the folder is never run.

    Raises InputError when the model's tensors and the folder's do not match exactly.
    """
    try:
        with no_library_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, RuntimeError, StrictDataclassError) as error:
        raise InputError(
            f"{folder}: expected a model that transformers loads, found: {' '.join(str(error).split())}"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise InputError(
                f"{folder}: expected all tensors of the model and no others, found {kind} {sorted(info[kind])[0]}"
            )
    return model.eval()


@torch.no_grad()
def _run(folder: Path, dtype: torch.dtype, sequences: list[Tensor], prompts: list[Tensor], tokens: int) -> _Outcome:
    model = load(folder, dtype)
    logits = torch.cat([model(input_ids=ids).logits.flatten(0, 1).double() for ids in sequences])
    greedy, scores = [], []
    for ids in prompts:
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy_config(tokens))
        greedy.append(output.sequences[0, ids.shape[1] :])
        scores.append(torch.cat(output.logits).double())
    return _Outcome(logits, tuple(greedy), tuple(scores))


def greedy_config(tokens: int) -> GenerationConfig:
    """Greedy decoding of exactly `tokens` tokens, with the logits."""
    return GenerationConfig(
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _tolerance(name: str, own: dict[str, _Outcome], reference: _Outcome) -> float:
    dtype = getattr(torch, name)
    if dtype in TOLERANCES:
        return TOLERANCES[dtype]
    return HALF_PRECISION_FACTOR * _logit_error(own[name], reference)


def _logit_error(outcome: _Outcome, reference: _Outcome) -> float:
    error = (outcome.logits - reference.logits).abs().amax(-1) / reference.logits.abs().amax(-1)
    return error.max().item() if error.isfinite().all() else math.inf


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
    if not same:
        if stored == "float64":
            return "not the same function: in fp64, rounding cannot explain the difference"
        return (
            f"not the same function as stored in {stored}; to tell rounding from a bug, fuse with --dtype float64 and "
            f"verify that: fp64 leaves no room for rounding"
        )
    worse = [row for row in rows if not row.judged and not row.passed]
    if worse:
        factors = " and ".join(f"{row.logit_error / row.own_logit_error:.0f}" for row in worse)
        return (
            f"the same function as stored in {stored}; do not run it in {' or '.join(row.dtype for row in worse)}, "
            f"where its error is {factors} times the original's"
        )
    return f"the same function as stored in {stored}"

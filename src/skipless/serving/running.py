"""What a model in an engine can do, and how its cache is checked, whatever the engine."""

from collections.abc import Callable
from typing import Protocol

from skipless.errors import InputError

# A prompt and tokens after it, long enough to tell whether a cache is broken.
LENGTHS = 64, 16


class Runner(Protocol):
    """A model as bench sees one. bytes_per_token: bytes of weights that are read to decode a token at batch 1."""

    bytes_per_token: int

    def generate(self, batch: int, prompt: int, tokens: int) -> list[float]:
        """Decode greedily, `batch` sequences at once, after `prompt` tokens each; seconds until each token came."""

    def broken_cache(self, prompt: int, tokens: int) -> str | None:
        """What is wrong with its cache, by decoding so much with it and without it; or None."""


def sequence(length: int, vocab_size: int) -> list[int]:
    """Tokens to begin with: each once, and again from the first."""
    return [position % vocab_size for position in range(length)]


def disagreement(decode: Callable[[list[int], int], list[int]], prompt: list[int], tokens: int) -> str | None:
    """What is wrong with the cache of an engine that shows its tokens alone, or None: decoded with it, more than half
    of them are others than those that a pass without it, of all before each, gives. At most LENGTHS are looked at.

    decode: the greedy continuation of a prompt, by so many tokens; its first token comes of a pass without a cache.
    """
    prompt, tokens = prompt[: LENGTHS[0]], min(tokens, LENGTHS[1])
    found = decode(prompt, tokens)
    again = [decode(prompt + found[:number], 1)[0] for number in range(1, len(found))]
    same = sum(one == other for one, other in zip(found[1:], again, strict=True))
    if 2 * same >= len(again):
        return None
    return f"of {len(again)} tokens, {len(again) - same} are others than a pass without it gives"


def check_length(prompt: int, tokens: int, limit: int) -> None:
    """Raise InputError for a prompt and tokens that are more together than a model takes."""
    if prompt + tokens > limit:
        raise InputError(f"tokens: expected a prompt and tokens of at most {limit} together, found {prompt + tokens}")

"""What a model in an engine can do, and how its cache is checked, whatever the engine."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from skipless.errors import InputError

# What families call the number of experts.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# A prompt and tokens after it, long enough to tell whether a cache is broken.
LENGTHS = 64, 16


class Runner(Protocol):
    """A model in an engine, as bench sees it; each engine's module has a class Runner that is one.

    bytes_per_token: bytes of weights that are read to decode a token at batch 1.
    """

    bytes_per_token: int

    def generate(self, batch: int, prompt: int, tokens: int) -> list[float]:
        """Decode greedily, `batch` sequences at once, after `prompt` tokens each; seconds until each token came."""

    def broken_cache(self, prompt: int, tokens: int) -> str | None:
        """What is wrong with its cache, by decoding so much with it and without it; or None."""


class TokenRunner(ABC):
    """A Runner of an engine that shows nothing but its tokens."""

    bytes_per_token: int
    vocab_size: int

    @abstractmethod
    def decode(self, prompt: list[int], batch: int, tokens: int) -> Iterator[Iterable[int]]:
        """The next `tokens` tokens, (batch,) each, of equal sequences after a prompt of ids: greedily, and past the end
        of a text.
        """

    def generate(self, batch: int, prompt: int, tokens: int) -> list[float]:
        """Seconds from the call to each of `tokens` tokens, of `batch` equal sequences after `prompt` tokens."""
        start = time.perf_counter()
        ids = sequence(prompt, self.vocab_size)
        return [time.perf_counter() - start for _ in self.decode(ids, batch, tokens)]

    def broken_cache(self, prompt: int, tokens: int) -> str | None:
        """What is wrong with its cache, by its tokens."""
        return disagreement(
            lambda ids, count: [int(token) for (token,) in self.decode(ids, 1, count)],
            sequence(prompt, self.vocab_size),
            tokens,
        )


def sequence(length: int, vocab_size: int) -> list[int]:
    """Tokens to begin with: each once, and again from the first."""
    return [position % vocab_size for position in range(length)]


def expert_share(config: Mapping[str, Any]) -> float:
    """The part of a model's experts that a token reads at batch 1: those that it is sent to; 1 for one without."""
    experts = next((config[field] for field in EXPERTS if config.get(field)), None)
    taken = config.get("num_experts_per_tok")
    return taken / experts if taken and experts else 1.0


def disagreement(decode: Callable[[list[int], int], list[int]], prompt: list[int], tokens: int) -> str | None:
    """What is wrong with the cache of an engine that shows nothing but its tokens, or None.

    It is broken if more than half of the tokens decoded with it differ from those of passes without it, over all that
    comes before each. At most LENGTHS of prompt and tokens are looked at. decode: the greedy continuation of a prompt,
    by so many tokens; its first token comes from a pass without a cache.
    """
    prompt, tokens = prompt[: LENGTHS[0]], min(tokens, LENGTHS[1])
    decoded = decode(prompt, tokens)
    again = [decode(prompt + decoded[:number], 1)[0] for number in range(1, len(decoded))]
    same = sum(one == other for one, other in zip(decoded[1:], again, strict=True))
    if 2 * same >= len(again):
        return None
    return f"of {len(again)} tokens, {len(again) - same} are others than a pass without it gives"


def check_length(prompt: int, tokens: int, limit: int) -> None:
    """Raise InputError for a prompt and tokens that are more together than a model takes."""
    if prompt + tokens > limit:
        raise InputError(f"tokens: expected a prompt and tokens of at most {limit} together, found {prompt + tokens}")

"""How well a model predicts a text: loss, bits a byte, perplexity."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from skipless.errors import InputError
from skipless.inference import load, positions_of
from skipless.train.data import check_length, encoded, fast_tokenizer
from skipless.train.texts import documents, kind_of, matching, read_tokens

# Tokens of a sequence, unless the model has room for less, and of what is computed at once.
SEQUENCE, AT_ONCE = 1024, 8192


@dataclass(frozen=True)
class Evaluation:
    """loss in nats a token, its exponential, bits a byte (None for files of tokens); tokens: how many."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int


class _Stream:
    """Tokens of files, and how many bytes those read so far stand for."""

    def __init__(self, folder: Path, files: Sequence[Path], field: str, vocab_size: int):
        self.folder, self.files, self.field, self.vocab_size = folder, files, field, vocab_size
        self.tokens = self.size = 0
        self.is_text = kind_of(files) != "tokens"

    def __iter__(self) -> Iterator[int]:
        if not self.is_text:
            for file in self.files:
                for part in read_tokens(file, self.vocab_size).split(AT_ONCE):
                    yield from part.tolist()
            return
        for tokens, size in encoded(documents(self.files, self.field), fast_tokenizer(self.folder)):
            self.tokens, self.size = self.tokens + len(tokens), self.size + size
            yield from tokens


@torch.no_grad()
def evaluate(
    folder: Path,
    patterns: Sequence[str],
    *,
    field: str = "text",
    sequence_length: int | None = None,
    most_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Evaluation:
    """Evaluate a model folder that transformers loads on texts, as the trainer evaluates on what it holds out.

    The documents are joined and cut into sequences, whose first tokens are not predicted.

    `progress` is called with the tokens done, and with the most there may be, or None: a text is read as it comes.
    Raises InputError for files that cannot be read, and for fewer tokens than a sequence has.
    """
    model = load(folder, dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    room = positions_of(model.config)
    length = sequence_length or min(SEQUENCE, room)
    check_length(length, room)
    stream = _Stream(folder, matching(patterns), field, model.config.vocab_size)
    tokens = itertools.islice(stream, most_tokens)
    total, sequences = 0.0, 0
    while len(part := list(itertools.islice(tokens, length * max(1, AT_ONCE // length)))) >= length:
        ids = torch.tensor(part[: len(part) - len(part) % length], device=model.device).view(-1, length)
        total += model(input_ids=ids, labels=ids).loss.item() * len(ids)
        sequences += len(ids)
        progress(sequences * length, most_tokens)
    if not sequences:
        raise InputError(f"sequence_length: expected at most the text's {len(part)} tokens, found {length}")
    loss = total / sequences
    perplexity = math.exp(loss) if loss < 700 else math.inf  # the largest float64 is e^709
    bits = loss / math.log(2) * stream.tokens / stream.size if stream.is_text else None
    return Evaluation(loss, perplexity, bits, sequences * length)

"""Text as blocks of tokens; and the text that everyone has, the running interpreter's own standard library."""

import itertools
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from skipless.errors import InputError
from skipless.inference import load_tokenizer

END_OF_FILE = "<|endoftext|>"
# Documents that are tokenized at once, in parallel.
ENCODED = 256

# Tests repeat themselves, and idlelib and lib2to3's fixtures are not representative Python; site-packages is not ours.
LEFT_OUT = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"})


def standard_library() -> list[Path]:
    """The `.py` files of the running interpreter's standard library, less tests and idlelib, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in root.rglob("*.py") if LEFT_OUT.isdisjoint(path.relative_to(root).parts))


def read_texts(files: Sequence[Path]) -> list[str]:
    """The files that are UTF-8 text, decoded; empty ones are left out."""
    texts = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            texts.append(text)
    return texts


def split(texts: Sequence[str], held_out: float, seed: int) -> tuple[list[str], list[str]]:
    """Shuffle whole files; the first `held_out` (a fraction) of them are never trained on."""
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)
    cut = max(1, round(held_out * len(shuffled)))
    return shuffled[cut:], shuffled[:cut]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (arXiv:1508.07909) of exactly `vocab_size` tokens, as a HuggingFace tokenizer.

    Raises InputError when the bytes alone are more, or the texts do not give as many.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size()) != vocab_size:
        raise InputError(f"vocab_size: expected {found} tokens, which is what the text gives, found {vocab_size}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_FILE, bos_token=END_OF_FILE, clean_up_tokenization_spaces=False
    )


def fast_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder. Raises InputError for one that is Python alone, without a tokenizer.json."""
    tokenizer = load_tokenizer(folder)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{folder}: expected a tokenizer with a tokenizer.json, found {type(tokenizer).__name__}")
    return tokenizer


def check_length(sequence_length: int, positions: int) -> None:
    """Raise InputError for sequences in which nothing is predicted, and for those longer than a model can take."""
    if not 2 <= sequence_length <= positions:
        raise InputError(
            f"sequence_length: expected 2 to {positions}, for which the model has positions "
            f"(max_position_embeddings), found {sequence_length}"
        )


def encoded(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[list[int], int]]:
    """Each text's tokens, with END_OF_FILE (or the tokenizer's own such token) behind them, and its size in bytes.

    Raises InputError for a tokenizer that has no such token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("tokenizer: expected one with an eos_token, which goes between documents, found none")
    texts = iter(texts)
    while batch := list(itertools.islice(texts, ENCODED)):
        tokens = tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for text, encoding in zip(batch, tokens, strict=True):
            yield [*encoding.ids, tokenizer.eos_token_id], len(text.encode())


def write_tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, file: Path, dtype: Any) -> tuple[int, int]:
    """Write the tokens of all texts as integers of `dtype`. Returns how many they are, and the texts' bytes."""
    count, size = 0, 0
    with file.open("wb") as out:
        for tokens, length in encoded(texts, tokenizer):
            np.asarray(tokens, dtype).tofile(out)
            count, size = count + len(tokens), size + length
    return count, size


@dataclass(frozen=True)
class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Consecutive blocks of tokens, for transformers' Trainer.

    tokens (blocks, sequence_length), of any integers; bytes_per_token is that of the text the blocks were cut from,
    None where it is not known.
    """

    tokens: torch.Tensor
    bytes_per_token: float | None

    @classmethod
    def cut(cls, tokens: torch.Tensor, sequence_length: int, bytes_per_token: float | None = None) -> "Blocks":
        """Cut (tokens,) and drop what is left over. Raises InputError when there is no whole block."""
        blocks = len(tokens) // sequence_length
        if blocks == 0:
            raise InputError(
                f"sequence_length: expected at most the text's {len(tokens)} tokens, found {sequence_length}"
            )
        return cls(tokens[: blocks * sequence_length].view(blocks, sequence_length), bytes_per_token)

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, sequence_length: int) -> "Blocks":
        """Tokenize, join with END_OF_FILE, and cut. Raises InputError when there is no whole block."""
        pairs = list(encoded(texts, tokenizer))
        stream = torch.tensor([token for tokens, _ in pairs for token in tokens])
        return cls.cut(stream, sequence_length, sum(size for _, size in pairs) / max(1, len(stream)))

    def split(self, held_out: float) -> tuple["Blocks", "Blocks"]:
        """All blocks but the last, and those, a fraction `held_out` of all, at least one."""
        kept = len(self) - max(1, round(held_out * len(self)))
        return Blocks(self.tokens[:kept], None), Blocks(self.tokens[kept:], None)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.tokens[index].long()
        return {"input_ids": tokens, "labels": tokens}

"""The training text: the running interpreter's own standard library, so that anyone can repeat a run offline."""

import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from skipless.errors import InputError

END_OF_FILE = "<|endoftext|>"

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


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
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


@dataclass(frozen=True)
class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Consecutive blocks of tokens, for transformers' Trainer.

    tokens (blocks, sequence_length) int64; bytes_per_token is that of the text the blocks were cut from.
    """

    tokens: torch.Tensor
    bytes_per_token: float

    @classmethod
    def from_texts(cls, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, sequence_length: int) -> "Blocks":
        """Tokenize, join with END_OF_FILE, and cut; the tokens after the last whole block are dropped.

        Raises InputError when there is no whole block.
        """
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts))
        stream = torch.tensor([token for text in encoded for token in (*text.ids, tokenizer.eos_token_id)])
        blocks = len(stream) // sequence_length
        if blocks == 0:
            raise InputError(
                f"sequence_length: expected at most the text's {len(stream)} tokens, found {sequence_length}"
            )
        size = sum(len(text.encode()) for text in texts)
        return cls(stream[: blocks * sequence_length].view(blocks, sequence_length), size / len(stream))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}

"""The tokens of a run: made once, by the first process, and kept beside its checkpoints, from which all map them."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Subset
from transformers import PreTrainedTokenizerFast

from skipless.checkpoint import files
from skipless.checkpoint.headers import read_json_object
from skipless.errors import InputError
from skipless.train.data import (
    Blocks,
    fast_tokenizer,
    read_texts,
    split,
    standard_library,
    train_tokenizer,
    write_tokens,
)
from skipless.train.recipe import Data, Recipe
from skipless.train.texts import documents, kind_of, matching, read_tokens, token_dtype

# What a run keeps in its folder of checkpoints. SIZES: of those two their tokens and the bytes of their text, or of
# the recipe's own files of tokens ("files", "held_out_files") each one's bytes.
TRAINING, HELD_OUT, SIZES, TOKENIZER = "training.bin", "held_out.bin", "tokens.json", "tokenizer"

# Blocks of which bytes a token are found.
ENOUGH = 1024

# A text is read more than once: to train the tokenizer, and to tokenize it.
Texts = Callable[[], Iterable[str]]
Joined = ConcatDataset[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Corpus:
    """Blocks of sequence_length tokens. tokenizer, bytes_per_token: None for files of tokens that come without."""

    training: Subset[dict[str, torch.Tensor]]
    held_out: Subset[dict[str, torch.Tensor]]
    bytes_per_token: float | None
    tokenizer: PreTrainedTokenizerFast | None

    def bits_per_byte(self, loss: float) -> float | None:
        """Of a loss in nats a token, or None where the text is not known."""
        return None if self.bytes_per_token is None else loss / math.log(2) / self.bytes_per_token


def is_made(folder: Path) -> bool:
    """Whether `make` has come to its end."""
    return bool(_sizes(folder))


def _sizes(folder: Path) -> dict[str, Any]:
    return read_json_object(folder / SIZES) if (folder / SIZES).is_file() else {}


def make(recipe: Recipe, vocab_size: int, folder: Path) -> None:
    """Tokenize into `folder` what the recipe says. Raises InputError for data that cannot be trained on."""
    tokenizer = chosen_tokenizer(recipe)
    if (named := _token_files(recipe.data)) is not None:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / TOKENIZER)
        files.replace(folder / SIZES, [json.dumps(named).encode()])
        return
    training, held_out = texts(recipe)
    if tokenizer is None:
        tokenizer = train_tokenizer(training(), vocab_size)
    if len(tokenizer) > vocab_size:
        raise InputError(f"vocab_size: expected at least the tokenizer's {len(tokenizer)} tokens, found {vocab_size}")
    dtype = token_dtype(vocab_size)
    sizes = {
        name: write_tokens(each(), tokenizer, folder / name, dtype)
        for name, each in ((TRAINING, training), (HELD_OUT, held_out))
    }
    for name, (tokens, _) in sizes.items():
        if tokens < recipe.sequence_length:
            raise InputError(
                f"sequence_length: expected at most the {tokens} tokens of {name.removesuffix('.bin')}, found "
                f"{recipe.sequence_length}; give more text, or shorter sequences"
            )
    tokenizer.save_pretrained(folder / TOKENIZER)
    files.replace(folder / SIZES, [json.dumps(sizes).encode()])


def made(recipe: Recipe, vocab_size: int, folder: Path, sequences_per_step: int) -> Corpus:
    """What `make` has left in `folder`, in blocks; the training text is cut to whole steps.

    Raises InputError for less text than a step takes, and for files of tokens that are no longer what they were.
    """
    length, tokenizer, sizes = recipe.sequence_length, None, _sizes(folder)
    if (folder / TOKENIZER).is_dir():
        tokenizer = fast_tokenizer(folder / TOKENIZER)
    if TRAINING not in sizes:
        training, held_out = map(Joined, _token_blocks(recipe, vocab_size, sizes))
        bytes_per_token = None if tokenizer is None else _decoded_size(held_out, tokenizer)
    else:
        training, held_out = (
            Joined([Blocks.cut(read_tokens(folder / name, vocab_size), length)]) for name in (TRAINING, HELD_OUT)
        )
        tokens, size = sizes[HELD_OUT]
        bytes_per_token = size / tokens
    whole = len(training) - len(training) % sequences_per_step
    if not whole:
        raise InputError(
            f"batch_size: expected at most the text's {len(training)} sequences a step, found {sequences_per_step}"
        )
    evaluated = min(len(held_out), max(1, recipe.data.held_out_tokens // length))
    return Corpus(Subset(training, range(whole)), Subset(held_out, range(evaluated)), bytes_per_token, tokenizer)


def chosen_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast | None:
    """The one that the recipe names, or that of the model it starts from, or None."""
    folder = recipe.tokenizer.folder or recipe.start.folder
    return fast_tokenizer(Path(folder)) if folder else None


def texts(recipe: Recipe) -> tuple[Texts, Texts]:
    """The documents that are trained on, and those that are held out: files of their own, or a fraction of all,
    evenly, the first in any case. Of the standard library, whole files, shuffled.
    """
    data = recipe.data
    if not data.files:
        training, held_out = split(read_texts(standard_library()), data.held_out, recipe.seed)
        return lambda: training, lambda: held_out
    named = matching(data.files)
    if data.held_out_files:
        others = matching(data.held_out_files)
        return lambda: documents(named, data.field), lambda: documents(others, data.field)
    if not data.held_out:
        raise InputError("data.held_out: expected a fraction above 0, or held_out_files; found 0 and none")
    some, of = Fraction(str(data.held_out)).as_integer_ratio()

    def chosen(held_out: bool) -> Iterator[str]:
        return (text for i, text in enumerate(documents(named, data.field)) if (i * some % of < some) == held_out)

    return lambda: chosen(False), lambda: chosen(True)


def _token_files(data: Data) -> dict[str, dict[str, int]] | None:
    """Whole names and bytes of the files of tokens that are trained on, and of those that are held out; None: text."""
    named, others = (matching(patterns) for patterns in (data.files, data.held_out_files))
    if not named or kind_of(named) != "tokens":
        return None
    kind_of([*named, *others])
    return {
        name: {str(file.absolute()): file.stat().st_size for file in each}
        for name, each in (("files", named), ("held_out_files", others))
    }


def _token_blocks(recipe: Recipe, vocab_size: int, sizes: dict[str, dict[str, int]]) -> tuple[Sequence[Blocks], ...]:
    """Of files of tokens: all blocks and those of held_out_files, or all but the last of each file, and those."""

    def blocks(name: str) -> list[Blocks]:
        found = []
        for file, size in sizes[name].items():
            path = Path(file)
            if (now := path.stat().st_size if path.is_file() else None) != size:
                raise InputError(f"{file}: expected the {size} bytes that the run began with, found {now}; put it back")
            found.append(Blocks.cut(read_tokens(path, vocab_size), recipe.sequence_length))
        return found

    if sizes["held_out_files"]:
        return blocks("files"), blocks("held_out_files")
    return tuple(zip(*(each.split(recipe.data.held_out) for each in blocks("files")), strict=True))


def _decoded_size(held_out: Joined, tokenizer: PreTrainedTokenizerFast) -> float:
    """Bytes a token, of the text that the first held-out blocks stand for, without the ends of documents."""
    tokens = [token for i in range(min(len(held_out), ENOUGH)) for token in held_out[i]["input_ids"].tolist()]
    return len(tokenizer.decode(tokens, skip_special_tokens=True).encode()) / len(tokens)

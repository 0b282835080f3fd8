"""The tokens of a run: made once, by the first process, and kept beside its checkpoints, from which all map them."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset, Subset
from transformers import PreTrainedTokenizerFast

from skipless.errors import InputError
from skipless.inference import load_tokenizer
from skipless.train.data import Blocks, read_texts, split, standard_library, train_tokenizer, write_tokens
from skipless.train.recipe import Recipe
from skipless.train.texts import documents, kind_of, matching, read_tokens, token_dtype

# What a run keeps in its folder of checkpoints.
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
    return (folder / SIZES).is_file()


def make(recipe: Recipe, vocab_size: int, folder: Path) -> None:
    """Tokenize into `folder` what the recipe says. Raises InputError for data that cannot be trained on."""
    tokenizer = chosen_tokenizer(recipe)
    if _is_tokens(recipe):
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / TOKENIZER)
        (folder / SIZES).write_text("{}", encoding="utf-8")
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
    (folder / SIZES).write_text(json.dumps(sizes), encoding="utf-8")


def made(recipe: Recipe, vocab_size: int, folder: Path, sequences_per_step: int) -> Corpus:
    """What `make` has left in `folder`, in blocks; the training text is cut to whole steps.

    Raises InputError for less text than a step takes.
    """
    length, tokenizer = recipe.sequence_length, None
    if (folder / TOKENIZER).is_dir():
        tokenizer = load_tokenizer(folder / TOKENIZER)
    if _is_tokens(recipe):
        training, held_out = map(Joined, _token_blocks(recipe, vocab_size))
        bytes_per_token = None if tokenizer is None else _decoded_size(held_out, tokenizer)
    else:
        training, held_out = (
            Joined([Blocks.cut(read_tokens(folder / name, vocab_size), length)]) for name in (TRAINING, HELD_OUT)
        )
        tokens, size = json.loads((folder / SIZES).read_text(encoding="utf-8"))[HELD_OUT]
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
    if not folder:
        return None
    tokenizer = load_tokenizer(Path(folder))
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{folder}: expected a tokenizer with a tokenizer.json, found {type(tokenizer).__name__}")
    return tokenizer


def texts(recipe: Recipe) -> tuple[Texts, Texts]:
    """The documents that are trained on, and those that are held out: files of their own, or every n-th document.

    Of the standard library, whole files, shuffled.
    """
    data = recipe.data
    if not data.files:
        training, held_out = split(read_texts(standard_library()), data.held_out, recipe.seed)
        return lambda: training, lambda: held_out
    files = matching(data.files)
    if data.held_out_files:
        others = matching(data.held_out_files)
        return lambda: documents(files, data.field), lambda: documents(others, data.field)
    nth = _nth(data.held_out)

    def chosen(held_out: bool) -> Iterator[str]:
        return (text for i, text in enumerate(documents(files, data.field)) if (i % nth == 0) == held_out)

    return lambda: chosen(False), lambda: chosen(True)


def _nth(held_out: float) -> int:
    """Every how many-th document is held out; the first is in any case."""
    if not held_out:
        raise InputError("data.held_out: expected a fraction above 0, or held_out_files; found 0 and none")
    return max(2, round(1 / held_out))


def _is_tokens(recipe: Recipe) -> bool:
    return bool(recipe.data.files) and kind_of(matching(recipe.data.files)) == "tokens"


def _token_blocks(recipe: Recipe, vocab_size: int) -> tuple[Sequence[Blocks], ...]:
    """Of files of tokens: all blocks and those of held_out_files, or all but the last of each file, and those."""

    def blocks(patterns: tuple[str, ...]) -> list[Blocks]:
        return [Blocks.cut(read_tokens(file, vocab_size), recipe.sequence_length) for file in matching(patterns)]

    if recipe.data.held_out_files:
        return blocks(recipe.data.files), blocks(recipe.data.held_out_files)
    return tuple(zip(*(each.split(recipe.data.held_out) for each in blocks(recipe.data.files)), strict=True))


def _decoded_size(held_out: Joined, tokenizer: PreTrainedTokenizerFast) -> float:
    """Bytes a token, of the text that the first held-out blocks stand for, without the ends of documents."""
    tokens = [token for i in range(min(len(held_out), ENOUGH)) for token in held_out[i]["input_ids"].tolist()]
    return len(tokenizer.decode(tokens, skip_special_tokens=True).encode()) / len(tokens)

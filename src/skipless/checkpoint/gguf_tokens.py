"""The tokenizer of a GGUF file's metadata as files of a model folder, by transformers' own conversion."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from skipless.errors import InputError
from skipless.log import logger
from skipless.quiet import errors_only

# SentencePiece's word boundary.
SPACE = "\u2581"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of how byte-level tokenizers split text -> the steps of that, and what each is told.
SPLITS: dict[str, list[tuple[str, Any]]] = {
    "gpt-2": [("ByteLevel", True)],
    "smollm": [("Digits", True), ("ByteLevel", True)],
    "llama-bpe": [("Split", CONTRACTIONS + r"\p{N}{1,3}" + OTHERS), ("ByteLevel", False)],
    "qwen2": [("Split", CONTRACTIONS + r"\p{N}" + OTHERS), ("ByteLevel", False)],
}
# Of these, what takes a word that is a token whole, whether merges lead to it or not.
IGNORES_MERGES = ("llama-bpe",)


def convert_tokenizer(file: Path, described: Mapping[str, Any], folder: Path) -> None:
    """Write the tokenizer into a folder; or nothing, if it cannot be converted, and say so.

    described: the metadata of it that is short, by llama.cpp's names.
    """
    try:
        _convert(file, described, folder)
    except Exception as error:  # transformers and tokenizers raise whatever they come upon
        logger.warning("%s: its tokenizer is not converted: %s", file, " ".join(str(error).split()))


def _convert(file: Path, described: Mapping[str, Any], folder: Path) -> None:
    kind, name = described.get("ggml.model"), described.get("ggml.pre")
    if kind not in ("gpt2", "llama"):
        raise InputError(f"tokenizer.ggml.model: expected gpt2 or llama, found {kind!r}")
    if kind == "gpt2" and name not in SPLITS:  # transformers would split as GPT-2 does
        raise InputError(f"tokenizer.ggml.pre: expected one of {', '.join(SPLITS)}; found {name!r}")
    with tempfile.TemporaryDirectory(prefix="skipless-") as alone, errors_only("transformers"):
        Path(alone, file.name).symlink_to(file.resolve())  # without what lies beside it
        tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=file.name)
    if kind == "gpt2":
        steps = [_STEPS[step](value) for step, value in SPLITS[str(name)]]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
        tokenizer.backend_tokenizer.model.ignore_merges = name in IGNORES_MERGES
    else:  # as llama.cpp, which puts a space before any text, also before one
        prefix = described.get("ggml.add_space_prefix", True)
        prepend, strip = ([normalizers.Prepend(SPACE)], [decoders.Strip(" ", 1, 0)]) if prefix else ([], [])
        tokenizer.backend_tokenizer.pre_tokenizer = None
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
        tokenizer.backend_tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
    tokenizer.save_pretrained(folder)


_STEPS: dict[str, Any] = {
    "ByteLevel": lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex),
    "Digits": lambda individual: pre_tokenizers.Digits(individual_digits=individual),
    "Split": lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated"),
}

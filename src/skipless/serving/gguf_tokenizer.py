"""A tokenizer as llama.cpp's own converter writes it into a GGUF file, or a refusal that names what it could not say.

llama.cpp tokenizes with code of its own, which a file chooses by name: byte-level BPE by how text is split first, and
BPE with bytes to fall back on (SentencePiece's) by scores.
"""

from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from skipless.checkpoint.gguf_tokens import IGNORES_MERGES, SPACE, SPLITS
from skipless.checkpoint.headers import read_json_object
from skipless.errors import InputError
from skipless.inference import load_tokenizer

FILE = "tokenizer.json"


def add_tokenizer(writer: gguf.GGUFWriter, source: Path, vocab_size: int) -> None:
    """Write the tokenizer of a model folder, or, if it has none, that tokens are numbers.

    Raises InputError for one that llama.cpp would not read as it is.
    """
    if not any(source.glob("tokenizer*")):
        writer.add_tokenizer_model("none")
        return
    described = read_json_object(source / FILE, folder=source)
    model = described.get("model") or {}
    if model.get("type") != "BPE":
        raise _refused("model.type", "'BPE'", model.get("type"))
    sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = _tokens(source, vocab_size, sentencepiece)
    special = gguf.SpecialVocab(source, load_merges=not sentencepiece, n_vocab=vocab_size)
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_space_prefix(described))
        writer.add_token_scores(_scores(tokens, model["merges"]))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(described))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.add_special_token |= _added(source)
    special.add_to_gguf(writer, quiet=True)


def _tokens(source: Path, vocab_size: int, sentencepiece: bool) -> tuple[list[str], list[TokenType]]:
    """Text and type of each token; numbers that no token has are unused ones."""
    tokenizer = load_tokenizer(source)
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    if known and max(known) >= vocab_size:
        raise _refused("model.vocab", f"tokens below config.json's vocab_size, {vocab_size}", max(known))
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(vocab_size):
        token = known.get(number, f"[PAD{number}]")
        if number not in known:
            kind = TokenType.UNUSED
        elif sentencepiece and token == tokenizer.unk_token:
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED
        elif sentencepiece and len(token) == 6 and token.startswith("<0x"):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _added(source: Path) -> dict[str, bool]:
    """Whether text begins and ends with a special token, as the tokenizer does it."""
    tokenizer = load_tokenizer(source)
    ids = tokenizer("a").input_ids
    return {"bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id}


def _split(described: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text."""
    normalizer = described.get("normalizer") or {"type": "NFC"}  # which llama.cpp leaves to whoever writes the text
    if normalizer.get("type") != "NFC":
        raise _refused("normalizer", "none, or NFC", normalizer.get("type"))
    steps = described.get("pre_tokenizer") or {}
    splits = []
    for step in steps.get("pretokenizers", [steps]):
        kind = step.get("type")
        if step.get("add_prefix_space"):
            raise _refused("pre_tokenizer.add_prefix_space", "false", True)
        option = {"ByteLevel": "use_regex", "Digits": "individual_digits", "Split": "pattern"}.get(kind)
        value = step.get(option, True)
        splits.append((kind, value.get("Regex", value) if isinstance(value, dict) else value))
    name = next((name for name, steps in SPLITS.items() if steps == splits), None)
    if name is None:
        raise _refused("pre_tokenizer", f"a way to split text that is one of {', '.join(SPLITS)}", splits)
    ignores = bool(described["model"].get("ignore_merges"))
    if ignores != (name in IGNORES_MERGES):
        raise _refused("model.ignore_merges", f"{not ignores} with the split {name}", ignores)
    return name


def _space_prefix(described: dict[str, Any]) -> bool:
    """Whether a space is put before text; that all spaces become SPACE is checked."""
    normalizer, splitter = described.get("normalizer") or {}, described.get("pre_tokenizer") or {}
    if splitter.get("type") == "Metaspace" and not normalizer:
        return splitter.get("prepend_scheme", "always") != "never"
    steps = {step.get("type"): step for step in normalizer.get("normalizers", [normalizer])}
    replaced = steps.pop("Replace", {})
    prepended = steps.pop("Prepend", None)
    if splitter or steps or (replaced.get("pattern"), replaced.get("content")) != ({"String": " "}, SPACE):
        named = (splitter.get("type"), normalizer)
        raise _refused("normalizer", f"one that replaces spaces by {SPACE}, and no pre_tokenizer", named)
    return prepended is not None


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """How early each token is merged, as a score that is higher for what is merged first."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    return [-float(ranks.get(token, 0)) for token in tokens]


def _refused(name: str, expected: str, found: Any) -> InputError:
    return InputError(f"{FILE}: {name}: expected {expected}, for llama.cpp knows no other; found {found!r}")

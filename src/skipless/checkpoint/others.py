"""Which files of a model folder are copied along: by what they are for, and what the user names (--copy).

A folder holds more than a model: caches, the history of a repository, pickles and code that something may run. What is
not known to be wanted is left out, and said so.
"""

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath

from skipless.log import logger

# Weights in any format are never copied. Pickles are never opened either: they can run code.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
WEIGHTS = ("config.json", "*.safetensors", "*.index.json", *PICKLES)

LICENCES = ("license", "licence", "notice", "copying", "copyright", "use_policy")
# Names, in small letters, of what is copied from any visible folder.
WANTED: dict[str, tuple[str, ...]] = {
    "tokenizer": (
        "tokenizer*.json", "*.model", "tokenizer.model.v*", "vocab*.json", "vocab*.txt", "merges*.txt", "encoder.json",
        "vocab.bpe", "special_tokens_map.json", "added_tokens.json", "tekken.json", "*.tiktoken", "*.spm",
    ),
    "generation": ("generation_config.json", "chat_template*.json"),
    "templates": ("*.jinja",),
    "processor": ("*processor_config.json",),
    "licence": (
        *LICENCES,
        *(f"{name}*.{kind}" for name in LICENCES for kind in ("txt", "md", "pdf")),
        *(f"license-{name}" for name in ("apache", "mit", "model", "code")),
    ),
    "card": ("*.md", "citation.cff", "*.bib"),
    "images": ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp"),
}  # fmt: skip
# Names that a message lists.
MOST_LISTED = 8


def is_copied(path: PurePath, copy: Iterable[str] = ()) -> bool:
    """Whether a file, by its path in the model folder, is copied along: if it is wanted, or `copy` names it.

    copy: shell patterns of files, or of folders with all that is in them: of names anywhere, or, with a /, of paths.
    What is hidden - a name with a dot before it, __pycache__, checkpoints - is named by a pattern with the same first
    character.
    Weights are never copied, nor names that do not print, which skipless.json could not hold.
    """
    if _is_weights(path) or not str(path).isprintable():
        return False
    if any(names(pattern, path) for pattern in copy):
        return True
    name = path.name.lower()
    visible = not any(map(_hidden, path.parts))
    return visible and any(fnmatchcase(name, pattern) for patterns in WANTED.values() for pattern in patterns)


def is_entered(folder: PurePath, copy: Iterable[str] = ()) -> bool:
    """Whether a folder, by its path in the model folder, may hold something to copy."""
    return not any(map(_hidden, folder.parts)) or any(
        names(pattern, folder) or _leads(pattern, folder) for pattern in copy
    )


def names(pattern: str, path: PurePath) -> bool:
    """Whether a pattern names a path, or a folder around it in which the path is not hidden."""
    parts = PurePath(pattern).parts
    if not parts:
        return False
    starts = range(len(path.parts) - len(parts) + 1) if len(parts) == 1 else (0,)
    for start in starts:
        stop = start + len(parts)
        others = (*path.parts[:start], *path.parts[stop:])
        if stop <= len(path.parts) and all(map(_fits, path.parts[start:stop], parts)) and not any(map(_hidden, others)):
            return True
    return False


def tell_left_out(left_out: Sequence[str], advice: str = "; --copy PATTERN copies more") -> None:
    """Log, in one line, what is not copied, and what would."""
    if left_out:
        more = f" and {len(left_out) - MOST_LISTED:,} more" if len(left_out) > MOST_LISTED else ""
        logger.warning("not copied: %s%s%s", ", ".join(left_out[:MOST_LISTED]), more, advice)


def unused(copy: Iterable[str], copied: Sequence[PurePath]) -> Iterator[str]:
    """The patterns that name none of the copied files."""
    yield from (pattern for pattern in copy if not any(names(pattern, path) for path in copied))


def _is_weights(path: PurePath) -> bool:
    return any(fnmatchcase(path.name.lower(), pattern) for pattern in WEIGHTS)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__pycache__", "checkpoints")  # the latter: of a model in training


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and (not _hidden(name) or pattern[0] == name[0])


def _leads(pattern: str, folder: PurePath) -> bool:
    """Whether a file that the pattern names may lie in this folder."""
    parts = PurePath(pattern).parts
    return len(folder.parts) < len(parts) and all(map(_fits, folder.parts, parts))

"""What two model folders say of themselves, compared as data: configs, tokenizers, tensors, model files.

Nothing here is run: a field that changes positions, a row of a table that no sample reads, or another end-of-text token
shows in the files, and nowhere else for certain.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from skipless.algebra.linalg import slices
from skipless.architecture.config import Architecture
from skipless.architecture.folds import folds
from skipless.architecture.seams import Seam, seams
from skipless.checkpoint.canonical import Canonical
from skipless.checkpoint.family import Layout, laid_out
from skipless.checkpoint.headers import MOST_CONFIG, check_file, check_links, read_json_object
from skipless.checkpoint.opening import AsSkipless, as_skipless
from skipless.checkpoint.reader import CheckpointReader
from skipless.errors import InputError
from skipless.model.configuration_skipless import SkiplessConfig
from skipless.removals.neutral import moving
from skipless.rewrite.model_files import AUTO_MAP, other_model_files
from skipless.rewrite.record import differences, digest, read_record

# Fields of a config that change neither what a model computes nor what it generates.
NEUTRAL = frozenset(
    {
        "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "name_or_path",
        "_commit_hash", "use_cache", "return_dict", "output_hidden_states", "output_attentions", "initializer_range",
        "id2label", "label2id", "problem_type", "chunk_size_feed_forward",
    }
)  # fmt: skip
# Fields that say what fuse has removed: what they promise is compared by the tensors.
REMOVED = (
    "stream_basis", "rest_dtype", "layers_open", "p_removed", "values_removed", "keys_removed", "head_removed",
    "first_layer_removed", "folded_biases", "norms_removed", "gains_removed",
)  # fmt: skip
# Fields that generation reads, and no forward pass.
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id")
# Files that generation reads; JSON is compared as such.
GENERATION_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.json",
    "chat_template.jinja",
)  # fmt: skip
# Files that loading a model may read; others, such as README.md, say nothing of what it computes.
READ = frozenset({".safetensors", ".json", ".py", ".bin", ".pt", ".pth", ".gguf"})
# Of generation_config.json, what says how it was made; of tokenizer_config.json, where it came from.
MADE = frozenset({"transformers_version", "_from_model_config", "name_or_path"})
# Bytes of a JSON file that is compared as such.
MOST_JSON = MOST_CONFIG
# Numbers that are compared at a time.
BLOCK = 2**22


# A checkpoint under its own names, or, of another family's, under ours.
Opened = CheckpointReader | AsSkipless


@dataclass(frozen=True)
class Differences:
    """How two folders' data differ, one sentence each.

    function: in what changes the function. generation: in what only generation reads. notes: in what changes no answer.
    """

    function: tuple[str, ...]
    generation: tuple[str, ...]
    notes: tuple[str, ...]


def compare_data(a: CheckpointReader, b: CheckpointReader) -> Differences:
    """Compare all that two folders say, but for their tensors."""
    function: list[str] = []
    generation: list[str] = []
    notes: list[str] = []
    for folder in (a.folder, b.folder):
        check_links(folder)
    for name, before, after in _config_differences(a, b):
        line = f"config.json: {name}: {_shown(before)} in A, {_shown(after)} in B"
        (generation if name in SPECIAL_TOKENS else function).append(line)
    generation += _file_differences(a.folder, b.folder)
    if b.config.get("model_type") == "skipless" and (others := other_model_files(b.folder)):
        function.append(
            f"B's {' and '.join(others)}: not this version's, and trust_remote_code=True would run them instead; "
            f"skipless refresh {b.folder}"
        )
    function += _code_differences(a, b)
    if a.config.get("model_type") == "skipless" and (others := other_model_files(a.folder)):
        notes.append(f"A's {' and '.join(others)}: not this version's; skipless refresh {a.folder}")
    if (record := read_record(b.folder)) is not None:
        for name, problem in differences(b.folder, record):
            kind = generation if name in GENERATION_FILES else notes if Path(name).suffix not in READ else function
            kind.append(f"B's {name}: {problem}, by its skipless.json")
        if other := _other_source(a, record):
            notes.append(f"by its skipless.json, B was made of another source than A: {other}")
    return Differences(tuple(function), tuple(generation), tuple(notes))


def _code_differences(a: CheckpointReader, b: CheckpointReader) -> Iterator[str]:
    """What trust_remote_code=True would run of B, and neither skipless nor A has."""
    before, named = (reader.config.get("auto_map") or {} for reader in (a, b))
    if not named or (named == AUTO_MAP and b.config.get("model_type") == "skipless"):
        return
    if named != before:
        yield f"B's config.json: auto_map: {_shown(named)}, which trust_remote_code=True would run instead; remove it"
        return
    for name in sorted({f"{each.split('.')[0]}.py" for each in named.values() if isinstance(each, str)}):
        files = (reader.folder / name for reader in (a, b))
        one, other = (digest(file) if file.exists() else None for file in files)
        if one != other:
            yield f"B's {name}: other code than A's, which trust_remote_code=True would run"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _config_differences(a: CheckpointReader, b: CheckpointReader) -> Iterator[tuple[str, Any, Any]]:
    before, after = (_telling(read_config(reader.folder)) for reader in (a, b))
    if (opened := translated(a, b)) is not None:
        before = _telling(SkiplessConfig.from_dict(copy.deepcopy(dict(opened.config))))
    names = dict.fromkeys((*before, *after))
    if before.get("model_type") != after.get("model_type"):  # whose other fields mean other things
        names = dict.fromkeys(name for name in names if name in SPECIAL_TOKENS)
    for name in names:
        if before.get(name) != after.get(name):
            yield name, before.get(name), after.get(name)


def _telling(config: PreTrainedConfig) -> dict[str, Any]:
    """A config with its defaults, less what changes nothing and what fuse changes."""
    return {name: value for name, value in _without_neutral(config.to_dict()).items() if name not in REMOVED}


def _without_neutral(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config, and of those in it, of parts of a larger model."""
    return {
        name: _without_neutral(value) if isinstance(value, Mapping) else value
        for name, value in fields.items()
        if name not in NEUTRAL
    }


def read_config(folder: Path) -> PreTrainedConfig:
    """A folder's config with its defaults. Raises InputError for one that transformers does not read."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"{folder / 'config.json'}: expected a config that transformers reads, found: "
            f"{' '.join(str(error.__cause__ or error).split())}"
        ) from error


def _file_differences(a: Path, b: Path) -> Iterator[str]:
    for name in GENERATION_FILES:
        files = [folder / name for folder in (a, b)]
        there = [file.exists() for file in files]
        if there[0] != there[1]:
            yield f"{name}: found in {'A' if there[0] else 'B'} alone"
        elif all(there):
            yield from _differing(name, *files)


def _differing(name: str, a: Path, b: Path) -> Iterator[str]:
    if digest(a) == digest(b):
        return
    if not name.endswith(".json") or max(check_file(file, "a file") for file in (a, b)) > MOST_JSON:
        yield f"{name}: other bytes in B"
        return
    before, after = (read_json_object(file, MOST_JSON) for file in (a, b))
    for key in dict.fromkeys((*before, *after)):
        if key not in MADE and before.get(key) != after.get(key):
            yield f"{name}: {key}: {_shown(before.get(key))} in A, {_shown(after.get(key))} in B"


def _other_source(a: CheckpointReader, record: Mapping[str, Any]) -> str:
    """What of A is not what B's record says that it was made of, or nothing."""
    source = record["source"]
    if source["files"].get("config.json") != digest(a.folder / "config.json"):
        return "config.json"
    for name in a.tensors:
        if source["tensors"].get(name) != a.digest(name):
            return name
    return ""


@dataclass(frozen=True)
class Relation:
    """Two checkpoints of one architecture; B has fewer weights than A, or as many.

    closed: the seams that are open in A and not in B. touched: the modules that closing them rewrites. layout: where
    canonical tensors lie, if both are another family's. before: A as a skipless model, if A alone is another family's.
    """

    source: Architecture
    target: Architecture
    closed: tuple[Seam, ...]
    touched: frozenset[str]
    layout: Layout | None = None
    before: AsSkipless | None = None

    def touches(self, tensor: str) -> bool:
        """Whether closing these seams rewrites a stored tensor, or takes it into another one."""
        if any(tensor in seam.mixed for seam in self.closed) and tensor not in self.target.tensors():
            return True
        names = (tensor,) if self.layout is None else self.layout.parts.get(tensor, ())
        return any(name.rpartition(".")[0] in self.touched for name in names)


def relation(a: CheckpointReader, b: CheckpointReader) -> Relation | None:
    """How B was made of A, if fuse could have; None for other models, and for architectures that differ."""
    before = translated(a, b)
    if before is None and any(reader.config.get("model_type") != "skipless" for reader in (a, b)):
        return _relation_of_families(a, b)
    source, target = (Architecture.from_config(opened.config) for opened in (before or a, b))
    plain: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(source) if field.name in REMOVED}
    if dataclasses.replace(source, **plain) != dataclasses.replace(target, **plain):
        return None
    try:
        closed = tuple(_closed(source, target))
    except LookupError:
        return None
    touched = frozenset(name for seam in closed for name in seam.modules)
    return Relation(source, target, closed, touched, before=before)


def translated(a: CheckpointReader, b: CheckpointReader) -> AsSkipless | None:
    """A as a skipless model, if it is one of another family that can be one, and B is a skipless one."""
    if a.config.get("model_type") == "skipless" or b.config.get("model_type") != "skipless":
        return None
    try:
        return as_skipless(a)
    except InputError:
        return None


def _relation_of_families(a: CheckpointReader, b: CheckpointReader) -> Relation | None:
    """The same, of models in a family's own layout: what has moved in B, and had not in A."""
    try:
        first, second = (laid_out(reader) for reader in (a, b))
    except InputError:  # of a family that is not described
        return None
    if (first.family, first.architecture, first.locations) != (second.family, second.architecture, second.locations):
        return None
    every = [seam for seam in folds(first.architecture) if not seam.blocked]
    before, after = (Canonical(reader.tensors, reader.tensor, first) for reader in (a, b))
    moved = tuple(seam for seam in every if _is_neutral(after, seam) and not _is_neutral(before, seam))
    touched = frozenset(name for seam in moved for name in seam.modules)
    return Relation(first.architecture, first.architecture, moved, touched, first)


def _is_neutral(tensors: Canonical, seam: Seam) -> bool:
    """Whether what a seam's writer holds is gone: a norm's gain 1, and a bias, or the part of it that goes, 0."""
    (writer,) = seam.writers
    gain, bias = f"{writer}.weight", f"{writer}.bias"
    if seam.kind == "norms" and gain in tensors.tensors and not bool((tensors.tensor(gain) == 1).all()):
        return False
    return bias not in tensors.tensors or not bool(moving(seam, tensors.tensor(bias)).any())


def _closed(source: Architecture, target: Architecture) -> Iterator[Seam]:
    """Seams that are open in one architecture, and not in the other."""
    by_p = target.block_type == "parallel" and target.p_removed and not source.p_removed
    removes = "p" if by_p else "readers"
    # those of layer 0, too: it may have been precomputed later
    every = seams(source, removes, target.values_removed, queries=True)
    if target.first_layer_removed:
        every += [seam for seam in seams(source, removes, first_layer=True) if seam.kind == "first_layer"]
    for seam in every:
        gone = {
            "stream": seam.kind == "stream" and target.stream_closed(seam.layer),
            "p": target.p_removed,
            "values": target.values_removed,
            "queries": target.keys_removed,
            "head": target.head_removed,
            "first_layer": True,
            "norms": seam.writers[0] in (*target.gains_removed, *target.norms_removed),
        }
        if gone[seam.kind]:
            yield seam


def differing_tensors(
    related: Relation, a: Opened, b: CheckpointReader, progress: Callable[[], None] = lambda: None
) -> list[str]:
    """Tensors of A that no closed seam touches, and that are not in B what they are in A, cast to B's dtype.

    `progress` is called for each tensor that has been looked at.
    """
    different = []
    for name, info in a.tensors.items():
        progress()
        if related.touches(name):
            continue
        other = b.tensors.get(name)
        if other is None or other.shape != info.shape or not _equal(a, b, name):
            different.append(name)
    return different


def _equal(a: Opened, b: CheckpointReader, name: str) -> bool:
    info, dtype = a.tensors[name], b.tensors[name].dtype
    rows = slices(info.shape[0], max(1, BLOCK // max(1, info.weights // info.shape[0]))) if info.weights else ()
    return all(torch.equal(a.tensor(name, part).to(dtype), b.tensor(name, part)) for part in rows)

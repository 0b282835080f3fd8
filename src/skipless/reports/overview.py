"""All there is to say of a fused model beside its source: what went, at what loss, is it the same, what both write."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skipless.checkpoint.canonical import Canonical
from skipless.checkpoint.reader import CheckpointReader
from skipless.errors import InputError
from skipless.inference import generate, load, load_tokenizer, positions_of
from skipless.reports.auditing import Audit, audit
from skipless.reports.comparing import Opened, Relation, read_config, relation
from skipless.reports.counting import LETTERS
from skipless.reports.verification import DEFAULT_DTYPES, DEFAULT_PROMPT, Report, prompt_ids, verify
from skipless.rewrite.card import named
from skipless.rewrite.record import read_record

# Options of fuse, as its record has them, that audit takes, too.
ASKED = ("basis", "dtype", "rest_dtype", "layers_open", "remove", "parallel_removes")

# What a model is made of, in the paper's letters and in this order.
REST, OTHER = "rest of Q, K, V", "other"
PARTS = ("Q", "K", "V", REST, "P", "M", "O", "embeddings", "head", "biases", OTHER)


@dataclass(frozen=True)
class Closed:
    """Seams of one kind that are closed: how many, by which ways, and how many weights that saves."""

    kind: str
    count: int
    ways: tuple[str, ...]
    saves: int


@dataclass(frozen=True)
class Overview:
    """A source and what was made of it.

    parameters, bytes: of all tensors, before and after. parts: numbers by matrix (of PARTS), before and after. closed:
    the seams that were closed, by kind. options: fuse's, as the record has them (empty without one). stored: kind of
    seam -> layer -> the error that it was closed with, where that was measured. texts: what both write after the
    prompt, in fp32, or None where the source has no tokenizer, or cannot read it and add as many tokens.
    """

    source: str
    fused: str
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    parts: Mapping[str, tuple[int, int]]
    closed: tuple[Closed, ...]
    options: Mapping[str, Any]
    stored: Mapping[str, Mapping[int, float]]
    audit: Audit
    report: Report
    prompt: str
    texts: tuple[str, str] | None


def overview(
    source: str | Path,
    fused: str | Path,
    *,
    prompt: str = DEFAULT_PROMPT,
    tokens: int = 64,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Overview:
    """Audit the source with the options it was fused with, verify the result, and let both continue the prompt.

    tokens: how many they add. `progress` is called with what is done next, how many steps are done, and of how many.
    Raises InputError if the one folder was not made of the other, or if one does not load.
    """
    source, fused = Path(source), Path(fused)
    first, second = CheckpointReader(source), CheckpointReader(fused)
    related = relation(first, second)
    if related is None or not related.closed:
        raise InputError(f"{fused}: expected what fuse has made of {source}, found no seam that was closed in it")
    record = read_record(fused) or {}
    options = record.get("options", {})
    sizes = [_parts(opened, related) for opened in (related.before or first, second)]
    kinds = dict.fromkeys(seam.kind for seam in related.closed)
    asked = {name: options[name] for name in ASKED if name in options}
    if first.config.get("model_type") != "skipless" and not asked.get("remove"):  # audit's usual seams are others
        asked["remove"] = [*kinds]
    audited = audit(source, **asked, progress=lambda done, total: progress("auditing", done, total))
    report = verify(source, fused, dtypes=DEFAULT_DTYPES, prompt=prompt, tokens=tokens, progress=progress)
    texts = None
    config = read_config(source).get_text_config()
    if (ids := prompt_ids(source, prompt, positions_of(config) - tokens, config.vocab_size)) is not None:
        texts = (_text(source, ids, tokens), _text(fused, ids, tokens))
    stored: dict[str, dict[int, float]] = {}
    for seam in record.get("seams", ()):
        if seam["errors"]:
            stored.setdefault(seam["kind"], {})[seam["layer"]] = max(seam["errors"].values())
    basis = related.target.stream_basis or ""
    return Overview(
        source=named(str(source)),
        fused=named(str(fused)),
        parameters=(sizes[0].total(), sizes[1].total()),
        bytes=(_bytes(related.before or first), _bytes(second)),
        parts={name: (sizes[0][name], sizes[1][name]) for name in PARTS if sizes[0][name] or sizes[1][name]},
        closed=tuple(_closed(kind, [seam for seam in related.closed if seam.kind == kind], basis) for kind in kinds),
        options=asked,
        stored=stored,
        audit=audited,
        report=report,
        prompt=prompt,
        texts=texts,
    )


def _closed(kind: str, seams: list[Any], basis: str) -> Closed:
    ways = tuple(dict.fromkeys(seam.way(basis) for seam in seams))
    return Closed(kind, len(seams), ways, sum(seam.saves for seam in seams))


def _bytes(reader: Opened) -> int:
    return sum(info.bytes for info in reader.tensors.values())


def _parts(reader: Opened, related: Relation) -> Counter[str]:
    """Numbers in a checkpoint by matrix, as the paper calls them, and what else there is."""
    tables = {module.name for module in related.source.modules() if module.table}
    layout = related.layout
    tensors = reader.tensors if layout is None else Canonical(reader.tensors, reader.tensor, layout).tensors
    sizes: Counter[str] = Counter()
    for name, info in tensors.items():
        if not info.is_index:
            module, _, kind = name.rpartition(".")
            sizes[_part(module, kind, module in tables)] += info.weights
    return sizes


def _part(module: str, kind: str, table: bool) -> str:
    last = module.rpartition(".")[2]
    if kind == "bias":
        return "biases"
    if table:
        return "embeddings"
    if last == "lm_head":
        return "head"
    if last == "rest_proj":
        return REST
    return LETTERS[last].upper() if last in LETTERS else OTHER


def _text(folder: Path, ids: torch.Tensor, tokens: int) -> str:
    """What a model in fp32 writes after a prompt (1, length)."""
    text: str = load_tokenizer(folder).decode(generate(load(folder, torch.float32), ids, tokens).tokens)
    return text

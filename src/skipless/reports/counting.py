"""Weights of any model, and how many could go: nominally, exactly, at most, and in the model as it is. No torch.

Q, K, V, P, M, O, d, D, e, f as in arXiv:2404.12362; a count is of numbers, not of bytes.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipless.architecture.config import Architecture, Module
from skipless.architecture.folds import folds, staying
from skipless.architecture.graph import graph
from skipless.architecture.limit import closable, saved, terms
from skipless.architecture.seams import REMOVABLE, Seam, as_it_is, closed, reasons, seams
from skipless.bundled import KNOWN
from skipless.checkpoint import family, gguf_file, inexpressible
from skipless.checkpoint.headers import Folder, read_json_object
from skipless.errors import InputError

# Bytes of a weight in memory, as a decoder reads it.
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}
MATRICES = ("q", "k", "v", "p", "m", "o")
LETTERS = {
    "q_proj": "q",
    "k_proj": "k",
    "k_rope_proj": "k",
    "v_proj": "v",
    "o_proj": "p",
    "up_proj": "m",
    "gate_proj": "m",
    "down_proj": "o",
}
# The papers whose tables are counted again: ours, and that of the first layer; the models of both, with the vocabulary
# that they give Pythia, and that of the second one alone.
PAPERS = ("2404.12362", "2402.13388")
PAPER = {"pythia-6.9b": 50400, "mistral-7b": 32000}
FIRST_LAYER = {**PAPER, "mixtral-8x7b": 32000}


@dataclass(frozen=True)
class Conditions:
    """How a model decodes.

    dtype, cache_dtype: of its weights and of its cache. context: tokens in the cache. batch: sequences at once. For a
    roofline, bandwidth: the machine's, in bytes/s; peak: its FLOP/s (None: reading is all that takes time).
    """

    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    context: int = 0
    batch: int = 1
    bandwidth: float | None = None
    peak: float | None = None


@dataclass(frozen=True)
class Saving:
    """What removing weights saves.

    removed: how many weights. saving: their share of all. speedup: of decoding, under the conditions asked for.
    """

    removed: int
    saving: float
    speedup: float


@dataclass(frozen=True)
class Exact(Saving):
    """What rewriting a skipless version saves. basis: the simplest that does. blocked: what stays, and why."""

    basis: str | None
    blocked: tuple[str, ...]


@dataclass(frozen=True)
class FirstLayer:
    """Layer 0 precomputed (arXiv:2402.13388): the table has what it makes of each token before any attention.

    removed: weights of layer 0 that go. added: weights that the table has more than the embeddings. width: numbers in a
    row of the stream. row: numbers in a row of the table.
    """

    removed: int
    added: int
    width: int
    row: int

    @property
    def grows(self) -> int:
        """By how many weights the model grows; negative where it shrinks."""
        return self.added - self.removed

    def reads(self, batch: int) -> tuple[int, int]:
        """Weights that a step of so many tokens reads for it before, and after."""
        return batch * self.width + self.removed, batch * self.row


@dataclass(frozen=True)
class Count:
    """What a model has, and what could go.

    - parameters: all of them
    - parts: the same, by matrix, embeddings (tables and head), norms, biases, other
    - weights: those of linear layers and embeddings, a tied embedding once
    - per_layer: weights of a layer, by matrix (of the first layer with experts, if any has)
    - nominal: trained without Q and P (qp), K and P, V and P, Fig. 1 and 3 of the paper; None where e != d
    - exact: rewriting a skipless version of it, stream and P-M seams
    - everything: rewriting a skipless version of it, all kinds of seams
    - limit: what could go from a skipless version at most (removable_at_most)
    - as_is: what can go from the model as it is, by what it is: from one without norms, by kind of seam; from others,
      removable_as_is
    - by_fuse, stays: of that, what fuse removes or moves, and why it leaves the rest of norms and biases
      (moved_by_fuse)
    - left_out: how many numbers fewer fuse stores in a skipless layout (None: it has none; left_out_by_fuse)
    """

    name: str
    family: str
    architecture: Architecture
    parameters: int
    weights: int
    parts: Mapping[str, int]
    per_layer: Mapping[str, int]
    embeddings: int
    nominal: Mapping[str, Saving | None]
    exact: Exact
    everything: int
    limit: int
    as_is: Mapping[str, int]
    by_fuse: int | None
    stays: tuple[str, ...]
    left_out: int | None

    @property
    def first_layer(self) -> FirstLayer | None:
        """What precomputing layer 0 would take and give, as its paper counts: matrices alone, no biases, no routers.

        None where it cannot be precomputed, or has been.
        A serial layer's row holds q, k, v and, where a skip adds it, the token's embedding; a parallel one's q, k, v
        and the embedding's sum with what the FFN gives.
        """
        a = self.architecture
        if a.first_layer_stays or a != a.unfused():
            return None
        letters = "qkvmo" if a.block_type == "parallel" else "qkv"
        removed = sum(self.per_layer[letter] for letter in letters)
        after = dataclasses.replace(a, first_layer_removed=True, norms_removed=a.first_layer_norms)
        row = sum(after.row.values())
        return FirstLayer(removed, (row - a.hidden_size) * a.vocab_size, a.hidden_size, row)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        values = dataclasses.asdict(self)
        total = sum(self.as_is.values())
        return {
            **values,
            "first_layer": self.first_layer and dataclasses.asdict(self.first_layer),
            "own_state": self.architecture.own_state,
            "limit": {"removable": self.limit},
            "as_is": {**self.as_is, "total": total, "saving": total / self.parameters},
        }


def count(model: str | Path, conditions: Conditions | None = None) -> Count:
    """Count a config.json, a model folder, a GGUF file, or a name in the bundled table.

    Raises InputError for a config that lacks or contradicts something, and for a name that is not known.
    """
    return count_architecture(*resolve(model), conditions or Conditions())


def count_architecture(
    name: str, family_name: str, architecture: Architecture, config: Mapping[str, Any], conditions: Conditions
) -> Count:
    """Count an architecture, whatever it was read from: a config.json that says so, or anything else (an empty one)."""
    modules = architecture.modules()
    parts = dict.fromkeys(("embeddings", *MATRICES, "norms", "biases", "other"), 0)
    for module in modules:
        parts[_part(module)] += module.inputs * module.outputs
        parts["biases"] += module.outputs * module.bias
    norms, indices = architecture.norm_tensors(), architecture.index_tensors()
    parts["norms"] = sum(math.prod(shape) for shape in norms.values())
    weights = sum(parts.values()) - parts["norms"] - parts["biases"]
    known = {tensor for module in modules for tensor in module.tensors()} | norms.keys()
    for tensor, shape in architecture.tensors().items():
        if tensor not in known and tensor not in indices:
            parts["other"] += math.prod(shape)
    layer = next((layer for layer in range(architecture.num_hidden_layers) if architecture.has_experts(layer)), 0)
    per_layer = dict.fromkeys(MATRICES, 0)
    for module in modules:
        if module.name.startswith(f"model.layers.{layer}.") and (letter := _part(module)) in per_layer:
            per_layer[letter] += module.inputs * module.outputs

    before = _work(modules, architecture, conditions)

    def removal(removed: int, read: float) -> Saving:
        """read: of what is removed, what a decoding step reads; the arithmetic shrinks by as much."""
        after = (before[0] - read * WEIGHT_BYTES[conditions.dtype], before[1] - 2 * read * conditions.batch)
        return Saving(removed, removed / weights, _seconds(before, conditions) / _seconds(after, conditions))

    square = architecture.value_width == architecture.hidden_size
    nominal = {
        f"{letter}p": removal(gone, gone) if letter == "q" or square else None
        for letter, gone in ((letter, parts[letter] + parts["p"]) for letter in "qkv")
    }
    every = [seam for seam in seams(architecture.skipless()) if seam.kind in REMOVABLE]
    possible = [seam for seam in every if not seam.blocked]
    whole = removal(
        sum(seam.saves for seam in possible), sum(_read_less(seam, architecture, conditions) for seam in possible)
    )
    by_fuse, stays = moved_by_fuse(family_name, architecture)
    stored = max(WEIGHT_BYTES[conditions.dtype], WEIGHT_BYTES["bfloat16"])  # fuse stores no integers
    bases = [basis for seam in possible if seam.kind == "stream" for basis in seam.identities][:1]
    if architecture.norm_type == "none":
        as_is = saved(_closable_as_is(architecture, stored))
        by_fuse = sum(as_is.values())
    else:
        as_is = removable_as_is(architecture)
    return Count(
        name=name,
        family=family_name,
        architecture=architecture,
        parameters=sum(parts.values()),
        weights=weights,
        parts=parts,
        per_layer=per_layer,
        embeddings=parts["embeddings"],
        nominal=nominal,
        exact=Exact(**dataclasses.asdict(whole), basis=bases[0] if bases else None, blocked=reasons(every)),
        everything=sum(saved(closable(architecture.skipless(), stored)).values()),
        limit=removable_at_most(architecture),
        as_is=as_is,
        by_fuse=by_fuse,
        stays=stays,
        left_out=left_out_by_fuse(family_name, architecture, config, stored),
    )


def removable_at_most(architecture: Architecture) -> int:
    """How many weights of a skipless version carry no information, less those that have been removed already.

    They are limit.terms without those of biases, and, with layer 0 in the token table, without its stream seam's.
    """
    whole, left = architecture.unfused(), dataclasses.replace(architecture, first_layer_removed=False)
    gone = sum(module.inputs * module.outputs for module in whole.modules())
    gone -= sum(module.inputs * module.outputs for module in left.modules())
    if architecture.first_layer_removed and not architecture.stream_closed(0):
        gone += (len(graph(architecture).before(0).places) == 1) * architecture.hidden_size**2
    return sum(numbers for name, numbers in terms(whole.skipless()).items() if name != "biases") - gone


def removable_as_is(architecture: Architecture) -> dict[str, int]:
    """What can go exactly from a model with its skips and norms: seams of values, and of queries and keys, and what can
    be moved (folds.folds).
    """
    heads = architecture.num_hidden_layers * architecture.num_key_value_heads
    values = heads * architecture.head_dim**2
    queries = 0 if architecture.keys_stay else heads * architecture.unrotated**2
    numbers = {"values": values, "queries": queries, "norm_gains": 0, "norm_biases": 0, "k_bias": 0, "v_bias": 0}
    for seam in folds(architecture):
        if seam.blocked:
            continue
        if seam.kind == "norms":
            numbers["norm_gains"] += seam.width
            numbers["norm_biases"] += seam.saves - seam.width
        else:
            numbers["k_bias" if "key_bias" in seam.identities else "v_bias"] += seam.saves
    return numbers


def moved_by_fuse(family_name: str, architecture: Architecture) -> tuple[int | None, tuple[str, ...]]:
    """Of what can go as it is: what fuse moves in the family's layout, where gains become 1, biases 0; and what stays.

    None: it moves nothing of this kind (a skipless model, as a folder or a GGUF file).
    """
    if family_name in ("skipless", "gguf-skipless"):
        return None, ()
    every = folds(architecture)
    return sum(seam.saves for seam in every if not seam.blocked), staying(every)


def left_out_by_fuse(
    family_name: str, architecture: Architecture, config: Mapping[str, Any], itemsize: float
) -> int | None:
    """How many numbers fewer `fuse --layout skipless` stores of a model with skips and norms.

    config: its config.json. itemsize: bytes of a weight. None: no skipless model computes what it does.
    """
    families = [each for each in family.every() if family_name in each.model_types]
    if not families or families[0].excludes(config) or not architecture.expressible:
        return None
    left = closed(architecture, as_it_is(architecture, itemsize), "q")
    indices = left.index_tensors()
    before, after = (sum(map(math.prod, each.tensors().values())) for each in (architecture, left))
    return before - after + sum(map(math.prod, indices.values()))


def _closable_as_is(architecture: Architecture, itemsize: float) -> list[Seam]:
    """The seams of a model without norms that fuse closes: those of queries, too, where no stream's are among them."""
    closing = closable(architecture, itemsize)
    if any(seam.kind == "stream" for seam in closing):
        return closing
    queries = [seam for seam in seams(architecture, queries=True) if seam.kind == "queries"]
    return closing + [seam for seam in queries if not (seam.blocked or seam.unpaid(itemsize))]


def resolve(model: str | Path) -> tuple[str, str, Architecture, Mapping[str, Any]]:
    """Name, family, architecture and config of a config.json, a model folder, a GGUF file, or a name in the table.

    A GGUF file's config is empty here. Names are ours or a hub's, in upper or lower case. Tensors, if there are any,
    are checked against the config by their headers. Raises InputError.
    """
    path = Path(model)
    if path.suffix == ".gguf":
        layout = family.laid_out(gguf_file.GGUFReader(path))
        return path.stem, layout.family.model_types[0], layout.architecture, {}
    if path.is_dir():
        config = read_json_object(path / "config.json", folder=path)
        if any(path.glob("*.safetensors")):
            family.check(Folder(path))
    elif path.suffix == ".json" or path.is_file():
        config = read_json_object(path)
    else:
        known = table()
        names, asked = known["models"], str(model).lower()
        asked = {each.lower(): name for name, hub in known["hub"].items() for each in hub}.get(asked, asked)
        if asked not in names and (other := inexpressible.named(asked)) is not None:
            raise InputError(other.refusal_of(str(model)))
        if asked not in names:
            near = difflib.get_close_matches(asked.rpartition("/")[2], names, 4, 0.4)
            raise InputError(
                f"{model}: expected a model folder, a config.json, a GGUF file or a known name; found none; the "
                f"nearest names are {', '.join(near or list(names)[:4])} (all of them: skipless count --list)"
            )
        return asked, *_described(names[asked]), names[asked]
    name = path.resolve().parent.name if path.name == "config.json" else path.resolve().stem
    return name, *_described(config), config


def table() -> dict[str, Any]:
    """The bundled table of well-known configurations: its date; models, name -> config fields; hub, name -> what model
    hubs call it.
    """
    loaded: dict[str, Any] = json.loads(KNOWN.read_text(encoding="utf-8"))
    return loaded


def paper(models: Mapping[str, int]) -> list[tuple[Count, Count]]:
    """The models of a paper's table as it counts them (PAPER, FIRST_LAYER), and as published."""
    pairs = []
    for name, vocabulary in models.items():
        published = count(name)
        architecture = dataclasses.replace(published.architecture, vocab_size=vocabulary)
        pairs.append((count_architecture(name, published.family, architecture, {}, Conditions()), published))
    return pairs


def in_parallel(serial: Count) -> Count:
    """The model whose attention and FFN stood side by side, and read one norm."""
    norms = tuple(norm for norm in serial.architecture.norms if norm != "post_attention_layernorm")
    architecture = dataclasses.replace(serial.architecture, block_type="parallel", norms=norms)
    return count_architecture(serial.name, serial.family, architecture, {}, Conditions())


def _described(config: Mapping[str, Any]) -> tuple[str, Architecture]:
    architecture = family.read(config)
    if config["model_type"] != "skipless":
        return family.find(config).model_types[0], architecture
    from skipless.checkpoint.opening import check_config  # which takes transformers, for which nothing else waits

    check_config(config)
    return "skipless", architecture


def _part(module: Module) -> str:
    if module.table or module.name == "lm_head":
        return "embeddings"
    return LETTERS.get(module.name.rpartition(".")[2], "other")


def _experts_read(architecture: Architecture, conditions: Conditions) -> float:
    """How many of its experts a step reads, on average, if each token's are drawn evenly and independently."""
    n, k = architecture.num_local_experts, architecture.num_experts_per_tok
    return n * (1 - (1 - k / n) ** conditions.batch)


def _work(modules: list[Module], architecture: Architecture, conditions: Conditions) -> tuple[float, float]:
    """Bytes read and FLOPs done in one decoding step of all sequences: one row of each table, the active experts."""
    read = computed = 0.0
    for module in modules:
        size = module.inputs * module.outputs
        if module.table:
            read += conditions.batch * module.outputs
            if module.name == "model.embed_tokens" and architecture.tie_word_embeddings:
                read, computed = read + size, computed + size
        elif ".experts." in module.name:
            n = architecture.num_local_experts
            read += size * _experts_read(architecture, conditions) / n
            computed += size * architecture.num_experts_per_tok / n
        else:
            read, computed = read + size, computed + size
    tokens = conditions.batch * conditions.context * architecture.num_hidden_layers
    cache = tokens * 2 * architecture.value_width * WEIGHT_BYTES[conditions.cache_dtype]
    flops = 2 * computed * conditions.batch + 4 * tokens * architecture.query_width
    return read * WEIGHT_BYTES[conditions.dtype] + cache, flops


def _read_less(seam: Seam, architecture: Architecture, conditions: Conditions) -> float:
    """What a step reads less once a seam is closed; where merging P narrows experts, the active ones alone count."""
    d, wide = architecture.hidden_size, architecture.query_width
    if seam.kind != "p" or wide >= d or not architecture.has_experts(seam.layer):
        return seam.saves
    narrower = seam.saves - wide * d - (d - wide) * architecture.num_local_experts
    share = _experts_read(architecture, conditions) / architecture.num_local_experts
    return seam.saves - narrower * (1 - share)


def _seconds(work: tuple[float, float], conditions: Conditions) -> float:
    """The roofline's time; without a machine, that of reading, at one byte a second."""
    read, flops = work
    if conditions.bandwidth is None or conditions.peak is None:
        return read
    return max(read / conditions.bandwidth, flops / conditions.peak)

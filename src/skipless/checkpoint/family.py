"""Other people's models: what a family calls our dimensions and tensors, and how it lays them out.

One file in families/ describes one family, as data; this room reads a config.json and names tensors by it. No torch.
"""

import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, Self

from skipless.architecture.config import FOREIGN, Architecture, Module, rotated_part
from skipless.checkpoint import families, inexpressible
from skipless.checkpoint.headers import Folder
from skipless.errors import InputError

Config = Mapping[str, Any]
# A config field, several of which the first that is there counts, or what follows from several.
Rule = str | tuple[str, ...] | Callable[[Config], Any]

# What most families have in common. A model's own norms, skips and positions are in its `fixed` or `fields`.
LLAMA_FIELDS: Mapping[str, Rule] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "tie_word_embeddings": "tie_word_embeddings",
}
LLAMA_FIXED: Mapping[str, Any] = {"residual": "both", "norm_type": "rms"}
# Absent or null, num_key_value_heads and head_dim follow from the others.
LLAMA_DEFAULTS: Mapping[str, Any] = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False}
GPT_FIELDS: Mapping[str, Rule] = {
    "vocab_size": "vocab_size",
    "hidden_size": ("n_embd", "hidden_size"),
    "intermediate_size": lambda config: config["n_inner"] or 4 * (config["n_embd"] or config["hidden_size"]),
    "num_hidden_layers": ("n_layer", "num_hidden_layers"),
    "num_attention_heads": ("n_head", "num_attention_heads"),
    "tie_word_embeddings": "tie_word_embeddings",
}
GPT_DEFAULTS: Mapping[str, Any] = {"n_inner": None, "tie_word_embeddings": True}


def rope(config: Config) -> dict[str, Any]:
    """RoPE's parameters, the same in all layers. Raises InputError for those of layers that differ."""
    parameters: Mapping[str, Any] = config["rope_parameters"]
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise InputError(
            f"config.json: rope_parameters: expected the same for all layers, found some for each of {[*parameters]}"
        )
    return {name: value for name, value in parameters.items() if value is not None and name != "type"}


def whole_rope(config: Config) -> dict[str, Any]:
    """The same, of a model that rotates whole heads, whatever its config says."""
    return {name: value for name, value in rope(config).items() if name != "partial_rotary_factor"}


def rotary(name: str, default: float) -> Callable[[Config], Any]:
    """The part of each head that RoPE rotates: in rope_parameters, or, of older files, in the field of this name."""
    return lambda config: rotated_part(config, default if config[name] is None else config[name])


def _mixed(config: Config) -> list[str] | None:
    kinds: list[str] = config["layer_types"] or []
    return kinds if len(set(kinds)) > 1 else None


# The window of models in which all layers have it, or none; and of those in which some may have it.
ONE_WINDOW: Mapping[str, Rule] = {"sliding_window": lambda config: config["sliding_window"]}
WINDOWS: Mapping[str, Rule] = {
    "sliding_window": lambda config: config["sliding_window"] if "sliding_attention" in config["layer_types"] else None,
    "layer_types": _mixed,
}
# What a skipless model is told besides, of a config as transformers completes it.
LLAMA_COMPUTES: Mapping[str, Rule] = {
    "hidden_act": "hidden_act",
    "norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "rope_parameters": whole_rope,
}


GPT_COMPUTES: Mapping[str, Rule] = {"hidden_act": "activation_function", "norm_eps": "layer_norm_epsilon"}
# Of models with layer norms that RoPE rotates.
LAYER_NORM_COMPUTES: Mapping[str, Rule] = {**LLAMA_COMPUTES, "norm_eps": "layer_norm_eps", "rope_parameters": rope}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family's config.json and checkpoints are to be read.

    model_types: config.json's model_type, of one or more. inside: the field that holds the language model's config, if
    it has one (multimodal models). fields: Architecture's field -> where its value is; defaults: the config's values
    when they are absent, as in the family's published files; fixed: Architecture's fields that never differ.

    prefixes: what stands before every tensor's name but the head's, the usual first. layers: a layer's name, with {i}.
    names: canonical module -> this family's, those in a layer without its name; the others are called as we call them.
    variants: names that differ in some checkpoints.
    "self_attn.qkv_proj" and "mlp.gate_up_proj" are fused modules. qkv: how the rows of a fused one lie, "concatenated"
    (all of Q, all of K, all of V) or "grouped" (for each key-value head: its queries, its key, its value):

        concatenated   q0 q1 q2 q3 k0 k1 v0 v1        grouped   q0 q1 k0 v0 q2 q3 k1 v1

    norm_heads: of a norm of queries and keys, each head has its own tensor ("names", with {h} in its name), or row of
    one ("rows"). gain_offset: norms' gains are stored less this (Gemma's 1 + w as w). transposed: linear layers are
    stored (inputs, outputs). buffers, beside: parts of names of tensors that are no weights, and of those of another
    model in the same files.

    computes: what a skipless config.json says besides, so that its model computes the same: its field -> where the
    config, as transformers completes it, has it; None: no skipless model does. requires: values in that config that are
    taken for granted, or whether one will do.
    """

    model_types: tuple[str, ...]
    inside: str = ""
    fields: Mapping[str, Rule] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("model.",)
    layers: str = "layers.{i}"
    names: Mapping[str, str] = field(default_factory=dict)
    variants: tuple[Mapping[str, str], ...] = ()
    qkv: str = "concatenated"
    norm_heads: str | None = None
    gain_offset: float = 0.0
    transposed: bool = False
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    beside: tuple[str, ...] = ()
    computes: Mapping[str, Rule] | None = None
    requires: Mapping[str, Any] = field(default_factory=dict)

    def config(self, config: Config) -> Config:
        """The language model's part, with this family's defaults. Raises InputError if it is not an object."""
        own = config.get(self.inside, config) if self.inside else config
        if not isinstance(own, Mapping):
            raise InputError(f"config.json: {self.inside}: expected an object, found {own!r}")
        shared = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
        return Lenient({**self.defaults, **shared, **own})

    def architecture(self, config: Config) -> Architecture:
        """What a config.json of this family describes.

        Raises InputError naming the field that is missing, of the wrong type or out of range.
        """
        own = self.config(config)
        try:
            return Architecture.from_values({**self.fixed, **self._values(own, self.fields)})
        except InputError as error:
            raise InputError(self._in_its_words(str(error), own)) from error

    def excludes(self, config: Config) -> tuple[str, object] | None:
        """The field, and its value, of a config.json of this family for which no skipless model computes the same."""
        if self.computes is None:
            return "model_type", config.get("model_type")
        if self.inside in config:
            return self.inside, "the language model of a larger one"
        for name, wanted in self.requires.items():
            if name in config and not (wanted(config[name]) if callable(wanted) else config[name] == wanted):
                return name, config[name]
        return None

    def skipless(self, architecture: Architecture, completed: Config) -> dict[str, Any]:
        """The fields of a skipless config.json that computes what a model of this family does, nothing removed.

        completed: the family's own, as transformers completes it. Raises InputError, naming the field, for what no
        skipless model computes.
        """
        own = Lenient(completed)

        def refuse(name: str, found: object) -> InputError:
            return InputError(
                f"config.json: {name}: expected a {self.model_types[0]} model that a skipless model can compute, for "
                f"layout skipless, found {found!r}; use layout family"
            )

        if (excluded := self.excludes(own)) is not None:
            raise refuse(*excluded)
        assert self.computes is not None
        if architecture.qk_norm and architecture.norm_type == "layer":  # of which ours are RMS norms
            raise refuse("qk_norm", architecture.qk_norm)
        for name in ("embedding_size", "dense_layers"):
            if found := getattr(architecture, name):
                raise refuse(name, found)
        given = {name: value for name, value in architecture.given().items() if name not in FOREIGN}
        if self.gain_offset:
            given["gain_offset"] = self.gain_offset
        return {"model_type": "skipless", **given, **self._values(own, self.computes)}

    def layout(self, architecture: Architecture, names: Collection[str]) -> "Layout":
        """Where a checkpoint with tensors of these names has them. Raises InputError as Layout.of does."""
        return Layout.of(self, architecture, names)

    def _in_its_words(self, message: str, config: Config) -> str:
        """An error about one of Architecture's fields, by this family's name for it."""
        for name, rule in self.fields.items():
            if not callable(rule) and message.startswith(f"config.json: {name}:"):
                called = next((choice for choice in self._choices(rule) if choice in config), name)
                return message.replace(name, called, 1)
        return message

    def _values(self, config: Config, rules: Mapping[str, Rule]) -> dict[str, Any]:
        """What follows from the rules, less what is null."""
        values = {name: self._value(config, name, rule) for name, rule in rules.items()}
        return {name: value for name, value in values.items() if value is not None}

    @staticmethod
    def _choices(rule: str | tuple[str, ...]) -> tuple[str, ...]:
        return (rule,) if isinstance(rule, str) else rule

    def _value(self, config: Config, name: str, rule: Rule) -> Any:
        if callable(rule):
            try:
                return rule(config)
            except InputError:
                raise
            except (TypeError, ValueError, ArithmeticError, AttributeError, KeyError) as error:
                raise InputError(
                    f"config.json: {name}: expected to follow from this {self.model_types[0]} model's fields; {error}"
                ) from error
        choices = self._choices(rule)
        for choice in choices:
            if choice in config:
                if config[choice] is None and choice not in self.defaults:
                    raise InputError(f"config.json: {choice}: expected a value, found null; correct it")
                return config[choice]
        raise InputError(
            f"config.json: {choices[0]}: expected a value ({name} of this {self.model_types[0]} model), found none; "
            f"add it"
        )


class Lenient(dict[str, Any]):
    """A config in which a field that is absent is None to a rule that asks for it."""

    def __missing__(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class Location:
    """Where a canonical tensor lies: in these stored tensors, one after the other, or in ranges of the rows of one.

    rows: ranges (start, stop) of the stored tensor's outputs; empty: all of them. transposed: whether it is stored
    (inputs, outputs). offset: what is added to the stored numbers.
    """

    tensors: tuple[str, ...]
    rows: tuple[tuple[int, int], ...] = ()
    transposed: bool = False
    offset: float = 0.0


class Layout:
    """The tensors of one checkpoint of a family.

    prefix: what its tensors' names begin with. locations: canonical tensor -> where it lies. shapes: stored tensor ->
    the shape that the config promises.
    """

    def __init__(self, family: Family, architecture: Architecture, prefix: str, variant: Mapping[str, str]):
        self.family, self.architecture, self.prefix = family, architecture, prefix
        self.names = {**family.names, **variant}
        self.locations: dict[str, Location] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for module in architecture.modules():
            self._module(module)
        for name, shape in architecture.norm_tensors().items():
            self._norm(name, shape)

    @cached_property
    def _spans(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Of the rows of fused modules, those of each part."""
        size, groups = self.architecture.head_dim, self.architecture.num_key_value_heads
        each = self.architecture.num_attention_heads // groups
        q, e = self.architecture.query_width, self.architecture.value_width
        if self.family.qkv == "concatenated":
            spans = {"q_proj": [(0, q)], "k_proj": [(q, q + e)], "v_proj": [(q + e, q + 2 * e)]}
        else:
            starts = [group * (each + 2) * size for group in range(groups)]
            heads = {"q_proj": (0, each), "k_proj": (each, each + 1), "v_proj": (each + 1, each + 2)}
            spans = {
                name: [(start + first * size, start + last * size) for start in starts]
                for name, (first, last) in heads.items()
            }
        f = self.architecture.intermediate_size
        spans |= {"gate_proj": [(0, f)], "up_proj": [(f, 2 * f)]}
        return {name: tuple(rows) for name, rows in spans.items()}

    def _stored(self, name: str) -> str:
        """A canonical module's name in this family."""
        parts = name.split(".")
        if parts[:2] != ["model", "layers"]:
            called = self.names.get(name, name.removeprefix("model."))
            return called if name == "lm_head" else self.prefix + called
        within = ".".join(parts[3:])
        if parts[4:5] == ["experts"]:
            template = ".".join([*parts[3:5], "{e}", *parts[6:]])
            called = self.names.get(template, template).replace("{e}", parts[5])
        else:
            called = self.names.get(within, within)
        return f"{self.prefix}{self.family.layers.replace('{i}', parts[2])}.{called}"

    def _module(self, module: Module) -> None:
        owner, _, last = module.name.rpartition(".")
        fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}.get(last, "gate_up_proj")
        room = owner.split(".", 3)[-1]
        rows: tuple[tuple[int, int], ...] = ()
        stored = module.name
        if f"{room}.{fused}" in self.names and last in self._spans:
            rows, stored = self._spans[last], f"{owner}.{fused}"
        name = self._stored(stored)
        outputs = rows[-1][1] if rows else module.outputs
        transposed = self.family.transposed and not module.table and module.name != "lm_head"
        for tensor, shape in module.tensors().items():
            kind = tensor.rpartition(".")[2]
            flip = transposed and kind == "weight"
            self.locations[tensor] = Location((f"{name}.{kind}",), rows, flip)
            if rows:
                outputs = max(outputs, self.shapes.get(f"{name}.{kind}", (0, 0))[-1 if flip or kind == "bias" else 0])
                shape = (outputs, *shape[1:])
            self.shapes[f"{name}.{kind}"] = shape[::-1] if flip else shape

    def _norm(self, tensor: str, shape: tuple[int, ...]) -> None:
        name, _, kind = tensor.rpartition(".")
        stored, heads = f"{self._stored(name)}.{kind}", shape[0] // self.architecture.head_dim
        tensors: tuple[str, ...] = (stored,)
        if self.family.norm_heads and "self_attn" in name:
            size = (self.architecture.head_dim,)
            shape = size if self.family.norm_heads == "names" else (heads, *size)
            if self.family.norm_heads == "names":
                tensors = tuple(stored.replace("{h}", str(head)) for head in range(heads))
        self.locations[tensor] = Location(tensors, offset=self.family.gain_offset if kind == "weight" else 0.0)
        for one in tensors:
            self.shapes[one] = shape

    @classmethod
    def of(cls, family: Family, architecture: Architecture, names: Collection[str]) -> Self:
        """The layout of a checkpoint with these tensors: with whichever prefix and names they have.

        Raises InputError if these are fewer than layers.
        """
        _check_layers(architecture, names)
        variants = ({}, *family.variants)
        layouts = [cls(family, architecture, prefix, names) for prefix in family.prefixes for names in variants]
        return max(layouts, key=lambda layout: sum(name in names for name in layout.shapes))

    @cached_property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Stored tensor -> the canonical tensors that lie in it."""
        parts: dict[str, tuple[str, ...]] = {}
        for name, location in self.locations.items():
            for stored in location.tensors:
                parts[stored] = (*parts.get(stored, ()), name)
        return parts

    def ignores(self, name: str) -> bool:
        """Whether a stored tensor does not belong to the model: a buffer, the head of tied embeddings."""
        return name == self.tied_head or any(part in name for part in (*self.family.buffers, *self.family.beside))

    @cached_property
    def tied_head(self) -> str | None:
        """What the head of tied embeddings would be called."""
        return f"{self._stored('lm_head')}.weight" if self.architecture.tie_word_embeddings else None


def every() -> Iterator[Family]:
    """All families that are described, one module in families/ each."""
    for module in pkgutil.iter_modules(families.__path__):
        yield importlib.import_module(f"{families.__name__}.{module.name}").FAMILY


def find(config: Config) -> Family:
    """The family of a config.json. Raises InputError for a model_type that none describes, or that none can."""
    model_type = config.get("model_type")
    if (other := inexpressible.find(config)) is not None:
        raise InputError(other.refusal(config))
    known: list[str] = []
    for family in every():
        if model_type in family.model_types:
            return family
        known += family.model_types
    raise InputError(
        f"config.json: model_type: expected one of skipless, {', '.join(sorted(known))}; found {model_type!r}; another "
        f"is described by one file in skipless/checkpoint/families, as in docs/add-a-family.md"
    )


def family_of(config: Config) -> str | None:
    """What a config.json's family is called; None for a skipless model. Raises InputError as find does."""
    return None if config.get("model_type") == "skipless" else find(config).model_types[0]


def buffers(config: Config) -> tuple[str, ...]:
    """Parts of names of tensors that are no weights in this config's family; none if it is not described."""
    parts = (family.buffers for family in every() if config.get("model_type") in family.model_types)
    return next(parts, ())


def _check_layers(architecture: Architecture, names: Collection[str]) -> None:
    """Raise InputError, before anything is built of their number, for more layers than tensors."""
    if (layers := architecture.num_hidden_layers) > len(names):
        raise InputError(
            f"config.json: num_hidden_layers: expected at most {len(names)}, the number of tensors, found {layers}"
        )


def check(folder: Folder) -> Architecture:
    """What a model folder holds. Raises InputError if its config is none, or its tensors' headers contradict it."""
    if folder.config.get("model_type") != "skipless":
        return laid_out(folder).architecture
    architecture = Architecture.from_config(folder.config)
    _check_layers(architecture, folder.headers)
    folder.check(architecture.tensors(), architecture.index_tensors())
    return architecture


class Opened(Protocol):
    """A checkpoint whose config and headers have been read: a model folder, or a GGUF file."""

    @property
    def config(self) -> Config: ...

    @property
    def headers(self) -> Collection[str]: ...

    def check(self, expected: Mapping[str, tuple[int, ...]], *, ignores: Callable[[str], bool]) -> None:
        """Raise InputError for the first tensor that has another shape, is missing, or is none of these."""


def laid_out(opened: Opened) -> Layout:
    """Where a checkpoint of a family that is described has its tensors.

    Raises InputError if its config is none, or its tensors' headers contradict it.
    """
    family = find(opened.config)
    layout = family.layout(family.architecture(opened.config), opened.headers)
    opened.check(layout.shapes, ignores=layout.ignores)
    return layout


def read(config: Config) -> Architecture:
    """What a config.json describes, of whatever family. Raises InputError naming the field for what it cannot be."""
    if config.get("model_type") == "skipless":
        return Architecture.from_config(config)
    return find(config).architecture(config)

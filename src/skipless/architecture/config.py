"""A model's architecture as data: every dimension and switch, and from them every tensor of its checkpoint.

Names are those of a skipless config.json, for other people's models, too (checkpoint/families says what they call
them); in the comments d, D, e, f are hidden_size, heads * head_dim, kv_heads * head_dim and intermediate_size, and
Q, K, V, P, M, O as in arXiv:2404.12362.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, TypedDict

from skipless.dtypes import DTYPE_NAMES
from skipless.errors import InputError

# Every value that means something.
VALUES: dict[str, tuple[Any, ...]] = {
    "block_type": ("serial", "parallel"),
    "ffn_type": ("mlp", "glu", "moe"),
    "residual": ("none", "attention", "ffn", "both"),
    "norm_type": ("none", "rms", "layer"),
    "qk_norm": (None, "head_dim", "heads"),
    "position_type": ("rope", "rope_interleaved", "learned", "alibi", "none"),
    "attention_shaping": (None, "value", "full"),
    "stream_basis": (None, "q", "k", "v", "pivoted"),
    "rest_dtype": (None, "float32"),
}

# Fields of other people's models alone.
FOREIGN = frozenset(
    {"embedding_size", "dense_layers", "dense_intermediate_size", "qk_norm_bias", "partial_rotary_factor"}
)

# Fields that a skipless config.json may leave null: what they stand for then is this class's default.
NULLABLE = frozenset({"norms", "num_local_experts", "num_experts_per_tok"})

# Layers, and layers times experts: more is no model but a typing error, or an attack.
MOST_LAYERS = 2000
MOST_BLOCKS = 10**5

# Where a norm may stand, by its tensor's name (a layer's: less model.layers.{i}): on what Q, K, V read and on what M
# reads; on what P and O write; on the stream after P's and O's outputs joined it; on the embeddings; before the head.
NORMS = (
    "input_layernorm", "post_attention_layernorm", "attention_output_norm", "ffn_output_norm", "attention_stream_norm",
    "ffn_stream_norm", "model.embed_norm", "model.norm",
)  # fmt: skip
PRE_NORM = ("input_layernorm", "post_attention_layernorm", "model.norm")
AFTER_ATTENTION = ("attention_output_norm", "attention_stream_norm", "post_attention_layernorm")
OUTPUT_NORMS = ("attention_output_norm", "ffn_output_norm")
SKIPLESS_NORMS = (*PRE_NORM, "model.embed_norm", *OUTPUT_NORMS)

# Activations that are positively homogeneous: act(s x) = s^k act(x) for s > 0, with k = 2 for the last and 1 else.
HOMOGENEOUS = ("relu", "leaky_relu", "linear", "relu2")


class Bookkeeping(TypedDict, total=False):
    """The config.json fields that change neither tensors nor seams, with the types that transformers gives them.

    Those that a converter leaves there may only have the value that means nothing (the model file's `neutral`).
    """

    model_type: str
    architectures: list[str] | None
    auto_map: dict[str, Any]
    dtype: str | None
    torch_dtype: str | None
    transformers_version: str | None
    _name_or_path: str | None
    rope_parameters: dict[str, Any] | None
    sliding_window: int | None
    final_logit_softcapping: int | float | None
    logit_scale: int | float
    attention_multiplier: int | float | None
    use_cache: bool
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    initializer_range: int | float
    is_decoder: bool
    attention_dropout: int | float
    pretraining_tp: int
    rope_scaling: dict[str, Any] | None
    layer_types: list[str] | None
    use_sliding_window: bool
    return_dict: bool
    output_hidden_states: bool | None
    output_attentions: bool | None
    chunk_size_feed_forward: int
    is_encoder_decoder: bool
    id2label: dict[str, str] | None
    label2id: dict[str, int] | None
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification", None]
    tie_last_hidden_states: bool


BOOKKEEPING = Bookkeeping.__annotations__

# The shaped attention's gains, one per query head (arXiv:2311.01906).
GAINS: dict[str | None, tuple[str, ...]] = {None: (), "value": ("alpha", "beta"), "full": ("alpha", "beta", "gamma")}


@dataclass(frozen=True)
class Module:
    """An affine map of the checkpoint, y = x W + b with W (inputs, outputs); `table`: of whose rows one is looked up
    (embeddings); `diagonal`: W is diag(weight + offset) (a norm's gain).
    """

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    table: bool = False
    diagonal: bool = False
    offset: float = 0.0

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """As stored: a table (inputs, outputs), a linear layer (outputs, inputs), a diagonal (outputs,)."""
        if self.diagonal:
            return (self.outputs,)
        return (self.inputs, self.outputs) if self.table else (self.outputs, self.inputs)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> stored shape."""
        tensors: dict[str, tuple[int, ...]] = {f"{self.name}.weight": self.weight_shape}
        if self.bias:
            tensors[f"{self.name}.bias"] = (self.outputs,)
        return tensors


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Dimensions in elements; switches as in a skipless config.json, which documents them, and these (FOREIGN):

    embedding_size: width of the token table where it is not hidden_size, and two linear layers translate. Layers in
    dense_layers have one GLU, dense_intermediate_size wide, instead of experts. qk_norm: a norm of queries and keys,
    with one gain a dimension of a head, the same for all heads ("head_dim"), or one a dimension of each head ("heads").
    partial_rotary_factor: the part of each head that RoPE rotates in any layer; config.json has it in rope_parameters.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    embedding_size: int | None = None
    num_local_experts: int = 0  # no experts
    num_experts_per_tok: int = 0
    dense_layers: tuple[int, ...] = ()
    dense_intermediate_size: int | None = None
    max_position_embeddings: int = 4096
    position_offset: int = 0
    attention_bias: bool = False
    mlp_bias: bool = False
    gate_bias: bool = False
    qkv_bias: bool = False
    head_bias: bool = False
    tie_word_embeddings: bool = False
    block_type: str = "serial"
    ffn_type: str = "glu"
    residual: str = "none"
    norm_type: str = "none"
    norms: tuple[str, ...] = PRE_NORM
    norm_eps: float = 1e-6
    norms_removed: tuple[str, ...] = ()
    gains_removed: tuple[str, ...] = ()
    norm_bias: bool | None = None
    gain_offset: float | int = 0.0
    embedding_multiplier: float | int | None = None
    attn_logit_softcapping: float | int | None = None
    qk_norm: str | None = None
    qk_norm_bias: bool | None = None
    position_type: str = "rope"
    partial_rotary_factor: float = 1.0
    attention_shaping: str | None = None
    residual_gains: bool = False
    hidden_act: str = "silu"
    norm_topk_prob: bool = True
    stream_basis: str | None = None
    rest_dtype: str | None = None
    layers_open: tuple[int, ...] = ()
    p_removed: bool = False
    values_removed: bool = False
    keys_removed: bool = False
    head_removed: bool = False
    first_layer_removed: bool = False
    folded_biases: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a skipless config.json.

        Raises InputError naming the field for one that is missing, unknown, of the wrong type or out of range.
        """
        if (model_type := config.get("model_type")) != "skipless":
            raise InputError(
                f"config.json: model_type: expected 'skipless', found {model_type!r}; norms and skip connections "
                f"block the stream and P-M seams of other models; skipless audit says what could go"
            )
        fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in FOREIGN}
        for name in config:
            if name not in fields and name not in BOOKKEEPING:
                raise InputError(f"config.json: {name}: not a field of a skipless model; remove it if it means nothing")
        _check_bookkeeping(config)
        for name in ("dtype", "torch_dtype"):
            if (dtype := config.get(name)) not in (None, *DTYPE_NAMES):
                raise InputError(f"config.json: {name}: expected one of {', '.join(DTYPE_NAMES)}; found {dtype!r}")
        values = {
            name: config[name] for name in fields if name in config and not (name in NULLABLE and config[name] is None)
        }
        architecture = cls.from_values({**values, "partial_rotary_factor": rotated_part(config)})
        if beyond := [norm for norm in architecture.norms if norm not in SKIPLESS_NORMS]:
            raise InputError(
                f"config.json: norms: expected some of {', '.join(SKIPLESS_NORMS)}; found {beyond[0]!r}, not supported"
            )
        return architecture

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Check the values of fields; those for which there is a rule - num_key_value_heads, head_dim - may be absent.

        Raises InputError as from_config does.
        """
        values = dict(values)
        if values.get("num_key_value_heads") is None and "num_attention_heads" in values:
            values["num_key_value_heads"] = values["num_attention_heads"]
        for field in dataclasses.fields(cls):
            name = field.name
            if name == "head_dim" and values.get(name) is None:
                continue
            if name not in values:
                if field.default is dataclasses.MISSING:
                    raise InputError(f"config.json: {name}: expected a value, found none; add it")
                continue
            values[name] = _checked(name, field, values[name])
        if values.get("head_dim") is None:
            if values["hidden_size"] % values["num_attention_heads"]:
                raise InputError(
                    f"config.json: head_dim: expected a value, found none, and hidden_size {values['hidden_size']} is "
                    f"not a multiple of num_attention_heads {values['num_attention_heads']}; add it"
                )
            values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        return cls(**values)

    def __post_init__(self) -> None:
        for name, expected in VALUES.items():
            if (found := getattr(self, name)) not in expected:
                choices = ", ".join("null" if value is None else str(value) for value in expected)
                raise InputError(f"config.json: {name}: expected one of {choices}; found {found!r}, not supported")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config.json: num_key_value_heads: expected a divisor of num_attention_heads "
                f"({self.num_attention_heads}), found {self.num_key_value_heads}"
            )
        if self.num_hidden_layers * (1 + self.num_local_experts) > MOST_BLOCKS:
            raise InputError(
                f"config.json: num_hidden_layers: expected at most {MOST_BLOCKS:,} layers and experts, found "
                f"{self.num_hidden_layers} layers of {self.num_local_experts} experts"
            )
        if self.num_hidden_layers > MOST_LAYERS:
            raise InputError(
                f"config.json: num_hidden_layers: expected at most {MOST_LAYERS:,}, found {self.num_hidden_layers:,}"
            )
        if self.ffn_type == "moe" and not self.num_local_experts:
            raise InputError("config.json: num_local_experts: expected a positive number with ffn_type 'moe', found 0")
        if self.ffn_type == "moe" and not 0 < self.num_experts_per_tok <= self.num_local_experts:
            raise InputError(
                f"config.json: num_experts_per_tok: expected 1..{self.num_local_experts}, the number of experts, found "
                f"{self.num_experts_per_tok}"
            )
        if self.stream_basis == "pivoted":
            if self.rest_width < 0:
                raise InputError(
                    f"config.json: stream_basis: 'pivoted' needs at least hidden_size ({self.hidden_size}) outputs of "
                    f"{', '.join(self.pivoted)}_proj together, found {sum(self.pivoted.values())}"
                )
        elif self.stream_basis is not None and self.projections[self.stream_basis] != self.hidden_size:
            raise InputError(
                f"config.json: stream_basis: {self.stream_basis!r} needs a square {self.stream_basis}_proj, but it is "
                f"({self.projections[self.stream_basis]}, {self.hidden_size})"
            )
        if self.rest_dtype is not None and self.stream_basis != "pivoted":
            raise InputError(
                f"config.json: rest_dtype: expected null with stream_basis {self.stream_basis!r}, which has no "
                f"rest_proj; found {self.rest_dtype!r}"
            )
        for layer in self.layers_open:
            if not 0 <= layer < self.num_hidden_layers:
                raise InputError(
                    f"config.json: layers_open: expected layers 0..{self.num_hidden_layers - 1}, found {layer}"
                )
        if self.block_type == "parallel" and self.residual in ("attention", "ffn"):
            raise InputError(
                f"config.json: residual: expected 'none' or 'both' with block_type 'parallel', where one skip passes "
                f"both; found {self.residual!r}"
            )
        if self.p_removed and self.query_width < self.hidden_size and not self.p_merged:
            raise InputError(
                f"config.json: p_removed: expected heads * head_dim of at least hidden_size ({self.hidden_size}), "
                f"since the heads are added to the stream or normalized as they are; found {self.query_width}"
            )
        if self.values_removed and (self.stream_basis == "v" or self.head_dim >= self.hidden_size):
            raise InputError(
                f"config.json: values_removed: expected a v_proj with more than head_dim ({self.head_dim}) inputs, "
                f"found {self.hidden_size} and stream_basis {self.stream_basis!r}"
            )
        if self.keys_removed and (reason := self.keys_stay):
            raise InputError(f"config.json: keys_removed: expected false, found true with {reason}")
        if self.head_removed and (self.tie_word_embeddings or self.vocab_size <= self.hidden_size):
            raise InputError(
                f"config.json: head_removed: expected an untied lm_head of more than hidden_size ({self.hidden_size}) "
                f"outputs, found {self.vocab_size}{' tied' * self.tie_word_embeddings}"
            )
        if self.first_layer_removed and (reason := self.first_layer_stays):
            raise InputError(f"config.json: first_layer_removed: expected false, found true with {reason}")
        if self.first_layer_removed and self.first_layer_norms:
            raise InputError(
                f"config.json: norms_removed: expected {self.first_layer_norms[0]}, which first_layer_removed has "
                f"applied to the table, found none"
            )
        if self.head_bias and (self.tie_word_embeddings or self.head_removed):
            raise InputError(
                "config.json: head_bias: expected false where lm_head is the table of the embeddings, or logits are "
                "the stream itself, found true"
            )
        if len(set(self.norms)) < len(self.norms):
            raise InputError(f"config.json: norms: expected each norm once, found {', '.join(self.norms)}")
        norms = set(self.norm_names())
        for field, names in (("norms_removed", self.norms_removed), ("gains_removed", self.gains_removed)):
            for name in names:
                if name not in norms:
                    raise InputError(f"config.json: {field}: expected names of norms of this model, found {name!r}")
        known = {module.name for module in self.modules()} if self.folded_biases else set()
        for name in self.folded_biases:
            if name not in known:
                raise InputError(f"config.json: folded_biases: expected names of modules of this model, found {name!r}")

    @property
    def query_width(self) -> int:
        """D = heads * head_dim, the width of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def rotated(self) -> int:
        """How many dimensions of each head RoPE rotates, the first, in pairs; 0 without RoPE."""
        part = min(self.partial_rotary_factor, 1.0) if self.position_type.startswith("rope") else 0.0
        whole = int(self.head_dim * part)
        return min(whole + whole % 2, self.head_dim)

    @property
    def unrotated(self) -> int:
        """The others."""
        return self.head_dim - self.rotated

    @property
    def value_width(self) -> int:
        """E = kv_heads * head_dim, the width of K's and V's outputs."""
        return self.num_key_value_heads * self.head_dim

    @property
    def qkv_biased(self) -> bool:
        """Whether Q, K and V have biases."""
        return self.attention_bias or self.qkv_bias

    @property
    def norms_biased(self) -> bool:
        """Whether norms have biases, those of queries and keys aside."""
        return self.norm_type == "layer" if self.norm_bias is None else self.norm_bias

    @property
    def positions(self) -> int:
        """Rows of a table of learned positions."""
        return self.max_position_embeddings + self.position_offset

    @property
    def own_state(self) -> int:
        """How many of hidden_size dimensions of a token's own state a layer without skips passes on at most.

        That is without what it attends to: a serial layer passes on what V keeps, a parallel one all, by its FFN.
        """
        return self.hidden_size if self.block_type == "parallel" else min(self.hidden_size, self.value_width)

    @property
    def projections(self) -> dict[str, int]:
        """Output widths of Q, K and V."""
        return {"q": self.query_width, "k": self.value_width, "v": self.value_width}

    @property
    def pivoted(self) -> dict[str, int]:
        """Output widths of the projections whose columns pivoting picks; not V, where values_removed takes its own."""
        return {name: width for name, width in self.projections.items() if not (name == "v" and self.values_removed)}

    @property
    def rest_width(self) -> int:
        """The columns of those that are left where pivoting turns d of them into the identity: r = D + 2 e - d."""
        return sum(self.pivoted.values()) - self.hidden_size

    @cached_property
    def p_alone(self) -> bool:
        """Whether nothing but the FFN's input matrices reads P's output, and nothing stands between."""
        joined = self.block_type == "parallel" or self.residual != "none"
        return not joined and not any(self.norms_after_attention(layer) for layer in range(self.num_hidden_layers))

    @cached_property
    def p_fits(self) -> bool:
        """Whether merging P into what reads it saves more than making d of its rows the identity, by their widths.

        Where P is wider than the stream (D > d), merging widens its readers, of F outputs together: it saves
        d D - (D - d) F, the rows d^2.
        """
        narrow = self.hidden_size > min(self.ffn_read_width(layer) for layer in range(self.num_hidden_layers))
        return self.query_width <= self.hidden_size or narrow

    @property
    def p_merged(self) -> bool:
        """Whether P goes by merging it into what reads it alone; else d of its rows become the identity."""
        return self.p_alone and self.p_fits

    @property
    def p_rows(self) -> int:
        """Rows of P that stay once d of them have become the identity, D - d; 0 where P is merged."""
        return 0 if self.p_merged else self.query_width - self.hidden_size

    def ffn_read_width(self, layer: int) -> int:
        """F, the outputs of everything that reads the FFN's input."""
        routed = self.has_experts(layer)
        matrices = len(self.ffn_readers(layer)) - routed
        return matrices * self.ffn_width(layer) + routed * self.num_local_experts

    @cached_property
    def row(self) -> dict[str, int]:
        """What a row of the token table holds, part -> width: the embedding, "x".

        With first_layer_removed, it is what layer 0 makes of the embedding before any attention.
        That is the stream, if a skip or a closed seam takes it as it is, then what each projection of layer 0 gives
        ("q", "k", "v", "rest"), and, of a parallel layer, all that is added to its attention: skip and FFN ("beside").
        """
        if not self.first_layer_removed:
            return {"x": self.embedding_size or self.hidden_size}
        basis, parallel = self.stream_basis if self.stream_closed(0) else None, self.block_type == "parallel"
        skip = not parallel and self.residual in ("attention", "both")
        parts = {"x": self.hidden_size} if skip or basis else {}
        if basis == "pivoted" and self.rest_width:
            parts["rest"] = self.rest_width
        gone = self.pivoted if basis == "pivoted" else (basis,)
        parts |= {name: width for name, width in self.projections.items() if name not in gone}
        return parts | ({"beside": self.hidden_size} if parallel else {})

    @property
    def first_layer_stays(self) -> str | None:
        """What stands in the way of precomputing layer 0, or None."""
        if self.keys_removed:
            return "keys_removed: Q and K of layer 0 are in a basis of their own"
        if self.position_type == "learned":
            return "position_type 'learned': positions are added to the embedding before Q, K and V read it"
        if self.tie_word_embeddings:
            return (
                "tie_word_embeddings: the head reads the table of the embeddings, which would have to be stored beside "
                "the other one"
            )
        if self.embedding_size:
            return "embedding_size: project_in stands between the table and layer 0"
        if self.embedding_multiplier is not None:
            return "embedding_multiplier: rows of the table would be multiplied by it, with all that they hold"
        if self.block_type == "parallel" and self.has_norm("model.layers.0.ffn_output_norm"):
            return "ffn_output_norm: a norm of what the FFN gives is not in the table"
        return None

    @property
    def keys_stay(self) -> str | None:
        """What stands between Q and K, or in the way of their losing a block, or None."""
        if not self.unrotated:
            return f"position_type {self.position_type!r}: queries and keys are rotated"
        if self.qk_norm:
            return f"qk_norm {self.qk_norm!r}: queries and keys are normalized"
        biased = self.qkv_biased or any(name.endswith(".k_proj") for name in self.folded_biases)
        if self.attn_logit_softcapping and biased:
            return "attn_logit_softcapping: what a bias of K adds to all of a query's scores is capped with them"
        if self.stream_basis:
            return f"stream_basis {self.stream_basis!r}: of Q, K and V hidden_size^2 weights are gone"
        if self.first_layer_removed:
            return "first_layer_removed: the table holds layer 0's queries and keys as they were"
        if self.unrotated >= self.hidden_size:
            return f"head_dim {self.head_dim}: k_proj has at most {self.hidden_size} inputs, and none would be left"
        return None

    @property
    def first_layer_norms(self) -> tuple[str, ...]:
        """The norms that precomputing layer 0 applies to its table."""
        parallel = ("model.layers.0.post_attention_layernorm",) if self.block_type == "parallel" else ()
        names = ("model.embed_norm", "model.layers.0.input_layernorm", *parallel)
        return tuple(name for name in names if self.has_norm(name))

    def looked_up(self, layer: int) -> bool:
        """Whether what this layer makes of a token before any attention is in the table."""
        return self.first_layer_removed and layer == 0

    def stream_closed(self, layer: int) -> bool:
        """Whether the stream seam before this layer has been closed."""
        return self.stream_basis is not None and layer not in self._layers_open

    @cached_property
    def _layers_open(self) -> frozenset[int]:
        return frozenset(self.layers_open)

    @property
    def expressible(self) -> bool:
        """Whether a skipless config.json can say it: without projected embeddings, layer norms of queries and keys, or
        layers of different kinds.
        """
        own = self.qk_norm is not None and self.norm_type == "layer" and (self.qk_norm == "heads" or self.qk_norm_bias)
        return not (self.embedding_size or own or self.dense_layers)

    def skipless(self) -> Self:
        """The same architecture without skips and norms; a norm of queries and keys may stay, it blocks no seam."""
        return dataclasses.replace(self, residual="none", norm_type="none", norms_removed=(), gains_removed=())

    def given(self) -> dict[str, Any]:
        """Its fields as a config.json has them, those at their default left out."""
        fields = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, (value, default) in fields.items()
            if value != default
        }

    def unfused(self) -> Self:
        """The same architecture before anything was removed from it."""
        return dataclasses.replace(
            self,
            stream_basis=None,
            rest_dtype=None,
            layers_open=(),
            p_removed=False,
            values_removed=False,
            keys_removed=False,
            head_removed=False,
            first_layer_removed=False,
            norms_removed=(),
            gains_removed=(),
            folded_biases=(),
        )

    def has_experts(self, layer: int) -> bool:
        """Whether this layer's FFN consists of experts."""
        return self.ffn_type == "moe" and layer not in self._dense_layers

    @cached_property
    def _dense_layers(self) -> frozenset[int]:
        return frozenset(self.dense_layers)

    def experts(self, layer: int) -> tuple[str, ...]:
        """Names of this layer's FFNs: one, or its experts."""
        mlp = f"model.layers.{layer}.mlp"
        return tuple(f"{mlp}.experts.{e}" for e in range(self.num_local_experts)) if self.has_experts(layer) else (mlp,)

    def ffn_width(self, layer: int) -> int:
        """f, of this layer."""
        if self.ffn_type == "moe" and not self.has_experts(layer):
            return self.dense_intermediate_size or self.intermediate_size
        return self.intermediate_size

    def ffn_readers(self, layer: int) -> tuple[str, ...]:
        """Names of the modules that read the FFN's input: the router, gates and up projections."""
        router = (f"model.layers.{layer}.mlp.router",) if self.has_experts(layer) else ()
        inputs = ("up_proj",) if self.ffn_type == "mlp" else ("gate_proj", "up_proj")
        return (*router, *(f"{ffn}.{name}" for ffn in self.experts(layer) for name in inputs))

    def modules(self) -> list[Module]:
        """Every affine map of the checkpoint, in the order of computation."""
        d = self.hidden_size
        table = self.embedding_size or d
        modules = [Module("model.embed_tokens", self.vocab_size, sum(self.row.values()), table=True)]
        if self.position_type == "learned":
            modules.append(Module("model.position_embeddings", self.positions, d, table=True))
        if table != d:
            modules.append(Module("model.project_in", table, d))
        for layer in range(self.num_hidden_layers):
            modules += self.layer_modules(layer)
        if table != d:
            modules.append(Module("model.project_out", d, table))
        if not self.tie_word_embeddings:
            rows = self.vocab_size - self.head_removed * d
            modules.append(Module("lm_head", table, rows, self.head_bias))
        folded = set(self.folded_biases)
        return [dataclasses.replace(module, bias=True) if module.name in folded else module for module in modules]

    def layer_modules(self, layer: int) -> list[Module]:
        """The affine maps of a layer, but for its norms, in the order of computation."""
        modules, d, f = [], self.hidden_size, self.ffn_width(layer)
        attention = f"model.layers.{layer}.self_attn"
        pivoted = self.stream_closed(layer) and self.stream_basis == "pivoted"
        looked_up = self.looked_up(layer)
        if pivoted and self.rest_width and not looked_up:
            modules.append(Module(f"{attention}.rest_proj", d, self.rest_width, self.qkv_biased))
        for name, width in self.projections.items() if not looked_up else ():
            if not ((pivoted and name in self.pivoted) or (self.stream_closed(layer) and name == self.stream_basis)):
                # a block less of each head's, and its bias has moved on, or cancels
                fewer = {"v": self.values_removed * self.head_dim, "k": self.keys_removed * self.unrotated}.get(name, 0)
                outputs = self.num_key_value_heads * fewer or width
                modules.append(Module(f"{attention}.{name}_proj", d - fewer, outputs, self.qkv_biased and not fewer))
                if outputs < width:
                    modules.append(Module(f"{attention}.k_rope_proj", d, width - outputs, self.qkv_biased))
        p_rows = self.p_rows if self.p_removed else self.query_width
        if p_rows:
            modules.append(Module(f"{attention}.o_proj", p_rows, d, self.attention_bias))
        if looked_up and self.block_type == "parallel":
            return modules
        ffn_inputs = self.query_width if self.p_removed and self.p_merged else d
        if self.has_experts(layer):
            modules.append(Module(f"model.layers.{layer}.mlp.router", ffn_inputs, self.num_local_experts))
        for ffn in self.experts(layer):
            if self.ffn_type != "mlp":
                modules.append(Module(f"{ffn}.gate_proj", ffn_inputs, f, self.mlp_bias or self.gate_bias))
            modules.append(Module(f"{ffn}.up_proj", ffn_inputs, f, self.mlp_bias))
            modules.append(Module(f"{ffn}.down_proj", f, d, self.mlp_bias))
        return modules

    def norm_names(self) -> tuple[str, ...]:
        """Names of the norms on the stream and beside it, those that have been folded away included."""
        if self.norm_type == "none":
            return ()
        layers = [f"model.layers.{layer}." for layer in range(self.num_hidden_layers)]
        return tuple(
            name
            for norm in self.norms
            for name in ([norm] if norm.startswith("model.") else [layer + norm for layer in layers])
        )

    def has_norm(self, name: str) -> bool:
        """Whether the norm of this name is there and acts."""
        prefix, _, norm = name.rpartition(".")
        here = name in self.norms if prefix == "model" else norm in self.norms
        return self.norm_type != "none" and here and name not in self._norms_removed

    @cached_property
    def _norms_removed(self) -> frozenset[str]:
        return frozenset(self.norms_removed)

    def norms_after_attention(self, layer: int) -> list[str]:
        """Norms between a serial layer's P and M."""
        names = [f"model.layers.{layer}.{norm}" for norm in AFTER_ATTENTION]
        return [name for name in names if self.has_norm(name)]

    def norm_modules(self) -> list[Module]:
        """Gains and biases of the norms, those of queries and keys included, as diagonal maps."""
        d = self.hidden_size
        gone = {*self.norms_removed, *self.gains_removed}
        modules = [
            Module(name, d, d, self.norms_biased, diagonal=True, offset=float(self.gain_offset))
            for name in self.norm_names()
            if name not in gone
        ]
        widths = {"q": self.query_width, "k": self.value_width} if self.qk_norm else {}
        for letter, width in widths.items():
            size = self.head_dim if self.qk_norm == "head_dim" else width
            for layer in range(self.num_hidden_layers):
                name = f"model.layers.{layer}.self_attn.{letter}_norm"
                modules.append(Module(name, size, size, bool(self.qk_norm_bias), diagonal=True))
        return modules

    def norm_tensors(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the norms: name -> shape."""
        return {name: shape for module in self.norm_modules() for name, shape in module.tensors().items()}

    def gain_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """A layer's trainable gains, of shaped attention, branches and skips (arXiv:2311.01906): name -> shape."""
        name = f"model.layers.{layer}"
        shapes: dict[str, tuple[int, ...]] = {
            f"{name}.self_attn.{gain}": (self.num_attention_heads,) for gain in GAINS[self.attention_shaping]
        }
        if self.residual_gains:
            skips = {"none": (), "attention": ("attention",), "ffn": ("ffn",), "both": ("attention", "ffn")}
            if self.block_type == "parallel":  # where one skip passes both
                skips["both"] = ("attention",)
            gains = ("attention_gain", "ffn_gain", *(f"{skip}_skip_gain" for skip in skips[self.residual]))
            if self.looked_up(layer) and self.block_type == "parallel":
                gains = ("attention_gain",)
            shapes |= {f"{name}.{gain}": (1,) for gain in gains}
        return shapes

    def index_tensors(self) -> dict[str, tuple[int, ...]]:
        """The tensors that are int32 indices and not weights: name -> shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.num_hidden_layers):
            attention = f"model.layers.{layer}.self_attn"
            if self.stream_basis == "pivoted" and self.stream_closed(layer):
                shapes[f"{attention}.column_order"] = (sum(self.pivoted.values()),)
            if self.values_removed and not self.looked_up(layer):
                shapes[f"{attention}.value_order"] = (self.num_key_value_heads, self.head_dim)
            if self.keys_removed:
                shapes[f"{attention}.key_order"] = (self.num_key_value_heads, self.unrotated)
            if self.p_removed and self.p_rows:
                shapes[f"{attention}.row_order"] = (self.query_width,)
        if self.head_removed:
            shapes["lm_head.column_order"] = (self.vocab_size,)
        return shapes

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, weights and indices: name -> stored shape."""
        tensors = {name: shape for module in self.modules() for name, shape in module.tensors().items()}
        for layer in range(self.num_hidden_layers):
            tensors |= self.gain_tensors(layer)
        return tensors | self.norm_tensors() | self.index_tensors()


def rotated_part(config: Mapping[str, Any], default: float = 1.0) -> Any:
    """The largest partial_rotary_factor of a config.json's RoPE, of which there may be one for each kind of layers."""
    parameters = config.get("rope_parameters")
    parameters = parameters if isinstance(parameters, Mapping) else {}
    own = [each for each in parameters.values() if isinstance(each, Mapping)] or [parameters]
    found: list[Any] = [each.get("partial_rotary_factor") for each in own]
    parts = [default if part is None else part for part in found]
    wrong = [part for part in parts if type(part) not in (int, float)]
    return wrong[0] if wrong else max(parts)


def _check_bookkeeping(config: Mapping[str, Any]) -> None:
    """Raise InputError for a field of Bookkeeping that is none."""
    # here: what counts another family's weights should not wait for it
    from huggingface_hub.dataclasses import StrictDataclassFieldValidationError, validate_typed_dict

    for name in config.keys() & BOOKKEEPING.keys():
        try:
            validate_typed_dict(Bookkeeping, {name: config[name]})  # type: ignore[type-var]
        except StrictDataclassFieldValidationError:
            expected = BOOKKEEPING[name]
            kind = expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")
            raise InputError(f"config.json: {name}: expected {kind}, found {config[name]!r}; correct it") from None


def _checked(name: str, field: "dataclasses.Field[Any]", value: Any) -> Any:
    """A config value of the field's type and range, or InputError. Lists become tuples."""
    expected = field.type
    if expected is int or (expected == int | None and value is not None):
        if type(value) is not int or not (0 < value < 2**31 or value == field.default == 0):
            raise InputError(f"config.json: {name}: expected a positive integer below 2^31, found {value!r}")
    elif expected is float:
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise InputError(f"config.json: {name}: expected a number from 0 on, found {value!r}")
    elif expected in (float | int, float | int | None):
        if type(value) not in (int, float) and not (value is None and expected == float | int | None):
            raise InputError(f"config.json: {name}: expected a number, found {value!r}")
        if value is not None and not -math.inf < value < math.inf:
            raise InputError(f"config.json: {name}: expected a finite number, found {value!r}")
    elif expected is str and name not in VALUES:
        if type(value) is not str or not re.fullmatch(r"\w{1,64}", value, re.ASCII):
            raise InputError(f"config.json: {name}: expected a name, found {value!r}")
    elif expected is bool or (expected == bool | None and value is not None):
        if type(value) is not bool:
            raise InputError(f"config.json: {name}: expected true or false, found {value!r}")
    elif expected in (tuple[int, ...], tuple[str, ...]):
        kind = int if expected == tuple[int, ...] else str
        if value is None:
            return ()
        if type(value) not in (list, tuple) or any(type(item) is not kind for item in value):
            raise InputError(f"config.json: {name}: expected a list of {kind.__name__}, found {value!r}")
        return tuple(value)
    return value

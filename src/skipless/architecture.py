"""A model's architecture as data: every dimension and switch, and from them every tensor of its checkpoint.

Names are those of a skipless config.json, for other people's models, too (checkpoint/families says what they call
them); in the comments d, D, e, f are hidden_size, heads * head_dim, kv_heads * head_dim and intermediate_size, and
Q, K, V, P, M, O as in arXiv:2404.12362.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

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
    "values_removed": (False,),
    "head_removed": (False,),
}

# What a skipless checkpoint cannot be yet: the model file does not run it, and fuse does not write it.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "block_type": ("parallel",),
    "ffn_type": ("moe",),
    "position_type": ("alibi",),
}

# Fields of other people's models alone.
FOREIGN = frozenset(
    {
        "embedding_size", "qkv_bias", "head_bias", "num_local_experts", "num_experts_per_tok", "dense_layers",
        "dense_intermediate_size", "norms", "norm_bias", "qk_norm", "qk_norm_bias",
    }
)  # fmt: skip

# Layers times experts: more is no model but a typing error, or an attack.
MOST_BLOCKS = 10**5

# Where a norm may stand, by its tensor's name (a layer's: less model.layers.{i}): on what Q, K, V read and on what M
# reads; on what P and O write; on the stream after P's and O's outputs joined it; on the embeddings; before the head.
NORMS = (
    "input_layernorm", "post_attention_layernorm", "attention_output_norm", "ffn_output_norm", "attention_stream_norm",
    "ffn_stream_norm", "model.embed_norm", "model.norm",
)  # fmt: skip
PRE_NORM = ("input_layernorm", "post_attention_layernorm", "model.norm")

# config.json fields that change neither the tensors nor the seams.
BOOKKEEPING = frozenset(
    {
        "model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
        "hidden_act", "rope_parameters", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
        "initializer_range", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward",
        "is_encoder_decoder", "id2label", "label2id", "problem_type", "tie_last_hidden_states",
    }
)  # fmt: skip

# The shaped attention's gains, one per query head (arXiv:2311.01906).
GAINS: dict[str | None, tuple[str, ...]] = {None: (), "value": ("alpha", "beta"), "full": ("alpha", "beta", "gamma")}


@dataclass(frozen=True)
class Module:
    """An affine map of the checkpoint, y = x W + b with W (inputs, outputs), or a table of W's rows (embeddings)."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    table: bool = False

    @property
    def weight_shape(self) -> tuple[int, int]:
        """As stored: a table (inputs, outputs), a linear layer (outputs, inputs)."""
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

    embedding_size: width of the token table where it is not hidden_size, and two linear layers translate. qkv_bias,
    head_bias: q, k, v_proj, lm_head have a bias (q, k, v_proj also if attention_bias is true). num_local_experts,
    num_experts_per_tok: of ffn_type "moe"; layers in dense_layers have one GLU, dense_intermediate_size wide, instead.
    norms: which of NORMS there are; norm_bias: whether they have a bias; qk_norm: a norm of queries and keys, with one
    gain a dimension of a head, the same for all heads ("head_dim"), or one a dimension of each head ("heads").
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
    norm_bias: bool | None = None
    qk_norm: str | None = None
    qk_norm_bias: bool | None = None
    position_type: str = "rope"
    attention_shaping: str | None = None
    stream_basis: str | None = None
    rest_dtype: str | None = None
    layers_open: tuple[int, ...] = ()
    p_removed: bool = False
    values_removed: bool = False
    head_removed: bool = False
    folded_biases: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a skipless config.json.

        Raises InputError naming the field for one that is missing, unknown, of the wrong type or out of range.
        """
        if (model_type := config.get("model_type")) != "skipless":
            raise InputError(
                f"config.json: model_type: expected 'skipless', found {model_type!r}; only skipless checkpoints can be "
                f"rewritten: norms and skip connections block the stream and P-M seams of other models; skipless audit "
                f"says what could go"
            )
        fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in FOREIGN}
        for name in config:
            if name not in fields and name not in BOOKKEEPING:
                raise InputError(f"config.json: {name}: not a field of a skipless model; remove it if it means nothing")
        values = {name: config[name] for name in fields if name in config}
        for name, unsupported in UNSUPPORTED.items():
            if values.get(name) in unsupported:
                raise InputError(
                    f"config.json: {name}: expected one of "
                    f"{', '.join(value for value in VALUES[name] if value not in unsupported)}; found "
                    f"{values[name]!r}, not supported"
                )
        return cls.from_values(values)

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
        if self.ffn_type == "moe" and not 0 < self.num_experts_per_tok <= self.num_local_experts:
            raise InputError(
                f"config.json: num_experts_per_tok: expected 1..{self.num_local_experts}, the number of experts, found "
                f"{self.num_experts_per_tok}"
            )
        if self.stream_basis == "pivoted":
            if self.rest_width < 0:
                raise InputError(
                    f"config.json: stream_basis: 'pivoted' needs at least hidden_size ({self.hidden_size}) outputs of "
                    f"q, k and v_proj together, found {sum(self.projections.values())}"
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
        known = {module.name for module in self.modules()} if self.folded_biases else set()
        for name in self.folded_biases:
            if name not in known:
                raise InputError(f"config.json: folded_biases: expected names of modules of this model, found {name!r}")

    @property
    def query_width(self) -> int:
        """D = heads * head_dim, the width of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """E = kv_heads * head_dim, the width of K's and V's outputs."""
        return self.num_key_value_heads * self.head_dim

    @property
    def projections(self) -> dict[str, int]:
        """Output widths of Q, K and V."""
        return {"q": self.query_width, "k": self.value_width, "v": self.value_width}

    @property
    def rest_width(self) -> int:
        """Columns of [Q|K|V] beyond the hidden_size ones that pivoting turns into the identity: D + 2 e - d."""
        return sum(self.projections.values()) - self.hidden_size

    def stream_closed(self, layer: int) -> bool:
        """Whether the stream seam before this layer has been closed."""
        return self.stream_basis is not None and layer not in self.layers_open

    def skipless(self) -> Self:
        """The same architecture without skips and norms; a norm of queries and keys may stay, it blocks no seam."""
        return dataclasses.replace(self, residual="none", norm_type="none")

    def has_experts(self, layer: int) -> bool:
        """Whether this layer's FFN consists of experts."""
        return self.ffn_type == "moe" and layer not in self.dense_layers

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
        modules = [Module("model.embed_tokens", self.vocab_size, table, table=True)]
        if self.position_type == "learned":
            modules.append(Module("model.position_embeddings", self.max_position_embeddings, d, table=True))
        if table != d:
            modules.append(Module("model.project_in", table, d))
        for layer in range(self.num_hidden_layers):
            modules += self._layer(layer)
        if table != d:
            modules.append(Module("model.project_out", d, table))
        if not self.tie_word_embeddings:
            modules.append(Module("lm_head", table, self.vocab_size, self.head_bias))
        return [
            dataclasses.replace(module, bias=True) if module.name in self.folded_biases else module
            for module in modules
        ]

    def _layer(self, layer: int) -> list[Module]:
        modules, d, f = [], self.hidden_size, self.ffn_width(layer)
        attention = f"model.layers.{layer}.self_attn"
        qkv_bias = self.attention_bias or self.qkv_bias
        pivoted = self.stream_closed(layer) and self.stream_basis == "pivoted"
        if pivoted and self.rest_width:
            modules.append(Module(f"{attention}.rest_proj", d, self.rest_width, qkv_bias))
        for name, width in self.projections.items():
            if not (pivoted or (self.stream_closed(layer) and name == self.stream_basis)):
                modules.append(Module(f"{attention}.{name}_proj", d, width, qkv_bias))
        if not self.p_removed:
            modules.append(Module(f"{attention}.o_proj", self.query_width, d, self.attention_bias))
        ffn_inputs = self.query_width if self.p_removed else d
        if self.has_experts(layer):
            modules.append(Module(f"model.layers.{layer}.mlp.router", ffn_inputs, self.num_local_experts))
        for ffn in self.experts(layer):
            if self.ffn_type != "mlp":
                modules.append(Module(f"{ffn}.gate_proj", ffn_inputs, f, self.mlp_bias or self.gate_bias))
            modules.append(Module(f"{ffn}.up_proj", ffn_inputs, f, self.mlp_bias))
            modules.append(Module(f"{ffn}.down_proj", f, d, self.mlp_bias))
        return modules

    def norm_tensors(self) -> dict[str, tuple[int, ...]]:
        """Gains and biases of the norms, those of queries and keys included: name -> shape."""
        found: dict[str, tuple[int, ...]] = {}
        layers = [f"model.layers.{layer}." for layer in range(self.num_hidden_layers)]
        widths = {"q": self.query_width, "k": self.value_width} if self.qk_norm else {}

        def add(name: str, width: int, bias: bool) -> None:
            found[f"{name}.weight"] = (width,)
            if bias:
                found[f"{name}.bias"] = (width,)

        if self.norm_type != "none":
            biased = self.norm_type == "layer" if self.norm_bias is None else self.norm_bias
            for norm in self.norms:
                for name in [norm] if norm.startswith("model.") else [layer + norm for layer in layers]:
                    add(name, self.hidden_size, biased)
        for letter, width in widths.items():
            for layer_name in layers:
                size = self.head_dim if self.qk_norm == "head_dim" else width
                add(f"{layer_name}self_attn.{letter}_norm", size, bool(self.qk_norm_bias))
        return found

    def index_tensors(self) -> dict[str, tuple[int, ...]]:
        """The tensors that are int32 indices and not weights: name -> shape."""
        if self.stream_basis != "pivoted":
            return {}
        return {
            f"model.layers.{layer}.self_attn.column_order": (sum(self.projections.values()),)
            for layer in range(self.num_hidden_layers)
            if self.stream_closed(layer)
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, weights and indices: name -> stored shape."""
        tensors = {name: shape for module in self.modules() for name, shape in module.tensors().items()}
        for layer in range(self.num_hidden_layers):
            for gain in GAINS[self.attention_shaping]:
                tensors[f"model.layers.{layer}.self_attn.{gain}"] = (self.num_attention_heads,)
        return tensors | self.norm_tensors() | self.index_tensors()


def _checked(name: str, field: "dataclasses.Field[Any]", value: Any) -> Any:
    """A config value of the field's type and range, or InputError. Lists become tuples."""
    expected = field.type
    if expected is int or (expected == int | None and value is not None):
        if type(value) is not int or not 0 < value < 2**31:
            raise InputError(f"config.json: {name}: expected a positive integer below 2^31, found {value!r}")
    elif expected is bool:
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

"""The configuration of a skipless model: what the layers compute, and which seams have been closed.

This file and modeling_skipless.py are self-contained: `skipless fuse` copies both beside every model it writes, so
that the model also loads where this library is not installed (`trust_remote_code=True`).
"""

import re
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig

# What modeling_skipless.py computes. Everything else is refused by name, never ignored.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "block_type": ("serial", "parallel"),
    "ffn_type": ("mlp", "glu", "moe"),
    "residual": ("none", "attention", "ffn", "both"),
    "norm_type": ("none", "rms", "layer"),
    "qk_norm": (None, "head_dim", "heads"),
    "position_type": ("rope", "rope_interleaved", "learned", "alibi", "none"),
    "attention_shaping": (None, "value", "full"),
    "stream_basis": (None, "q", "k", "v", "pivoted"),
    "rest_dtype": (None, "float32"),
    "is_encoder_decoder": (False,),
    "return_dict": (True,),
}

# The types of RoPE that transformers computes (ROPE_INIT_FUNCTIONS), and parameters of each beside rope_theta and
# partial_rotary_factor: those that it needs, and those that it may have.
ROPE_PARAMETERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"), ("factor", "attention_factor"),
    ),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
}  # fmt: skip
# Those whose angles depend on how long the sequence is.
ROPE_BY_LENGTH = ("dynamic", "longrope")

# Where a norm may stand: on what Q, K, V read, on what M reads, on what P and on what O gives, on the embeddings and
# before the head.
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm", "attention_output_norm", "ffn_output_norm")
MODEL_NORMS = ("model.norm", "model.embed_norm")
PRE_NORM = (*LAYER_NORMS[:2], "model.norm")

# Factors that must be positive.
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier")

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "num_local_experts", "num_experts_per_tok",
    "sliding_window",
)  # fmt: skip

# Fields transformers writes into or passes through a config that change no arithmetic of the model's own.
BOOKKEEPING = frozenset(
    {
        "model_type", "auto_map", "torch_dtype", "name_or_path", "_name_or_path", "_commit_hash", "num_labels",
        "attn_implementation", "_attn_implementation", "experts_implementation", "output_attentions",
        "quantization_config", "initializer_range",
    }
)  # fmt: skip
# Fields of other models that converters leave: this one has no use for them, so they may say nothing.
NEUTRAL = frozenset(
    {"attention_dropout", "is_decoder", "layer_types", "pretraining_tp", "rope_scaling", "use_sliding_window"}
)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


@strict
class SkiplessConfig(PreTrainedConfig):
    """Dimensions, switches and closed seams of a skipless transformer (arXiv:2404.12362).

    Sizes are in elements. `stream_basis` names the projection that became the identity and is therefore absent
    ("q", "k" or "v"; null: none), or is "pivoted": hidden_size columns of all three did, the others are rest_proj, and
    column_order puts them in their places; `rest_dtype` "float32" keeps rest_proj in fp32 when the model is loaded in
    a smaller dtype; `layers_open` lists the layers that kept their projections; `p_removed` says that o_proj has been
    merged into the FFN's input matrices, or, where it has more inputs than outputs, that hidden_size of its rows are
    the identity and row_order tells which; `values_removed` that head_dim inputs of each of v_proj's heads pass through
    (value_order), and its bias has moved on; `keys_removed` the same of k_proj (key_order), whose bias cancels, for
    those of each head's dimensions that RoPE does not rotate (the others, if any, are k_rope_proj's); `head_removed`
    that hidden_size of the logits are the stream itself (lm_head.column_order); `first_layer_removed` that a row of the
    token table holds, in place of the embedding, what layer 0 makes of it before any attention (`row`), whose norms,
    projections and (parallel) FFN are absent
    (arXiv:2402.13388); `folded_biases` lists the modules that gained a bias by folding, `norms_removed` and
    `gains_removed` the norms that went whole or kept no gain.

    `qkv_bias`, `head_bias`: q, k, v_proj, lm_head have a bias (q, k, v_proj also if `attention_bias` is true).
    `norm_bias`: whether norms have a bias (null: layer norms do).

    `layer_types`: which layers have the window ("sliding_attention"), and which none ("full_attention"; null: all the
    same); `rope_parameters` may then be one for each kind.
    `gain_offset`: what norms' gains are stored less (Gemma's 1 + w: 1). `embedding_multiplier`: by which embeddings are
    multiplied; `attention_multiplier`: by which scores are (null: head_dim^-0.5).
    `position_offset`: rows of a table of learned positions before the first one's. `logit_scale`: by which logits are
    multiplied.

    `norms`: where norms stand (null: PRE_NORM); a parallel layer's FFN reads post_attention_layernorm of the layer's
    input, or, without one, what its attention reads. `residual` "both" in a parallel layer: one skip passes both.
    `residual_gains`: trainable factors of each branch, and of each skip (arXiv:2311.01906). `qk_norm`: RMS norms
    of each head's query and key ("head_dim"), or of all queries and of all keys together ("heads"). `norm_topk_prob`:
    the routing weights of the experts taken sum to 1.

    Raises, at construction, for a field, value or combination that the model does not implement: ValueError or
    huggingface_hub's StrictDataclassError, naming the field, what was expected and what was found.
    """

    model_type = "skipless"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    position_offset: int = 0
    rope_parameters: dict | None = None
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
    norms: list[str] | None = None
    norm_eps: float | int = 1e-6
    norm_bias: bool | None = None
    gain_offset: float | int = 0.0
    embedding_multiplier: float | int | None = None
    attention_multiplier: float | int | None = None
    norms_removed: list[str] | None = None
    gains_removed: list[str] | None = None
    qk_norm: str | None = None
    residual_gains: bool = False
    num_local_experts: int | None = None
    num_experts_per_tok: int | None = None
    norm_topk_prob: bool = True
    sliding_window: int | None = None
    attn_logit_softcapping: float | int | None = None
    final_logit_softcapping: float | int | None = None
    logit_scale: float | int = 1.0  # not null: vLLM multiplies by what it finds
    position_type: str = "rope"
    attention_shaping: str | None = None
    stream_basis: str | None = None
    rest_dtype: str | None = None
    layers_open: list[int] | None = None
    p_removed: bool = False
    values_removed: bool = False
    keys_removed: bool = False
    head_removed: bool = False
    first_layer_removed: bool = False
    folded_biases: list[str] | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        generation = GenerationConfig._get_default_generation_params()
        for name, value in kwargs.items():
            if name not in NEUTRAL and name not in BOOKKEEPING and name not in generation:
                raise ValueError(f"{name}: not a field of a skipless model, found {value!r}; remove it")
        self.check_neutral(kwargs)
        kinds = kwargs.get("layer_types")
        if kinds is not None:
            self.check_layer_types(kinds)
            if len(set(kinds)) > 1:  # transformers takes its mere presence for layers that differ
                self.layer_types = list(kinds)
        kwargs = {name: value for name, value in kwargs.items() if name not in NEUTRAL}
        for name in ("num_local_experts", "num_experts_per_tok"):
            if self.ffn_type != "moe" and getattr(self, name) == 0:
                setattr(self, name, None)
        for name in SIZES:
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name}: expected a positive integer, found {size!r}")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.layers_open = sorted(self.layers_open or [])
        for name in ("folded_biases", "norms_removed", "gains_removed"):
            setattr(self, name, list(getattr(self, name) or []))
        if self.norms is None and self.norm_type != "none":
            self.norms = list(PRE_NORM)
        rope_parameters = self.rope_parameters
        super().__post_init__(**kwargs)
        if not self.position_type.startswith("rope"):
            # nothing rotates: of the default, which the base class would add, too, nothing is kept
            default = (rope_parameters or {}).get("rope_type", "default") == "default"
            self.rope_parameters = None if default else rope_parameters

    def check_neutral(self, values: dict[str, Any]) -> None:
        """Refuse fields of other models that would change something if this model read them."""
        window = self.sliding_window is not None
        expected = {"attention_dropout": 0, "pretraining_tp": 1, "rope_scaling": None, "use_sliding_window": window}
        for name, value in expected.items():
            if values.get(name, value) != value:
                raise ValueError(f"{name}: expected {value!r}, found {values[name]!r}, which is not supported")

    def check_layer_types(self, kinds: list[str]) -> None:
        """Refuse kinds of layers that contradict the window."""
        window = self.sliding_window is not None
        known = {"full_attention", "sliding_attention"} if window else {"full_attention"}
        if len(kinds) != self.num_hidden_layers or not known >= set(kinds) or window > ("sliding_attention" in kinds):
            raise ValueError(
                f"layer_types: expected {' or '.join(sorted(known))} {self.num_hidden_layers} times, with "
                f"sliding_window {self.sliding_window}, found {kinds!r}, which is not supported"
            )

    def validate_architecture(self) -> None:
        """Refuse, by name, what the model file does not implement (run by @strict after construction)."""
        for name, values in SUPPORTED.items():
            if (found := getattr(self, name)) not in values:
                expected = ", ".join("null" if value is None else str(value) for value in values)
                raise ValueError(f"{name}: expected one of {expected}; found {found!r}, which is not supported")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of num_attention_heads ({self.num_attention_heads}), "
                f"found {self.num_key_value_heads}"
            )
        if self.stream_basis == "pivoted":
            if self.rest_width < 0:
                raise ValueError(
                    f"stream_basis: 'pivoted' needs at least hidden_size ({self.hidden_size}) outputs of "
                    f"{'q and k' if self.values_removed else 'q, k and v'}_proj together, found "
                    f"{self.rest_width + self.hidden_size}"
                )
        elif self.stream_basis is not None:
            heads = self.num_attention_heads if self.stream_basis == "q" else self.num_key_value_heads
            if heads * self.head_dim != self.hidden_size:
                raise ValueError(
                    f"stream_basis: {self.stream_basis!r} needs a square {self.stream_basis}_proj, but its output is "
                    f"{heads * self.head_dim} wide and hidden_size is {self.hidden_size}"
                )
        if self.rest_dtype is not None and self.stream_basis != "pivoted":
            raise ValueError(
                f"rest_dtype: expected null with stream_basis {self.stream_basis!r}, which has no rest_proj; found "
                f"{self.rest_dtype!r}"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act: expected an activation of transformers, found {self.hidden_act!r}")
        if self.gate_bias and self.ffn_type != "glu":
            raise ValueError(f"gate_bias: expected false with ffn_type {self.ffn_type!r}, which has no gate")
        for layer in self.layers_open:
            if self.stream_basis is None or not 0 <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"layers_open: expected layers 0..{self.num_hidden_layers - 1} of a model with a stream_basis, "
                    f"found {layer} with stream_basis {self.stream_basis!r}"
                )
        self.validate_ffn()
        biased = ["model.embed_tokens"]
        for layer in range(self.num_hidden_layers):
            biased += [f"model.layers.{layer}.self_attn.o_proj"] if self.p_rows else []
            if layer or "beside" not in self.row:
                biased += self.ffn_matrices(f"model.layers.{layer}.mlp")
        for name in self.folded_biases:
            if name not in biased:
                raise ValueError(
                    f"folded_biases: expected model.embed_tokens, o_proj or matrices of an FFN, found {name!r}"
                )
        self.validate_norms()
        self.validate_positions()
        self.validate_removed()
        self.validate_first_layer()

    def ffn_matrices(self, mlp: str) -> list[str]:
        """Names of an FFN's matrices."""
        names = ["up_proj", "down_proj"] if self.ffn_type == "mlp" else ["gate_proj", "up_proj", "down_proj"]
        if self.ffn_type != "moe":
            return [f"{mlp}.{name}" for name in names]
        experts = [f"{mlp}.experts.{expert}" for expert in range(self.num_local_experts)]
        return [f"{mlp}.router", *(f"{expert}.{name}" for expert in experts for name in names)]

    def validate_ffn(self) -> None:
        """Refuse experts without their numbers, numbers without experts, and caps that are none."""
        experts, taken = self.num_local_experts, self.num_experts_per_tok
        if self.ffn_type == "moe":
            if experts is None:
                raise ValueError("num_local_experts: expected a number of experts with ffn_type 'moe', found null")
            if taken is None or taken > experts:
                raise ValueError(f"num_experts_per_tok: expected 1..{experts}, the number of experts, found {taken}")
        for name, found in (("num_local_experts", experts), ("num_experts_per_tok", taken)):
            if self.ffn_type != "moe" and found is not None:
                raise ValueError(f"{name}: expected null with ffn_type {self.ffn_type!r}, found {found}")
        for name in ("attn_logit_softcapping", "final_logit_softcapping", *MULTIPLIERS):
            if (cap := getattr(self, name)) is not None and not 0 < cap < float("inf"):
                raise ValueError(f"{name}: expected a positive number or null, found {cap}")
        if not 0 < self.logit_scale < float("inf"):
            raise ValueError(f"logit_scale: expected a positive number, found {self.logit_scale}")

    def validate_norms(self) -> None:
        """Refuse norms that the model file does not know, and skips that a parallel layer does not have."""
        if not is_number(self.gain_offset):
            raise ValueError(f"gain_offset: expected a finite number, found {self.gain_offset}")
        if not 0 <= self.norm_eps < float("inf"):
            raise ValueError(f"norm_eps: expected a number from 0 on, found {self.norm_eps}")
        known = () if self.norm_type == "none" else (*LAYER_NORMS, *MODEL_NORMS)
        for name in self.norms or ():
            if name not in known:
                raise ValueError(
                    f"norms: expected some of {', '.join(known) or 'none'} with norm_type {self.norm_type!r}, found "
                    f"{name!r}"
                )
        if len(set(self.norms or ())) < len(self.norms or ()):
            raise ValueError(f"norms: expected each norm once, found {', '.join(self.norms)}")
        layers = [f"model.layers.{layer}." for layer in range(self.num_hidden_layers)]
        names = {
            name
            for norm in self.norms or ()
            for name in ([norm] if "." in norm else [layer + norm for layer in layers])
        }
        for field in ("norms_removed", "gains_removed"):
            for name in getattr(self, field):
                if name not in names:
                    raise ValueError(f"{field}: expected names of norms of this model, found {name!r}")
        if self.block_type == "parallel" and self.residual in ("attention", "ffn"):
            raise ValueError(
                f"residual: expected 'none' or 'both' with block_type 'parallel', where one skip passes both; found "
                f"{self.residual!r}"
            )

    def validate_removed(self) -> None:
        """Refuse what cannot be absent with these widths."""
        query_width = self.num_attention_heads * self.head_dim
        if self.p_removed and query_width < self.hidden_size and not self.p_merged:
            raise ValueError(
                f"p_removed: expected heads * head_dim of at least hidden_size ({self.hidden_size}), since the heads "
                f"are added to the stream or normalized as they are; found {query_width}"
            )
        if self.values_removed and (self.stream_basis == "v" or self.head_dim >= self.hidden_size):
            raise ValueError(
                f"values_removed: expected a v_proj with more than head_dim ({self.head_dim}) inputs, found "
                f"{self.hidden_size} and stream_basis {self.stream_basis!r}"
            )
        if self.keys_removed and (self.stream_basis or self.first_layer_removed or self.unrotated >= self.hidden_size):
            raise ValueError(
                f"keys_removed: expected a k_proj with more than {self.unrotated} inputs, as many as a head has "
                f"dimensions that are not rotated, found {self.hidden_size}, stream_basis {self.stream_basis!r} and "
                f"first_layer_removed {self.first_layer_removed}"
            )
        if self.keys_removed and (not self.unrotated or self.qk_norm):
            raise ValueError(
                f"keys_removed: expected false with position_type {self.position_type!r} and qk_norm {self.qk_norm!r}, "
                f"which stand between queries and keys, found true"
            )
        if self.keys_removed and self.attn_logit_softcapping and (self.attention_bias or self.qkv_bias):
            raise ValueError("keys_removed: expected false with attn_logit_softcapping and biased keys, found true")
        if self.head_bias and (self.tie_word_embeddings or self.head_removed):
            raise ValueError(
                "head_bias: expected false where lm_head is the table of the embeddings, or logits are the stream "
                "itself, found true"
            )
        if self.head_removed and (self.tie_word_embeddings or self.vocab_size <= self.hidden_size):
            raise ValueError(
                f"head_removed: expected an untied lm_head of more than hidden_size ({self.hidden_size}) outputs, "
                f"found {self.vocab_size}{' tied' * self.tie_word_embeddings}"
            )

    def validate_first_layer(self) -> None:
        """Refuse a table of what layer 0 gives where something else stands between it and the embedding."""
        if not self.first_layer_removed:
            return
        if self.position_type == "learned" or self.tie_word_embeddings:
            raise ValueError(
                f"first_layer_removed: expected false with position_type {self.position_type!r} and "
                f"tie_word_embeddings {self.tie_word_embeddings}, found true"
            )
        layer = "model.layers.0."
        norms = ["model.embed_norm", f"{layer}input_layernorm"]
        norms += [f"{layer}post_attention_layernorm"] * (self.block_type == "parallel")
        for name in filter(self.has_norm, norms):
            raise ValueError(f"norms_removed: expected {name}, which first_layer_removed has applied to the table")

    def validate_positions(self) -> None:
        """Refuse rope_parameters that rotate nothing, or in a way the model file does not know."""
        if self.position_offset < 0 or (self.position_offset and self.position_type != "learned"):
            raise ValueError(
                f"position_offset: expected 0, or rows of a table with position_type 'learned', found "
                f"{self.position_offset} with {self.position_type!r}"
            )
        if not self.position_type.startswith("rope"):
            if self.rope_parameters:
                raise ValueError(
                    f"rope_parameters: expected null, or the default, with position_type {self.position_type!r}, found "
                    f"rope_type {self.rope_parameters['rope_type']!r}"
                )
            return
        for name, parameters in self.rope_parameters.items():
            if isinstance(parameters, dict) and name not in self.attention_kinds:
                raise ValueError(f"rope_parameters.{name}: not a parameter of RoPE, nor a kind of layers; remove it")
        for kind in sorted(set(self.attention_kinds)):
            self.check_rope(self.rope_of(kind))

    def check_rope(self, parameters: dict[str, Any]) -> None:
        """Refuse parameters of RoPE that transformers would not know, or only warn of."""
        rope_type = parameters.get("rope_type")
        if rope_type not in ROPE_PARAMETERS:
            raise ValueError(
                f"rope_parameters.rope_type: expected one of {', '.join(ROPE_PARAMETERS)}; found {rope_type!r}, which "
                f"is not supported"
            )
        needed, optional = ROPE_PARAMETERS[rope_type]
        for name in parameters:
            if name not in ("rope_type", "rope_theta", "partial_rotary_factor", *needed, *optional):
                raise ValueError(f"rope_parameters.{name}: not a parameter of {rope_type} RoPE; remove it")
        for name in needed:
            if name not in parameters:
                raise ValueError(f"rope_parameters.{name}: expected a value with {rope_type} RoPE, found none; add it")
        for name, value in parameters.items():
            self.check_rope_parameter(name, value)
        rotated = self.rotated(parameters)
        if rotated % 2 or not 0 < rotated <= self.head_dim:
            raise ValueError(
                f"rope_parameters.partial_rotary_factor: expected an even number of rotated dimensions in "
                f"1..{self.head_dim} (head_dim), found {rotated}"
            )
        if rope_type == "dynamic" and rotated == 2:
            raise ValueError("rope_parameters.rope_type: 'dynamic' needs more than two rotated dimensions, found 2")
        for name in ("short_factor", "long_factor"):
            if name in parameters and len(parameters[name]) != rotated // 2:
                raise ValueError(
                    f"rope_parameters.{name}: expected {rotated // 2} numbers, one for two rotated dimensions, found "
                    f"{len(parameters[name])}"
                )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if {low, high} <= parameters.keys() and not parameters[low] < parameters[high]:
                raise ValueError(
                    f"rope_parameters.{low}: expected less than {high} ({parameters[high]}), found {parameters[low]}"
                )

    def check_rope_parameter(self, name: str, value: Any) -> None:
        """Refuse a parameter of RoPE that is no number, or none that means something."""
        least = {"rope_theta": 1.0, "factor": 1.0, "original_max_position_embeddings": 1}.get(name, 0.0)
        if name == "rope_type":
            return
        if name == "truncate":
            fits, expected = isinstance(value, bool), "true or false"
        elif name.endswith(("short_factor", "long_factor")):
            fits = isinstance(value, list) and all(is_number(each) and each > 0 for each in value)
            expected = "a list of positive numbers"
        else:
            fits, expected = is_number(value) and value >= least, f"a number from {least} on"
        if not fits:
            raise ValueError(f"rope_parameters.{name}: expected {expected}, found {value!r}")

    def validate_rope(self) -> None:
        """Nothing: validate_positions refuses what this method of transformers' only warns of."""

    def has_norm(self, name: str) -> bool:
        """Whether the norm of this name is there and acts."""
        norm = name if name in MODEL_NORMS else name.rpartition(".")[2]
        return norm in (self.norms or ()) and name not in self.norms_removed

    @property
    def rest_width(self) -> int:
        """Columns of q, k and (unless values_removed) v_proj together beyond the hidden_size that are the identity."""
        value_heads = (1 if self.values_removed else 2) * self.num_key_value_heads
        return (self.num_attention_heads + value_heads) * self.head_dim - self.hidden_size

    @property
    def row(self) -> dict[str, int]:
        """What a row of the token table holds, part -> width: the stream ("x"); or, with first_layer_removed, of layer
        0 the stream, if a skip or a closed seam takes it as it is, then what each of its projections would give, and,
        parallel, all that is added to its attention: skip and FFN ("beside").
        """
        if not self.first_layer_removed:
            return {"x": self.hidden_size}
        basis = None if 0 in self.layers_open else self.stream_basis
        parallel = self.block_type == "parallel"
        skip = not parallel and self.residual in ("attention", "both")
        row = {"x": self.hidden_size} if skip or basis is not None else {}
        gone = "" if basis is None else basis
        if basis == "pivoted":
            gone = "qk" if self.values_removed else "qkv"
            if self.rest_width:
                row["rest"] = self.rest_width
        for name, heads in zip("qkv", (self.num_attention_heads, *[self.num_key_value_heads] * 2), strict=True):
            if name not in gone:
                row[name] = heads * self.head_dim
        return row | ({"beside": self.hidden_size} if parallel else {})

    @property
    def p_merged(self) -> bool:
        """Whether a removed o_proj has been merged into the FFN's input matrices: where these alone read its output,
        and it has no more inputs than outputs, or the FFN is narrower than the stream.
        """
        between = ("post_attention_layernorm", "attention_output_norm")
        layers = range(self.num_hidden_layers)
        normed = any(self.has_norm(f"model.layers.{layer}.{norm}") for layer in layers for norm in between)
        if self.block_type == "parallel" or self.residual != "none" or normed:
            return False
        width = self.intermediate_size * (1 if self.ffn_type == "mlp" else 2)
        if self.ffn_type == "moe":
            width = self.num_local_experts * (width + 1)
        return self.num_attention_heads * self.head_dim <= self.hidden_size or width < self.hidden_size

    @property
    def p_rows(self) -> int:
        """Inputs of o_proj: all heads' outputs, or, once removed, those beyond the hidden_size that pass through."""
        query_width = self.num_attention_heads * self.head_dim
        if not self.p_removed:
            return query_width
        return 0 if self.p_merged else query_width - self.hidden_size

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism shards the modules that are there; what is not in it, every rank holds.

        Where a projection's columns are the stream's, each rank takes its heads' share of what all have.
        """
        plan = {"self_attn.split_heads": "split_heads", "self_attn.gather_heads": "gather_heads"}
        closed = len(self.layers_open) < self.num_hidden_layers
        gone = {None: "", "pivoted": "qkv"}.get(self.stream_basis, self.stream_basis) if closed else ""
        passed = {"q": False, "k": self.keys_removed, "v": self.values_removed}
        for name in "qkv":
            if (name not in gone or self.layers_open) and not passed[name]:
                plan[f"self_attn.{name}_proj"] = "colwise"
        if self.keys_removed and self.unrotated < self.head_dim:
            plan["self_attn.k_rope_proj"] = "colwise"
        if self.stream_basis == "pivoted" and self.rest_width and closed:
            plan["self_attn.rest_proj"] = "colwise_gather_output"
        if not self.p_removed:
            plan["self_attn.o_proj"] = "rowwise"
        if self.qk_norm == "heads":  # whose norms need all heads: every rank has the whole attention
            plan = {}
        for name in self.ffn_matrices("mlp"):
            if not name.endswith("router"):
                expert = re.sub(r"\.\d+\.", ".*.", name)
                plan[expert] = "rowwise" if name.endswith("down_proj") else "colwise"
        plan = {f"layers.*.{name}": style for name, style in plan.items()}
        if "model.embed_tokens" in self.folded_biases:
            plan["embed_tokens"] = "replicate"
        return plan

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        """Nothing: transformers 5.19 sets it again where embeddings are tied, but it follows from the other fields."""

    @property
    def attention_kinds(self) -> list[str]:
        """Of each layer, whether it has the sliding window."""
        kind = "full_attention" if self.sliding_window is None else "sliding_attention"
        return getattr(self, "layer_types", None) or [kind] * self.num_hidden_layers

    def rope_of(self, kind: str) -> dict[str, Any]:
        """RoPE's parameters in layers of a kind."""
        parameters: dict[str, Any] = self.rope_parameters or {}
        own = parameters.get(kind)
        return own if isinstance(own, dict) else parameters

    def rotated(self, parameters: dict[str, Any]) -> int:
        """How many of each head's dimensions RoPE with these parameters rotates."""
        return int(self.head_dim * parameters.get("partial_rotary_factor", 1.0))

    @property
    def rotary_dim(self) -> int:
        """The same, where all layers' RoPE is one."""
        return self.rotated(self.rope_parameters)

    @property
    def unrotated(self) -> int:
        """How many of each head's dimensions, the last, RoPE rotates in no layer; all of them without RoPE."""
        ropes = map(self.rope_of, set(self.attention_kinds)) if self.position_type.startswith("rope") else ()
        return self.head_dim - max(map(self.rotated, ropes), default=0)


__all__ = ["SkiplessConfig"]

"""The configuration of a skipless model: what the layers compute, and which seams have been closed.

This file and modeling_skipless.py are self-contained: `skipless fuse` copies both beside every model it writes, so
that the model also loads where this library is not installed (`trust_remote_code=True`).
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig

# What modeling_skipless.py computes. Everything else is refused by name, never ignored.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "block_type": ("serial",),
    "ffn_type": ("mlp", "glu"),
    "residual": ("none",),
    "norm_type": ("none",),
    "position_type": ("rope", "rope_interleaved", "learned", "none"),
    "attention_shaping": (None, "value", "full"),
    "stream_basis": (None, "q", "k", "v", "pivoted"),
    "rest_dtype": (None, "float32"),
    "values_removed": (False,),
    "head_removed": (False,),
}

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip

# Fields transformers writes into or passes through a config that change no arithmetic of the model's own.
BOOKKEEPING = frozenset(
    {
        "model_type", "auto_map", "torch_dtype", "name_or_path", "_name_or_path", "_commit_hash", "num_labels",
        "attn_implementation", "_attn_implementation", "experts_implementation", "output_attentions",
        "quantization_config",
    }
)  # fmt: skip


@strict
class SkiplessConfig(PreTrainedConfig):
    """Dimensions, switches and closed seams of a skipless transformer (arXiv:2404.12362).

    Sizes are in elements. `stream_basis` names the projection that became the identity and is therefore absent
    ("q", "k" or "v"; null: none), or is "pivoted": hidden_size columns of all three did, the others are rest_proj, and
    column_order puts them in their places; `rest_dtype` "float32" keeps rest_proj in fp32 when the model is loaded in
    a smaller dtype; `layers_open` lists the layers that kept their projections; `p_removed` says that o_proj has been
    merged into the FFN's input matrices; `folded_biases` lists the modules that gained a bias by folding.

    Raises, at construction, for a field, value or combination that the model does not implement: ValueError or
    huggingface_hub's StrictDataclassError, naming the field, what was expected and what was found.
    """

    model_type = "skipless"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    rope_parameters: dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    gate_bias: bool = False
    tie_word_embeddings: bool = False
    block_type: str = "serial"
    ffn_type: str = "glu"
    residual: str = "none"
    norm_type: str = "none"
    position_type: str = "rope"
    attention_shaping: str | None = None
    stream_basis: str | None = None
    rest_dtype: str | None = None
    layers_open: list[int] | None = None
    p_removed: bool = False
    values_removed: bool = False
    head_removed: bool = False
    folded_biases: list[str] | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        generation = GenerationConfig._get_default_generation_params()
        for name in kwargs:
            if name not in BOOKKEEPING and name not in generation:
                raise ValueError(f"{name}: not a field of a skipless model, found {kwargs[name]!r}; remove it")
        for name in SIZES:
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name}: expected a positive integer, found {size!r}")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.layers_open = sorted(self.layers_open or [])
        self.folded_biases = list(self.folded_biases or [])
        rope_parameters = self.rope_parameters
        super().__post_init__(**kwargs)
        if not self.position_type.startswith("rope"):
            self.rope_parameters = rope_parameters  # the base class would add a rope_theta that nothing reads

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
                    f"stream_basis: 'pivoted' needs at least hidden_size ({self.hidden_size}) outputs of q, k and "
                    f"v_proj together, found {self.rest_width + self.hidden_size}"
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
        biased = ["model.embed_tokens"]
        for name in ("gate_proj", "up_proj", "down_proj") if self.ffn_type == "glu" else ("up_proj", "down_proj"):
            biased += [f"model.layers.{layer}.mlp.{name}" for layer in range(self.num_hidden_layers)]
        for name in self.folded_biases:
            if name not in biased:
                raise ValueError(f"folded_biases: expected model.embed_tokens or matrices of an FFN, found {name!r}")
        self.validate_positions()

    def validate_positions(self) -> None:
        """Refuse rope_parameters that rotate nothing, too much, or in a way the model file does not know."""
        if not self.position_type.startswith("rope"):
            if self.rope_parameters:
                raise ValueError(f"rope_parameters: expected null with position_type {self.position_type!r}")
            return
        if (rope_type := self.rope_parameters.get("rope_type", "default")) != "default":
            raise ValueError(f"rope_parameters.rope_type: expected 'default', found {rope_type!r}, not supported")
        for name in self.rope_parameters:
            if name not in ("rope_type", "rope_theta", "partial_rotary_factor"):
                raise ValueError(f"rope_parameters.{name}: not a parameter of default RoPE; remove it")
        for name, least in (("rope_theta", 1.0), ("partial_rotary_factor", 0.0)):
            value = self.rope_parameters.get(name, 1.0)
            if not isinstance(value, int | float) or not least <= value < float("inf"):
                raise ValueError(f"rope_parameters.{name}: expected a number from {least} on, found {value!r}")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"rope_parameters.partial_rotary_factor: expected an even number of rotated dimensions in "
                f"1..{self.head_dim} (head_dim), found {self.rotary_dim}"
            )

    @property
    def rest_width(self) -> int:
        """Columns of q, k and v_proj together beyond the hidden_size ones that pivoting turns into the identity."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim - self.hidden_size

    @property
    def rotary_dim(self) -> int:
        """How many of each head's dimensions RoPE rotates."""
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))


__all__ = ["SkiplessConfig"]

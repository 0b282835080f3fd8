"""Families that an Architecture cannot say: of each, the field that stands in the way, and why.

They are refused by that field wherever a config.json or a name is given, and never counted as something that they are
not. No torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Inexpressible:
    """model_types: in config.json; names: what its models' names begin with, in lower case; fields: those that stand in
    the way, of which the first that is there is named; why: in words. blocks: how many weights of a model with this
    config could go all the same, blocks of values and of queries and keys.
    """

    model_types: tuple[str, ...]
    names: tuple[str, ...]
    fields: tuple[str, ...]
    why: str
    blocks: Callable[[Mapping[str, Any]], int] = lambda config: 0

    def refusal(self, config: Mapping[str, Any]) -> str:
        """Why a config.json of this family cannot be described."""
        own = config.get("text_config")
        inside = {**config, **own} if isinstance(own, Mapping) else config
        field = next((name for name in self.fields if inside.get(name) is not None), "model_type")
        value = inside[field] if field in self.fields else config["model_type"]
        shown = repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
        return (
            f"config.json: {field}: expected {'none' if field in self.fields else 'another'}, found {shown}: a "
            f"{config['model_type']} model cannot be counted, audited or fused: {self.why}{self._left(inside)}"
        )

    def _left(self, config: Mapping[str, Any]) -> str:
        """What could go all the same; of a config whose sizes are none, nothing is said."""
        try:
            count = self.blocks(config)
            return f"; blocks of {count:,} weights carry no information (MatShrink)" if count > 0 else ""
        except (KeyError, TypeError, ValueError, ArithmeticError):
            return ""

    def refusal_of(self, name: str) -> str:
        """The same, where only the model's name is known."""
        return f"{name}: cannot be counted, audited or fused: {self.why} (config.json: {self.fields[0]})"


def _latent(config: Mapping[str, Any]) -> int:
    """Of each head, V with P, and the part of queries and keys without RoPE."""
    sizes = (config["v_head_dim"], config["qk_nope_head_dim"])
    return sum(size**2 for size in sizes) * config["num_attention_heads"] * config["num_hidden_layers"]


def _values(config: Mapping[str, Any]) -> int:
    """Of each head of V, with P."""
    return config["head_dim"] ** 2 * config["num_key_value_heads"] * config["num_hidden_layers"]


def _some_rotated(config: Mapping[str, Any]) -> int:
    """The same, and of queries and keys in layers without RoPE."""
    layers, rotated = config["num_hidden_layers"], config.get("no_rope_layers")  # 1 where RoPE is
    every = config.get("no_rope_layer_interval", 4)
    bare = layers - sum(rotated) if rotated else layers // every
    return _values(config) * (layers + bare) // layers


MLA = (
    "keys and values are read from a latent vector with a norm of its own, a part of each key is shared by all heads "
    "(MLA), and an expert is shared by all tokens; of that, only V with P, and the keys' part without RoPE, could lose "
    "a block"
)
SHARED = "beside the experts that a router chooses stands one for all tokens"

FAMILIES = (
    Inexpressible(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32"),
        ("deepseek-v2", "deepseek-v3", "deepseek-r1"),
        ("kv_lora_rank",),
        MLA,
        _latent,
    ),
    Inexpressible(
        ("llama4", "llama4_text"),
        ("llama-4",),
        ("no_rope_layers", "no_rope_layer_interval", "num_local_experts"),
        f"some layers rotate queries and keys, and normalize them, and others do not; {SHARED}",
        _some_rotated,
    ),
    Inexpressible(
        ("gemma3n", "gemma3n_text"),
        ("gemma-3n",),
        ("altup_num_inputs", "hidden_size_per_layer_input"),
        "several streams run side by side (AltUp), each layer adds an embedding of its own, and the last layers share "
        "keys and values",
    ),
    Inexpressible(
        ("gemma4", "gemma4_text"),
        ("gemma-4",),
        ("global_head_dim", "per_layer_config", "hidden_size_per_layer_input", "layer_types"),
        "layers have heads of different sizes, values a norm of their own, and, in the smaller models, each layer an "
        "embedding of its own",
    ),
    Inexpressible(
        ("qwen3_next",),
        ("qwen3-next",),
        ("linear_num_value_heads", "layer_types"),
        f"most layers have linear attention with a state and a convolution, and others gate their outputs; {SHARED}",
    ),
    Inexpressible(
        ("gpt_oss",),
        ("gpt-oss",),
        ("swiglu_limit", "num_local_experts"),
        "each head has a sink beside its scores, routers have biases, and experts clamp what their gates read",
        _values,
    ),
)


def find(config: Mapping[str, Any]) -> Inexpressible | None:
    """The family of a config.json, if it is one of these."""
    return next((each for each in FAMILIES if config.get("model_type") in each.model_types), None)


def named(name: str) -> Inexpressible | None:
    """The family of a model of this name, a hub's or not, if it is one of these."""
    own = name.lower().rpartition("/")[2]
    return next((each for each in FAMILIES if own.startswith(each.names)), None)

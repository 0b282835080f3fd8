"""Families that an Architecture cannot say: of each, the field that stands in the way, and why.

They are refused by that field wherever a config.json or a name is given, and never counted as something that they are
not. No torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Inexpressible:
    """model_types: in config.json; names: what its models' names begin with, in lower case; fields: those that stand in
    the way, of which the first that is there is named; why: in words.
    """

    model_types: tuple[str, ...]
    names: tuple[str, ...]
    fields: tuple[str, ...]
    why: str

    def refusal(self, config: Mapping[str, Any]) -> str:
        """Why a config.json of this family cannot be described."""
        own = config.get("text_config")
        inside = {**config, **own} if isinstance(own, Mapping) else config
        field = next((name for name in self.fields if inside.get(name) is not None), "model_type")
        value = inside[field] if field in self.fields else config["model_type"]
        shown = repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
        return (
            f"config.json: {field}: expected {'none' if field in self.fields else 'another'}, found {shown}: a "
            f"{config['model_type']} model cannot be counted, audited or fused: {self.why}"
        )

    def refusal_of(self, name: str) -> str:
        """The same, where only the model's name is known."""
        return f"{name}: cannot be counted, audited or fused: {self.why} (config.json: {self.fields[0]})"


MLA = (
    "keys and values are read from a latent vector with a norm of its own, a part of each key is shared by all heads "
    "(MLA), and an expert is shared by all tokens; of that, only V with P, and the keys' part without RoPE, could lose "
    "a block (MatShrink)"
)
SHARED = "beside the experts that a router chooses stands one for all tokens"

FAMILIES = (
    Inexpressible(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32"),
        ("deepseek-v2", "deepseek-v3", "deepseek-r1"),
        ("kv_lora_rank",),
        MLA,
    ),
    Inexpressible(
        ("llama4", "llama4_text"),
        ("llama-4",),
        ("no_rope_layers", "no_rope_layer_interval", "num_local_experts"),
        f"some layers rotate queries and keys, and normalize them, and others do not; {SHARED}",
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
    ),
)


def find(config: Mapping[str, Any]) -> Inexpressible | None:
    """The family of a config.json, if it is one of these."""
    return next((each for each in FAMILIES if config.get("model_type") in each.model_types), None)


def named(name: str) -> Inexpressible | None:
    """The family of a model of this name, a hub's or not, if it is one of these."""
    own = name.lower().rpartition("/")[2]
    return next((each for each in FAMILIES if own.startswith(each.names)), None)

"""MPT: ALiBi, no biases, norms included. As transformers builds it: the FFN is four times as wide as the stream."""

from collections.abc import Mapping
from typing import Any

from skipless.checkpoint.family import Family


def of_a_power_of_2(heads: int) -> bool:
    """Other numbers of heads have slopes in an order of MPT's own."""
    return not heads & (heads - 1)


def unclipped(attention: Any) -> bool:
    """No skipless model clips q, k and v."""
    return not isinstance(attention, Mapping) or attention.get("clip_qkv") is None


FAMILY = Family(
    model_types=("mpt",),
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": ("d_model", "hidden_size"),
        "intermediate_size": lambda config: 4 * (config["d_model"] or config["hidden_size"]),
        "num_hidden_layers": ("n_layers", "num_hidden_layers"),
        "num_attention_heads": ("n_heads", "num_attention_heads"),
        "tie_word_embeddings": "tie_word_embeddings",
    },
    defaults={"tie_word_embeddings": True},
    fixed={
        "residual": "both",
        "norm_type": "layer",
        "norm_bias": False,
        "ffn_type": "mlp",
        "position_type": "alibi",
    },
    prefixes=("transformer.", ""),
    layers="blocks.{i}",
    names={
        "model.embed_tokens": "wte",
        "model.norm": "norm_f",
        "input_layernorm": "norm_1",
        "post_attention_layernorm": "norm_2",
        "self_attn.qkv_proj": "attn.Wqkv",
        "self_attn.o_proj": "attn.out_proj",
        "mlp.up_proj": "ffn.up_proj",
        "mlp.down_proj": "ffn.down_proj",
    },
    computes={
        "hidden_act": lambda config: "gelu",
        "norm_eps": "layer_norm_epsilon",
        "max_position_embeddings": "max_seq_len",
        "attention_multiplier": lambda config: (config["attn_config"] or {}).get("softmax_scale"),
    },
    requires={"n_heads": of_a_power_of_2, "attn_config": unclipped},
)

"""MPT: ALiBi, no biases, norms included. As transformers builds it: the FFN is four times as wide as the stream."""

from skipless.checkpoint.family import Config, Family
from skipless.errors import InputError


def scaling(config: Config) -> float | None:
    """By what scores are multiplied. Raises InputError for what no skipless model does to them."""
    heads, attention = config["n_heads"], config["attn_config"] or {}
    if heads & (heads - 1):
        raise InputError(
            f"config.json: n_heads: expected a power of 2, as others have slopes in an order of MPT's own, for layout "
            f"skipless, found {heads}; use layout family"
        )
    if (clipped := attention.get("clip_qkv")) is not None:
        raise InputError(
            f"config.json: attn_config.clip_qkv: expected none for layout skipless, found {clipped}; use layout family"
        )
    found: float | None = attention.get("softmax_scale")
    return found


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
        "attention_multiplier": scaling,
    },
)

"""BLOOM: ALiBi, a norm after the embedding, fused projections head by head."""

from skipless.checkpoint.family import Config, Family
from skipless.errors import InputError


def residual(config: Config) -> str:
    """Its skips. Raises InputError for those that begin behind the norms, of which nothing could move."""
    if config["apply_residual_connection_post_layernorm"]:
        raise InputError(
            "config.json: apply_residual_connection_post_layernorm: expected false, with which skips pass the norms, "
            "found true, which is not described"
        )
    return "both"


FAMILY = Family(
    model_types=("bloom",),
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": ("n_embed", "hidden_size"),
        "intermediate_size": lambda config: 4 * (config["n_embed"] or config["hidden_size"]),
        "num_hidden_layers": ("n_layer", "num_hidden_layers"),
        "num_attention_heads": ("n_head", "num_attention_heads"),
        "tie_word_embeddings": "tie_word_embeddings",
        "residual": residual,
    },
    defaults={"tie_word_embeddings": True},
    fixed={
        "norm_type": "layer",
        "norms": ("model.embed_norm", "input_layernorm", "post_attention_layernorm", "model.norm"),
        "ffn_type": "mlp",
        "position_type": "alibi",
        "attention_bias": True,
        "mlp_bias": True,
    },
    prefixes=("transformer.", ""),
    layers="h.{i}",
    names={
        "model.embed_tokens": "word_embeddings",
        "model.embed_norm": "word_embeddings_layernorm",
        "model.norm": "ln_f",
        "self_attn.qkv_proj": "self_attention.query_key_value",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    qkv="grouped",
    computes={"hidden_act": lambda config: "gelu_pytorch_tanh", "norm_eps": "layer_norm_epsilon"},
)

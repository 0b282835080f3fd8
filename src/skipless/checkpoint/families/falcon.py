"""Falcon: multi-query with one norm (7B), grouped with two (40B, 180B), or serial with ALiBi (RW)."""

from skipless.checkpoint.family import Config, Family, whole_rope


def kv_heads(config: Config) -> int | None:
    """Key-value heads: those asked for in the new architecture, else one or as many as heads."""
    if config["new_decoder_architecture"]:
        found: int | None = config["num_kv_heads"]
        return found
    return 1 if config["multi_query"] else None


def parallel(config: Config) -> bool:
    """Whether attention and FFN stand side by side."""
    return bool(config["new_decoder_architecture"] or config["parallel_attn"])


def norms(config: Config) -> tuple[str, ...]:
    """A parallel layer has one norm, or one each."""
    two = config["num_ln_in_parallel_attn"] or (2 if config["new_decoder_architecture"] else 1)
    each = ("post_attention_layernorm",) if two == 2 or not config["parallel_attn"] else ()
    return ("input_layernorm", *each, "model.norm")


FAMILY = Family(
    model_types=("falcon",),
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": ("n_embed", "hidden_size"),
        "intermediate_size": lambda config: (
            config["ffn_hidden_size"] or 4 * (config["n_embed"] or config["hidden_size"])
        ),
        "num_hidden_layers": ("num_hidden_layers", "n_layer"),
        "num_attention_heads": ("num_attention_heads", "n_head"),
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": "tie_word_embeddings",
        "attention_bias": "bias",
        "mlp_bias": "bias",
        "block_type": lambda config: "parallel" if parallel(config) else "serial",
        "position_type": lambda config: "alibi" if config["alibi"] else "rope",
        "norms": norms,
    },
    defaults={
        "tie_word_embeddings": True,
        "ffn_hidden_size": None,
        "num_kv_heads": None,
        "num_ln_in_parallel_attn": None,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "alibi": False,
        "bias": False,
    },
    fixed={"residual": "both", "norm_type": "layer", "ffn_type": "mlp"},
    prefixes=("transformer.", ""),
    layers="h.{i}",
    names={
        "model.embed_tokens": "word_embeddings",
        "model.norm": "ln_f",
        "self_attn.qkv_proj": "self_attention.query_key_value",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    variants=({"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"},),
    qkv="grouped",
    computes={
        "hidden_act": "activation",
        "norm_eps": "layer_norm_epsilon",
        "max_position_embeddings": "max_position_embeddings",
        "rope_parameters": whole_rope,
    },
    requires={"alibi": False},  # whose distances it rounds to bf16, and scales as it does the scores
)

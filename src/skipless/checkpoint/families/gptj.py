"""GPT-J: parallel layers with one norm, interleaved RoPE."""

from skipless.checkpoint.family import GPT_DEFAULTS, GPT_FIELDS, Config, Family


def _rotated(config: Config) -> float | None:
    """The part of each head that RoPE rotates; None: all of it."""
    heads, width = config["n_head"] or config["num_attention_heads"], config["n_embd"] or config["hidden_size"]
    return config["rotary_dim"] and config["rotary_dim"] * heads / width


FAMILY = Family(
    model_types=("gptj",),
    fields={**GPT_FIELDS, "partial_rotary_factor": _rotated},
    defaults={**GPT_DEFAULTS, "tie_word_embeddings": False, "rotary_dim": 64},
    fixed={
        "residual": "both",
        "norm_type": "layer",
        "norms": ("input_layernorm", "model.norm"),
        "block_type": "parallel",
        "ffn_type": "mlp",
        "position_type": "rope_interleaved",
        "mlp_bias": True,
        "head_bias": True,
    },
    prefixes=("transformer.", ""),
    layers="h.{i}",
    names={
        "model.embed_tokens": "wte",
        "model.norm": "ln_f",
        "input_layernorm": "ln_1",
        "self_attn.q_proj": "attn.q_proj",
        "self_attn.k_proj": "attn.k_proj",
        "self_attn.v_proj": "attn.v_proj",
        "self_attn.o_proj": "attn.out_proj",
        "mlp.up_proj": "mlp.fc_in",
        "mlp.down_proj": "mlp.fc_out",
    },
    buffers=(".attn.bias", ".attn.masked_bias", ".attn.embed_positions"),
)

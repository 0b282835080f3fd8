"""GPT-J: parallel layers with one norm, interleaved RoPE."""

from skipless.checkpoint.family import GPT_DEFAULTS, GPT_FIELDS, Family

FAMILY = Family(
    model_types=("gptj",),
    fields=GPT_FIELDS,
    defaults={**GPT_DEFAULTS, "tie_word_embeddings": False},
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

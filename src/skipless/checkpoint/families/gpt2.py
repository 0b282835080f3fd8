"""GPT-2: linear layers stored (inputs, outputs), learned positions."""

from skipless.checkpoint.family import GPT_COMPUTES, GPT_DEFAULTS, GPT_FIELDS, Family

FAMILY = Family(
    model_types=("gpt2",),
    fields={**GPT_FIELDS, "max_position_embeddings": ("n_positions", "max_position_embeddings")},
    defaults=GPT_DEFAULTS,
    fixed={
        "residual": "both",
        "norm_type": "layer",
        "ffn_type": "mlp",
        "position_type": "learned",
        "attention_bias": True,
        "mlp_bias": True,
    },
    prefixes=("transformer.", ""),
    computes=GPT_COMPUTES,
    requires={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    layers="h.{i}",
    names={
        "model.embed_tokens": "wte",
        "model.position_embeddings": "wpe",
        "model.norm": "ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.qkv_proj": "attn.c_attn",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    },
    transposed=True,
    buffers=(".attn.bias", ".attn.masked_bias"),
)

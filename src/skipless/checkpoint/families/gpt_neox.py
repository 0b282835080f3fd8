"""GPT-NeoX and Pythia: fused projections, head by head; parallel layers with two norms, if not serial."""

from skipless.checkpoint.family import LAYER_NORM_COMPUTES, LLAMA_FIELDS, LLAMA_FIXED, Family, rotary

FAMILY = Family(
    model_types=("gpt_neox",),
    fields={
        **{name: rule for name, rule in LLAMA_FIELDS.items() if name not in ("num_key_value_heads", "head_dim")},
        "attention_bias": "attention_bias",
        "partial_rotary_factor": rotary("rotary_pct", 0.25),
        "block_type": lambda config: "parallel" if config["use_parallel_residual"] else "serial",
    },
    defaults={"tie_word_embeddings": False, "attention_bias": True, "use_parallel_residual": True},
    fixed={**LLAMA_FIXED, "norm_type": "layer", "ffn_type": "mlp", "mlp_bias": True},
    prefixes=("gpt_neox.", ""),
    names={
        "model.embed_tokens": "embed_in",
        "model.norm": "final_layer_norm",
        "lm_head": "embed_out",
        "self_attn.qkv_proj": "attention.query_key_value",
        "self_attn.o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    qkv="grouped",
    computes=LAYER_NORM_COMPUTES,
    buffers=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
)

"""Phi-1, 1.5 and 2: parallel layers with one norm, biases everywhere."""

from skipless.checkpoint.family import LAYER_NORM_COMPUTES, LLAMA_DEFAULTS, LLAMA_FIELDS, LLAMA_FIXED, Family, rotary

FAMILY = Family(
    model_types=("phi",),
    fields={
        **LLAMA_FIELDS,
        "qk_norm": lambda config: "head_dim" if config["qk_layernorm"] else None,
        "partial_rotary_factor": rotary("partial_rotary_factor", 0.5),
    },
    defaults={**LLAMA_DEFAULTS, "qk_layernorm": False},
    fixed={
        **LLAMA_FIXED,
        "block_type": "parallel",
        "ffn_type": "mlp",
        "norm_type": "layer",
        "norms": ("input_layernorm", "model.norm"),
        "qk_norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "head_bias": True,
    },
    computes=LAYER_NORM_COMPUTES,
    names={
        "model.norm": "final_layernorm",
        "self_attn.o_proj": "self_attn.dense",
        "self_attn.q_norm": "self_attn.q_layernorm",
        "self_attn.k_norm": "self_attn.k_layernorm",
        "mlp.up_proj": "mlp.fc1",
        "mlp.down_proj": "mlp.fc2",
    },
)

"""StableLM: partial RoPE, LayerNorm; in one size parallel layers and a norm for each head."""

from skipless.architecture.config import PRE_NORM
from skipless.checkpoint.family import LAYER_NORM_COMPUTES, LLAMA_DEFAULTS, LLAMA_FIELDS, LLAMA_FIXED, Family, rotary

FAMILY = Family(
    model_types=("stablelm",),
    fields={
        **LLAMA_FIELDS,
        "qkv_bias": "use_qkv_bias",
        "partial_rotary_factor": rotary("partial_rotary_factor", 0.25),
        "block_type": lambda config: "parallel" if config["use_parallel_residual"] else "serial",
        "norms": lambda config: ("input_layernorm", "model.norm") if config["use_parallel_residual"] else PRE_NORM,
        "qk_norm": lambda config: "heads" if config["qk_layernorm"] else None,
    },
    defaults={**LLAMA_DEFAULTS, "use_qkv_bias": False, "use_parallel_residual": False, "qk_layernorm": False},
    fixed={**LLAMA_FIXED, "norm_type": "layer"},
    computes=LAYER_NORM_COMPUTES,
    names={
        "self_attn.q_norm": "self_attn.q_layernorm.norms.{h}",
        "self_attn.k_norm": "self_attn.k_layernorm.norms.{h}",
    },
    norm_heads="names",
)

"""Phi-3 and Phi-4: fused projections."""

from skipless.checkpoint.family import (
    LLAMA_COMPUTES,
    LLAMA_DEFAULTS,
    LLAMA_FIELDS,
    LLAMA_FIXED,
    ONE_WINDOW,
    Family,
    rope,
    rotary,
)

FAMILY = Family(
    model_types=("phi3",),
    fields={**LLAMA_FIELDS, "partial_rotary_factor": rotary("partial_rotary_factor", 1.0)},
    defaults=LLAMA_DEFAULTS,
    fixed=LLAMA_FIXED,
    computes={**LLAMA_COMPUTES, **ONE_WINDOW, "rope_parameters": rope},
    names={"self_attn.qkv_proj": "self_attn.qkv_proj", "mlp.gate_up_proj": "mlp.gate_up_proj"},
)

"""Phi-3 and Phi-4: fused projections."""

from skipless.checkpoint.family import (
    LLAMA_COMPUTES,
    LLAMA_DEFAULTS,
    LLAMA_FIELDS,
    LLAMA_FIXED,
    Family,
    one_window,
    rope,
)

FAMILY = Family(
    model_types=("phi3",),
    fields=LLAMA_FIELDS,
    defaults=LLAMA_DEFAULTS,
    fixed=LLAMA_FIXED,
    computes={**LLAMA_COMPUTES, "sliding_window": one_window, "rope_parameters": rope},
    names={"self_attn.qkv_proj": "self_attn.qkv_proj", "mlp.gate_up_proj": "mlp.gate_up_proj"},
)

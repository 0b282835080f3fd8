"""Qwen2 and Qwen2.5: Q, K and V have biases."""

from skipless.checkpoint.family import (
    LLAMA_COMPUTES,
    LLAMA_DEFAULTS,
    LLAMA_FIELDS,
    LLAMA_FIXED,
    Family,
    one_window,
)

FAMILY = Family(
    model_types=("qwen2",),
    fields=LLAMA_FIELDS,
    defaults=LLAMA_DEFAULTS,
    fixed={**LLAMA_FIXED, "qkv_bias": True},
    computes={**LLAMA_COMPUTES, "sliding_window": one_window},
)

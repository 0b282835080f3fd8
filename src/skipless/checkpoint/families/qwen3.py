"""Qwen3: norms of queries and keys."""

from skipless.checkpoint.family import (
    LLAMA_COMPUTES,
    LLAMA_DEFAULTS,
    LLAMA_FIELDS,
    LLAMA_FIXED,
    Family,
    one_window,
)

FAMILY = Family(
    model_types=("qwen3",),
    fields={**LLAMA_FIELDS, "attention_bias": "attention_bias"},
    defaults={**LLAMA_DEFAULTS, "head_dim": 128, "attention_bias": False},
    fixed={**LLAMA_FIXED, "qk_norm": "head_dim"},
    computes={**LLAMA_COMPUTES, "sliding_window": one_window},
)

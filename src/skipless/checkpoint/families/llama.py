"""Llama 1, 2 and 3, and what is built like them: SmolLM2, TinyLlama, Yi."""

from skipless.checkpoint.family import LLAMA_COMPUTES, LLAMA_DEFAULTS, LLAMA_FIELDS, LLAMA_FIXED, Family

FAMILY = Family(
    model_types=("llama",),
    fields={**LLAMA_FIELDS, "attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    defaults={**LLAMA_DEFAULTS, "attention_bias": False, "mlp_bias": False},
    fixed=LLAMA_FIXED,
    computes=LLAMA_COMPUTES,
)

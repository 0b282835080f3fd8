"""Mistral."""

from skipless.checkpoint.family import LLAMA_COMPUTES, LLAMA_DEFAULTS, LLAMA_FIELDS, LLAMA_FIXED, Family, one_window

FAMILY = Family(
    model_types=("mistral",),
    fields=LLAMA_FIELDS,
    defaults=LLAMA_DEFAULTS,
    fixed=LLAMA_FIXED,
    computes={**LLAMA_COMPUTES, "sliding_window": one_window},
)

"""Mistral."""

from skipless.checkpoint.family import LLAMA_DEFAULTS, LLAMA_FIELDS, LLAMA_FIXED, Family

FAMILY = Family(model_types=("mistral",), fields=LLAMA_FIELDS, defaults=LLAMA_DEFAULTS, fixed=LLAMA_FIXED)

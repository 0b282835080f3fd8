"""Gemma 1: wide heads, tied embeddings."""

from skipless.checkpoint.family import LLAMA_COMPUTES, LLAMA_DEFAULTS, LLAMA_FIELDS, LLAMA_FIXED, Family

FAMILY = Family(
    model_types=("gemma",),
    fields={**LLAMA_FIELDS, "attention_bias": "attention_bias"},
    defaults={**LLAMA_DEFAULTS, "head_dim": 256, "tie_word_embeddings": True, "attention_bias": False},
    fixed=LLAMA_FIXED,
    gain_offset=1.0,
    computes={**LLAMA_COMPUTES, "embedding_multiplier": lambda config: config["hidden_size"] ** 0.5},
    requires={"use_bidirectional_attention": None},
)

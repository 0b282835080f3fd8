"""PaLM: parallel layers with one norm without biases, one key-value head, and heads of 256 dimensions.

Its weights were never published: a config.json is written from the paper (arXiv:2204.02311, sec. 2 and table 1).
"""

from skipless.checkpoint.family import LLAMA_DEFAULTS, LLAMA_FIELDS, LLAMA_FIXED, Family

FAMILY = Family(
    model_types=("palm",),
    fields=LLAMA_FIELDS,
    defaults={
        **LLAMA_DEFAULTS,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 256000,
        "tie_word_embeddings": True,
    },
    fixed={
        **LLAMA_FIXED,
        "block_type": "parallel",
        "norm_type": "layer",
        "norm_bias": False,
        "norms": ("input_layernorm", "model.norm"),
    },
)

"""Gemma 2: norms on both sides of attention and FFN."""

from skipless.checkpoint.family import LLAMA_DEFAULTS, LLAMA_FIELDS, LLAMA_FIXED, Family

FAMILY = Family(
    model_types=("gemma2",),
    fields={**LLAMA_FIELDS, "attention_bias": "attention_bias"},
    defaults={**LLAMA_DEFAULTS, "head_dim": 256, "tie_word_embeddings": True, "attention_bias": False},
    fixed={
        **LLAMA_FIXED,
        "norms": (
            "input_layernorm",
            "attention_output_norm",
            "post_attention_layernorm",
            "ffn_output_norm",
            "model.norm",
        ),
    },
    gain_offset=1.0,
    names={
        "attention_output_norm": "post_attention_layernorm",
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "ffn_output_norm": "post_feedforward_layernorm",
    },
)

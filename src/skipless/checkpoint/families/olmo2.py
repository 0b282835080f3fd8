"""OLMo 2: norms after attention and FFN, before their outputs join the stream."""

from skipless.checkpoint.family import LLAMA_COMPUTES, LLAMA_DEFAULTS, LLAMA_FIELDS, LLAMA_FIXED, Family

FAMILY = Family(
    model_types=("olmo2",),
    fields={**LLAMA_FIELDS, "attention_bias": "attention_bias"},
    defaults={**LLAMA_DEFAULTS, "attention_bias": False},
    fixed={
        **LLAMA_FIXED,
        "norms": ("attention_output_norm", "ffn_output_norm", "model.norm"),
        "qk_norm": "heads",
    },
    computes=LLAMA_COMPUTES,
    names={
        "attention_output_norm": "post_attention_layernorm",
        "ffn_output_norm": "post_feedforward_layernorm",
    },
)

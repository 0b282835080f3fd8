"""Gemma 2: norms on both sides of attention and FFN."""

from skipless.checkpoint.family import LLAMA_COMPUTES, LLAMA_DEFAULTS, LLAMA_FIELDS, LLAMA_FIXED, WINDOWS, Family

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
    computes={
        **LLAMA_COMPUTES,
        **WINDOWS,
        "hidden_act": "hidden_activation",
        "embedding_multiplier": lambda config: config["hidden_size"] ** 0.5,
        "attention_multiplier": lambda config: config["query_pre_attn_scalar"] ** -0.5,
        "attn_logit_softcapping": lambda config: config["attn_logit_softcapping"],
        "final_logit_softcapping": lambda config: config["final_logit_softcapping"],
    },
    requires={"use_bidirectional_attention": None},
    names={
        "attention_output_norm": "post_attention_layernorm",
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "ffn_output_norm": "post_feedforward_layernorm",
    },
)

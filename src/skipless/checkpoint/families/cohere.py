"""Cohere's Command R: parallel layers with one norm without biases, interleaved RoPE, tied embeddings."""

from skipless.checkpoint.family import (
    LAYER_NORM_COMPUTES,
    LLAMA_DEFAULTS,
    LLAMA_FIELDS,
    LLAMA_FIXED,
    Family,
    whole_rope,
)

FAMILY = Family(
    model_types=("cohere",),
    fields={
        **LLAMA_FIELDS,
        "attention_bias": "attention_bias",
        "qk_norm": lambda config: "heads" if config["use_qk_norm"] else None,
    },
    defaults={**LLAMA_DEFAULTS, "tie_word_embeddings": True, "attention_bias": False, "use_qk_norm": False},
    fixed={
        **LLAMA_FIXED,
        "norm_type": "layer",
        "norm_bias": False,
        "norms": ("input_layernorm", "model.norm"),
        "block_type": "parallel",
        "position_type": "rope_interleaved",
    },
    norm_heads="rows",
    computes={**LAYER_NORM_COMPUTES, "rope_parameters": whole_rope, "logit_scale": "logit_scale"},
)

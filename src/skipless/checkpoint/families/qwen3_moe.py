"""Qwen3 with experts, in all layers or some."""

from skipless.architecture.config import MOST_LAYERS
from skipless.checkpoint.family import (
    LLAMA_COMPUTES,
    LLAMA_DEFAULTS,
    LLAMA_FIELDS,
    LLAMA_FIXED,
    Config,
    Family,
    one_window,
)


def dense_layers(config: Config) -> list[int]:
    """Layers without experts: those named, and all but every decoder_sparse_step-th."""
    layers, step = range(min(config["num_hidden_layers"], MOST_LAYERS)), config["decoder_sparse_step"]
    named = set(config["mlp_only_layers"] or ())
    return [layer for layer in layers if layer in named or (layer + 1) % step]


FAMILY = Family(
    model_types=("qwen3_moe",),
    fields={
        **LLAMA_FIELDS,
        "attention_bias": "attention_bias",
        "num_local_experts": ("num_experts", "num_local_experts"),
        "num_experts_per_tok": "num_experts_per_tok",
        "intermediate_size": "moe_intermediate_size",
        "dense_intermediate_size": "intermediate_size",
        "dense_layers": dense_layers,
    },
    defaults={**LLAMA_DEFAULTS, "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": None},
    fixed={**LLAMA_FIXED, "ffn_type": "moe", "qk_norm": "head_dim"},
    computes={**LLAMA_COMPUTES, "sliding_window": one_window, "norm_topk_prob": "norm_topk_prob"},
    names={"mlp.router": "mlp.gate"},
)

"""Models of every form that llama.cpp runs, as tiny as its kernels and tokenizer allow."""

import shutil
from pathlib import Path
from typing import Any

import torch

import skipless
from skipless.bundled import BUNDLED
from tests.models import build, save

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 2048}
MHA = {"num_key_value_heads": 4}
PARALLEL = {"block_type": "parallel"}
BIASES = {"attention_bias": True, "mlp_bias": True}
EXPERTS = {"ffn_type": "moe", "num_local_experts": 4, "num_experts_per_tok": 2}
MOST = {"remove": ("stream", "p", "values", "head")}
PIVOTED = {"basis": "pivoted"}
# fields of the original, and what is asked of fuse (None: the original)
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "original": ({}, None),
    "q": ({}, {"basis": "q"}),
    "k": (MHA, {"basis": "k"}),
    "v": (MHA, {"basis": "v"}),
    "pivoted": ({}, PIVOTED),
    "pivoted, a layer open": ({}, {**PIVOTED, "layers_open": [1]}),
    "parallel": (PARALLEL, None),
    "parallel, q": (PARALLEL, {"basis": "q"}),
    "parallel, pivoted, biases": ({**PARALLEL, **BIASES}, PIVOTED),
    "parallel, p": ({**PARALLEL, "head_dim": 32, **MHA}, {"remove": ("p",), "parallel_removes": "p"}),
    "values and head": ({}, {**PIVOTED, **MOST}),
    "values alone": ({}, {"remove": ("values",)}),
    "wide heads": ({"head_dim": 32, **BIASES}, PIVOTED),
    "narrow heads, merged": ({"head_dim": 8, **BIASES}, {"remove": ("p",)}),
    "biases": (BIASES, {"basis": "q"}),
    "tied, biases": ({"tie_word_embeddings": True, **BIASES}, {"basis": "q"}),
    "mlp, gelu": ({"ffn_type": "mlp", "hidden_act": "gelu"}, {"basis": "q"}),
    "mlp, relu, biases": ({"ffn_type": "mlp", "hidden_act": "relu", **BIASES}, PIVOTED),
    "gelu by tanh": ({"hidden_act": "gelu_pytorch_tanh"}, {"basis": "q"}),
    "gated gelu": ({"hidden_act": "gelu", "gate_bias": True}, PIVOTED),
    "interleaved": ({"position_type": "rope_interleaved"}, {"basis": "q"}),
    "interleaved, pivoted": ({"position_type": "rope_interleaved"}, PIVOTED),
    "a part rotated": (
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}}, {"basis": "q"},
    ),
    "alibi": ({"position_type": "alibi"}, {"basis": "q"}),
    "alibi, six heads": (
        {"position_type": "alibi", "num_attention_heads": 6, "head_dim": 16}, PIVOTED,
    ),
    "learned": ({"position_type": "learned"}, {"basis": "q"}),
    "no positions": ({"position_type": "none", **MHA}, {"basis": "k"}),
    "experts": (EXPERTS, {"basis": "q"}),
    "experts, biases, all removed": ({**EXPERTS, **BIASES}, {**PIVOTED, **MOST}),
    "experts, weights that do not add up": ({**EXPERTS, "norm_topk_prob": False, **PARALLEL}, None),
    "shaped": ({"attention_shaping": "value"}, {"basis": "q"}),
    "shaped, pivoted": ({"attention_shaping": "value", **BIASES}, PIVOTED),
    "norms and skips": ({"norm_type": "rms", "residual": "both"}, None),
    "layer norms, one skip, norms of heads": (
        {"norm_type": "layer", "residual": "attention", "qk_norm": "head_dim",
         "norms": ["model.embed_norm", "input_layernorm", "model.norm"]}, None,
    ),
    "parallel, a norm of its own": ({**PARALLEL, "norm_type": "layer", "residual": "both"}, None),
    "soft caps": ({"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.7}, {"basis": "q"}),
}  # fmt: skip


def form(name: str, folder: Path) -> Path:
    """The folder of a form's model, in fp32, with the bundled model's tokenizer."""
    fields, options = FORMS[name]
    source = save(build(dtype=torch.float32, **{**SIZES, **fields}), folder / "source")
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copy(file, source)
    if options is None:
        return source
    skipless.fuse(source, folder / "fused", **{"remove": ("stream", "p"), **options})
    return folder / "fused"

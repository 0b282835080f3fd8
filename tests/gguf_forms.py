"""Models of every form that llama.cpp runs, as tiny as its kernels and tokenizer allow."""

import shutil
from pathlib import Path
from typing import Any

import torch

from skipless.architecture.config import PRE_NORM
from skipless.bundled import BUNDLED
from tests.models import build, edit_tensors, load, save

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 2048}
MHA = {"num_key_value_heads": 4}
WIDE = {"head_dim": 32}
PARALLEL = {"block_type": "parallel"}
BIASES = {"attention_bias": True, "mlp_bias": True}
EXPERTS = {"ffn_type": "moe", "num_local_experts": 4, "num_experts_per_tok": 2}
ROTATED = {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}}
BY_Q, BY_K, BY_V = ({"stream_basis": basis, "p_removed": True} for basis in "qkv")
PIVOTED = {"stream_basis": "pivoted", "p_removed": True}
VALUES = {"values_removed": True}
ALL = {**PIVOTED, **VALUES, "head_removed": True}
NO_P = {"p_removed": False}
# The config of each, beside SIZES.
FORMS: dict[str, dict[str, Any]] = {
    "original": {},
    "q": BY_Q,
    "k": {**MHA, **BY_K},
    "v": {**MHA, **BY_V},
    "pivoted": PIVOTED,
    "pivoted, a layer open": {**PIVOTED, "layers_open": [1]},
    "parallel": PARALLEL,
    "parallel, q": {**PARALLEL, **BY_Q, **NO_P},
    "parallel, pivoted, biases": {**PARALLEL, **BIASES, **PIVOTED, **NO_P},
    "parallel, p": {**PARALLEL, **WIDE, "p_removed": True},
    "values and head": ALL,
    "values alone": {**VALUES, **BIASES},
    "queries": {
        "position_type": "learned", "keys_removed": True, **VALUES, "norm_type": "layer", "residual": "both", **BIASES,
    },
    "queries, a part rotated": {
        **ROTATED, "keys_removed": True, **VALUES, "norm_type": "layer", "residual": "both", **BIASES,
    },
    "wide heads": {**WIDE, **BIASES, **PIVOTED},
    "narrow heads, merged": {"head_dim": 8, **BIASES, "p_removed": True},
    "biases": {**BIASES, **BY_Q},
    "tied, folded biases": {
        "tie_word_embeddings": True, **BY_Q, "folded_biases": ["model.embed_tokens", "model.layers.1.mlp.up_proj"],
    },
    "mlp, gelu": {"ffn_type": "mlp", "hidden_act": "gelu", **BY_Q},
    "mlp, relu, biases": {"ffn_type": "mlp", "hidden_act": "relu", **BIASES, **PIVOTED},
    "gelu by tanh": {"hidden_act": "gelu_pytorch_tanh", **BY_Q},
    "gated gelu": {"hidden_act": "gelu", "gate_bias": True, **PIVOTED},
    "interleaved": {"position_type": "rope_interleaved", **BY_Q},
    "interleaved, pivoted": {"position_type": "rope_interleaved", **PIVOTED},
    "a part rotated": {**ROTATED, **BY_Q},
    "a part rotated, interleaved": {"position_type": "rope_interleaved", **ROTATED, **PIVOTED},
    "alibi": {"position_type": "alibi", **BY_Q},
    "alibi, six heads": {"position_type": "alibi", "num_attention_heads": 6, "head_dim": 16, **PIVOTED},
    "learned": {"position_type": "learned", **BY_Q},
    "no positions": {"position_type": "none", **MHA, **BY_K},
    "experts": {**EXPERTS, **BY_Q},
    "experts, folded biases, all removed": {
        **EXPERTS, **BIASES, **ALL, "folded_biases": ["model.layers.0.mlp.router", "model.layers.1.mlp.router"],
    },
    "experts, weights that do not add up": {**EXPERTS, "norm_topk_prob": False, **PARALLEL},
    "shaped": {"attention_shaping": "value", **BY_Q},
    "shaped, pivoted": {"attention_shaping": "value", **BIASES, **PIVOTED},
    "norms and skips": {"norm_type": "rms", "residual": "both"},
    "norms without gains": {
        "norm_type": "rms", "residual": "both",
        "gains_removed": [*(f"model.layers.{i}.{norm}" for i in range(2) for norm in PRE_NORM[:2]), "model.norm"],
    },
    "biases of q, k and v alone": {"qkv_bias": True, "folded_biases": ["model.layers.1.self_attn.o_proj"]},
    "layer norms, one skip, norms of heads": {
        "norm_type": "layer", "residual": "attention", "qk_norm": "head_dim",
        "norms": ["model.embed_norm", "input_layernorm", "model.norm"],
    },
    "the other skip": {"residual": "ffn", **BY_Q, **NO_P},
    "parallel, a norm of its own": {**PARALLEL, "norm_type": "layer", "residual": "both"},
    "soft caps": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.7, **BY_Q},
    "soft caps, no positions, pivoted": {"attn_logit_softcapping": 0.5, "position_type": "none", **PIVOTED},
}  # fmt: skip


def form(name: str, folder: Path) -> Path:
    """The folder of a form's model, in fp32, with the bundled model's tokenizer."""
    source = save(build(dtype=torch.float32, **{**SIZES, **FORMS[name]}), folder / "source")
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copy(file, source)
    return source


def with_another(suffix: str, source: Path, folder: Path) -> Path:
    """A copy of a model in which the values of the tensor that ends so have other places, or one value is another."""
    shutil.copytree(source, folder)
    tensors = load(source, torch.float32).state_dict()
    (name,) = (name for name in tensors if name.endswith(suffix))
    value, along = tensors[name], 0 if name.endswith(("key_order", "value_order")) else -1  # other heads' orders
    edit_tensors(folder, **{name: value.roll(1, along).contiguous() if value.numel() > 1 else 2 * value})
    return folder

"""Mixtral: Mistral with experts."""

from skipless.checkpoint.family import LLAMA_COMPUTES, LLAMA_DEFAULTS, LLAMA_FIELDS, LLAMA_FIXED, Family, one_window

FAMILY = Family(
    model_types=("mixtral",),
    fields={
        **LLAMA_FIELDS,
        "num_local_experts": ("num_local_experts", "num_experts"),
        "num_experts_per_tok": "num_experts_per_tok",
    },
    defaults=LLAMA_DEFAULTS,
    fixed={**LLAMA_FIXED, "ffn_type": "moe"},
    computes={**LLAMA_COMPUTES, "sliding_window": one_window},
    names={
        "mlp.router": "block_sparse_moe.gate",
        "mlp.experts.{e}.gate_proj": "block_sparse_moe.experts.{e}.w1",
        "mlp.experts.{e}.up_proj": "block_sparse_moe.experts.{e}.w3",
        "mlp.experts.{e}.down_proj": "block_sparse_moe.experts.{e}.w2",
    },
)

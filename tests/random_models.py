"""Random models over the whole product of switches, and random removals: not only the cases that somebody thought of.

Every draw comes from one function `choose`, hypothesis's or a seeded generator's (benchmarks/random_models.py).
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

import skipless
from skipless.architecture.seams import KINDS
from skipless.errors import InputError
from skipless.model import SkiplessForCausalLM
from tests.models import build, load, relative_error, save

Choose = Callable[[Sequence[Any]], Any]

NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm", "model.embed_norm")


def subsets(items: Sequence[Any]) -> list[tuple[Any, ...]]:
    """All of them but the empty one."""
    return [chosen for size in range(1, len(items) + 1) for chosen in combinations(items, size)]


def draw_fields(choose: Choose) -> dict[str, Any]:
    """The config of a small model; every switch takes every value that goes with the others."""
    boolean = (False, True)
    heads = choose((1, 2, 3, 4, 6))
    kv_heads = choose([n for n in range(1, heads + 1) if heads % n == 0])
    head_dim = choose((2, 4, 6, 8))
    width = heads * head_dim
    hidden_size = choose((width, width, max(2, width // 2), max(2, width - 2), width + 2, width + kv_heads * head_dim))
    ffn = choose(("mlp", "glu", "moe"))
    block = choose(("serial", "parallel"))
    position = choose(("rope", "rope_interleaved", "learned", "alibi", "none"))
    norm = choose(("none", "rms", "layer"))
    fields = {
        "vocab_size": choose((5, hidden_size, 37, 61)),
        "hidden_size": hidden_size,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": choose((1, 2, 3)),
        "intermediate_size": choose((3, hidden_size, 2 * hidden_size)),
        "block_type": block,
        "ffn_type": ffn,
        "hidden_act": choose(("silu", "gelu", "relu", "leaky_relu", "relu2", "linear")),
        "position_type": position,
        "attention_shaping": choose((None, "value", "full")),
        "norm_type": norm,
        "residual": choose(("none", "both") if block == "parallel" else ("none", "none", "attention", "ffn", "both")),
        "sliding_window": choose((None, 3)),
        "attn_logit_softcapping": choose((None, 0.5)),
        "final_logit_softcapping": choose((None, 20.0)),
        "qk_norm": choose((None, "head_dim")),
        "residual_gains": choose(boolean),
        "attention_bias": choose(boolean),
        "mlp_bias": choose(boolean),
        "gate_bias": ffn == "glu" and choose(boolean),
        "tie_word_embeddings": choose(boolean),
    }
    if norm != "none":
        fields |= {"norms": list(choose(subsets(NORMS))), "norm_eps": choose((0.0, 1e-6, 0.1))}
    if ffn == "moe":
        fields |= {"num_local_experts": 3, "num_experts_per_tok": choose((1, 2, 3)), "norm_topk_prob": choose(boolean)}
    if position.startswith("rope"):
        partial = choose((1.0, 0.5)) if head_dim % 4 == 0 else 1.0
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": partial}
    if choose((True, *[False] * 7)):  # a family with many ways of its own: norms before the FFN that are redundant
        fields |= {"block_type": "serial", "residual": "none", "norm_type": "rms", "norm_eps": 0.0, "mlp_bias": False}
        fields |= {"norms": [*NORMS[:3]], "gate_bias": False, "hidden_act": choose(("relu", "leaky_relu", "relu2"))}
    return fields


def draw_runs(choose: Choose, layers: int) -> list[dict[str, Any]]:
    """Options of one fuse, or of two after one another."""
    return [
        {
            "basis": choose(("auto", "q", "k", "v", "pivoted", "pivoted")),
            "remove": choose(subsets(list(KINDS))),
            "parallel_removes": choose(("readers", "p")),
            "layers_open": choose(((), (), (0,), tuple(range(1, layers)))),
        }
        for _ in range(choose((1, 1, 2)))
    ]


def fuse_what_goes(run: dict[str, Any], source: Path, fused: Path) -> str:
    """Fuse, leaving out kinds that are refused until something can be removed; the last refusal, or nothing."""
    kinds, refusal = list(run["remove"]), ""
    while kinds:
        try:
            skipless.fuse(source, fused, **{**run, "remove": tuple(kinds)})
            return ""
        except InputError as error:
            refusal = str(error)
        blocked = [kind for kind in kinds if f"the {kind} seam" in refusal] or kinds[-1:]
        kinds = [kind for kind in kinds if kind not in blocked]
    return refusal


def judge(
    fields: dict[str, Any],
    runs: Sequence[dict[str, Any]],
    seed: int,
    folder: Path,
    dtype: torch.dtype = torch.float64,
) -> tuple[str, float | None]:
    """Fuse a random model, stored in `dtype`, by each run in turn: what was refused, if all was, and the largest error
    of logits in fp64, relative to their token's largest.
    """
    model: SkiplessForCausalLM = build(seed, dtype, **fields)
    source, error, refusal = save(model, folder / "source"), None, ""
    for number, run in enumerate(runs):
        fused = folder / f"fused{number}"
        refusal = fuse_what_goes(run, source, fused)
        if not refusal:
            error = max(error or 0.0, relative_error(load(fused), model))
            source = fused
    return refusal, error

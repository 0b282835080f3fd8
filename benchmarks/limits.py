"""The tables of docs/limits.md: what carries no information, per architecture, and what each system removes of it.

    python benchmarks/limits.py [--check]

The paper: Q and P merged into their neighbours (Fig. 1 b; K or V alike). MatShrink: each head of V (and of K, where no
rotation stands between Q and K) has a square block folded into what reads it. Ours: skipless fuse --remove
norms,stream,values,p,head, as counted from its seams. With --check, the formula and the seams are counted on small
copies: parameters less the Jacobian's rank, before and after fusing; at the end stands what that took of a CPU's time.
"""

import argparse
import dataclasses
import time

from skipless.architecture.config import Architecture
from skipless.architecture.limit import limit
from skipless.reports.certificate import certify
from skipless.reports.counting import count

MODELS = ("pythia-6.9b", "mistral-7b", "llama-3.1-8b", "mistral-nemo-12b", "mixtral-8x7b", "qwen3-8b", "smollm2-135m")
SHAPE = {
    "model_type": "skipless",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
MOE = {"ffn_type": "moe", "num_local_experts": 8, "num_experts_per_tok": 2}
VARIANTS = {
    "serial, GQA, SwiGLU, RoPE": {},
    "MHA": {"num_key_value_heads": 32},
    "MQA": {"num_key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "ALiBi": {"position_type": "alibi"},
    "MLP": {"ffn_type": "mlp", "hidden_act": "gelu"},
    "wide heads, head_dim 256": {"head_dim": 256},
    "narrow heads, head_dim 96": {"head_dim": 96},
    "experts": MOE,
    "shaped attention": {"attention_shaping": "full"},
    "q/k norm": {"qk_norm": "head_dim"},
    "all biases": {"attention_bias": True, "mlp_bias": True},
    "parallel": {"block_type": "parallel"},
    "parallel, experts": {"block_type": "parallel", **MOE},
    "RMSNorm, no skips": {"norm_type": "rms"},
    "layer norm, no skips": {"norm_type": "layer"},
    "skip past the FFN": {"residual": "ffn"},
    "skip past the attention": {"residual": "attention"},
    "skips, no norms": {"residual": "both"},
    "skips and RMSNorm": {"residual": "both", "norm_type": "rms"},
    "skips and layer norm": {"residual": "both", "norm_type": "layer"},
    "parallel, skips and RMSNorm": {"residual": "both", "norm_type": "rms", "block_type": "parallel"},
}


def paper(a: Architecture) -> int:
    """2 d^2 a layer, of serial layers without skips and norms whose Q and P are square; else what is said to go."""
    square = a.query_width == a.hidden_size
    if a.block_type != "serial" or a.residual != "none" or a.norm_type != "none" or not square:
        return 0
    return a.num_hidden_layers * 2 * a.hidden_size**2


def matshrink(a: Architecture) -> int:
    """A head's block of V, and of what no rotation turns of K."""
    unrotated = a.unrotated if a.qk_norm is None else 0
    return a.num_hidden_layers * a.num_key_value_heads * (a.head_dim**2 + unrotated**2)


def row(name: str, a: Architecture, check: bool) -> str:
    found = limit(a)
    shares = [paper(a), matshrink(a), sum(found.removed.values())]
    cells = [f"{found.removable:,}", *(f"{value / found.removable:.2%}" for value in shares)]
    cells[0] = "at least " * bool(found.at_least) + cells[0]
    if check:
        counted = certify(a)
        before, after = counted.before, counted.after
        cells.append(
            f"{before.free} of {before.parameters}, {counted.expected}{'' if counted.exact else ' at least'}; "
            f"{after.free if after else '-'} of {after.parameters if after else '-'}"
            f"{'' if counted.holds else ' (DOES NOT HOLD)'}"
        )
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    head = ["without information", "paper", "MatShrink", "ours", *(["small copy: before; after"] if check else [])]
    print("| of Mistral-7B's shape | " + " | ".join(head) + " |\n|---|" + "---|" * len(head))
    seconds = {}
    for name, fields in VARIANTS.items():
        start = time.process_time()
        print(row(name, Architecture.from_config(SHAPE | fields), check), flush=True)
        seconds[name] = time.process_time() - start
    print("\n| skipless | " + " | ".join(head[:4]) + " |\n|---|" + "---|" * 4)
    for name in MODELS:
        skipless = dataclasses.replace(count(name).architecture.skipless(), qkv_bias=False)
        print(row(name, skipless, False), flush=True)
    if check:
        quickest, slowest = (find(seconds, key=seconds.__getitem__) for find in (min, max))
        print(f"\nseconds of CPU: {seconds[quickest]:.1f} ({quickest}) to {seconds[slowest]:.1f} ({slowest})")


if __name__ == "__main__":
    main()

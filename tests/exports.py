"""Models to export, of every kind of layer, and how far an engine's logits are from torch's in fp32."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

import skipless
from skipless.bundled import BUNDLED
from skipless.inference import greedy_config
from skipless.serving.decoder import cache_names
from tests.models import build, load, save
from tests.pages import blocks, page

MHA = {"num_key_value_heads": 4}
BIASES = {"attention_bias": True, "mlp_bias": True}
EXPERTS = {"ffn_type": "moe", "num_local_experts": 3, "num_experts_per_tok": 2}
MOST = {"remove": ("stream", "p", "values", "head")}
# fields of the original, the basis of its fused version (None: as it is), and more of what is asked of fuse
CASES: dict[str, tuple[dict[str, Any], str | None, dict[str, Any]]] = {
    "Fig. 4, norms and skips": ({"norm_type": "rms", "residual": "both", "residual_gains": True}, None, {}),
    "by q, tied, biases": ({"tie_word_embeddings": True, **BIASES}, "q", {}),
    "by k, interleaved rope": ({"position_type": "rope_interleaved", **MHA}, "k", {}),
    "by v, fully shaped": ({"attention_shaping": "full", **MHA}, "v", {}),
    "pivoted, wide heads, q/k norm": ({"head_dim": 12, "qk_norm": "head_dim", **BIASES}, "pivoted", {}),
    "parallel, learned positions": (
        {"hidden_size": 64, "block_type": "parallel", "position_type": "learned"},
        "pivoted", {"remove": ("stream", "values", "head")},
    ),
    "experts, everything": ({"hidden_size": 64, **EXPERTS, **BIASES}, "pivoted", MOST),
    "values and queries, a part rotated": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, **BIASES},
        "auto", {"remove": ("values", "queries")},
    ),
    "alibi, shaped by value": ({"position_type": "alibi", "attention_shaping": "value"}, "pivoted", {}),
    "sliding window": ({"sliding_window": 4}, "pivoted", {}),
    "soft caps": ({"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.7}, "q", {}),
}  # fmt: skip


def case(name: str, folder: Path) -> Path:
    """The folder of a case's model, with the bundled model's tokenizer."""
    fields, basis, options = CASES[name]
    model = build(dtype=torch.float32, vocab_size=2048, num_hidden_layers=2, **fields)
    source = save(model, folder / "source")
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copy(file, source)
    if basis is None:
        return source
    skipless.fuse(source, folder / "fused", basis=basis, **{"remove": ("stream", "p"), **options})
    return folder / "fused"


class Padded:
    """Three sequences of 9 tokens, two of them padded on the left, and torch's logits of them in fp32."""

    def __init__(self, source: Path):
        self.model = load(source, torch.float32)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(self.model.config.vocab_size, (3, 9), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.mask[1, :4] = self.mask[2, :1] = 0
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            self.logits = self.model(self.ids, attention_mask=self.mask, position_ids=self.positions).logits

    def inputs(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """The inputs of a step that gives these tokens."""
        return {
            "input_ids": self.ids[:, start:stop].numpy(),
            "attention_mask": self.mask[:, :stop].numpy(),
            "position_ids": self.positions[:, start:stop].numpy(),
        }

    def cache(self) -> dict[str, np.ndarray]:
        """An empty one."""
        config = self.model.config
        empty = np.zeros((3, config.num_key_value_heads, 0, config.head_dim), np.float32)
        return dict.fromkeys(cache_names(config, "past_key_values"), empty)

    def error(self, logits: np.ndarray) -> float:
        """Of logits of all tokens, the largest difference, relative to a token's largest; padding does not matter."""
        return relative_error(torch.from_numpy(logits), self.logits)[self.mask.bool()].max().item()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of each token's logits, the largest difference, relative to the largest of them."""
    return (found.double() - expected.double()).abs().amax(-1) / expected.double().abs().amax(-1)


def greedy(source: Path, ids: torch.Tensor, tokens: int) -> list[int]:
    """What HuggingFace's generate adds to ids (1, T) in fp32."""
    model = load(source, torch.float32)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy_config(tokens))
    return output.sequences[0, ids.shape[1] :].tolist()


def documented(name: str, engine: str, folder: Path) -> list[str]:
    """The Python that a page of docs/ shows for an engine, with this folder for the one it exports to."""
    section = page(name).partition(f"## {engine}\n")[2].partition("\n## ")[0]
    return [block.text.replace(f"fused-{engine.lower()}", str(folder)) for block in blocks(section, "python")]

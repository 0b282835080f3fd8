"""Functions that are not A's, though they look like it: every one was once called the same.

Each is a change to a model folder. `fields`: of the tiny model that it is tried on; `generation`: whether it differs
only in what generation reads.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from skipless.model import SkiplessForCausalLM
from tests.models import build, edit_config


@dataclass(frozen=True)
class Other:
    change: Callable[[Path], None]
    fields: dict[str, Any] = field(default_factory=dict)
    generation: bool = False

    @torch.no_grad()
    def model(self, dtype: str) -> SkiplessForCausalLM:
        """The original; one row of its head is far larger than the others, so that theirs look small."""
        model = build(**self.fields)
        model.lm_head.weight[0] *= 100
        return model.to(getattr(torch, dtype))


def tensors_of(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def permute_head(folder: Path) -> None:
    """All but the large one."""

    def change(tensors):
        head = tensors["lm_head.weight"]
        tensors["lm_head.weight"] = torch.cat([head[:1], head[1:].roll(1, 0)])

    tensors_of(folder, change)


def scale_row(folder: Path, name: str, row: int, factor: float) -> None:
    tensors_of(folder, lambda tensors: tensors[name][row].mul_(factor))


def replace_positions(folder: Path) -> None:
    """Those beyond what a sample reaches."""

    def change(tensors):
        table = tensors["model.position_embeddings.weight"]
        table[-4:] = table[-4:].flip(1)

    tensors_of(folder, change)


def other_experts(folder: Path) -> None:
    """Each token goes to the expert after its own."""

    def change(tensors):
        name = "model.layers.2.mlp.router.weight"
        tensors[name] = tensors[name].roll(1, 0)

    tensors_of(folder, change)


def all_by_a_hundredth(folder: Path) -> None:
    def change(tensors):
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = (tensor.double() * 1.01).to(tensor.dtype)

    tensors_of(folder, change)


def rope(folder: Path, theta: float) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, rope_parameters={**config["rope_parameters"], "rope_theta": theta})


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


# More tokens than a sample has, and fewer columns, so that no test takes long.
MANY = {"vocab_size": 6000, "hidden_size": 16, "head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
OTHERS = {
    "the head's rows in another order": Other(permute_head),
    "positions beyond the sampled ones": Other(replace_positions, {"position_type": "learned"}),
    "a sliding window": Other(
        lambda folder: edit_config(folder, sliding_window=2048), {"max_position_embeddings": 4096}
    ),
    "fewer positions": Other(lambda folder: edit_config(folder, max_position_embeddings=30)),
    "rope_theta 10001": Other(lambda folder: rope(folder, 10001.0)),
    "rope_theta 11000": Other(lambda folder: rope(folder, 11000.0)),
    "tanh in place of erf": Other(
        lambda folder: edit_config(folder, hidden_act="gelu_pytorch_tanh"), {"hidden_act": "gelu"}
    ),
    "every weight off by 1 %": Other(all_by_a_hundredth),
    "an embedding off by 3 %": Other(lambda folder: scale_row(folder, "model.embed_tokens.weight", 7, 1.03)),
    "an embedding that no sample reads": Other(
        lambda folder: scale_row(folder, "model.embed_tokens.weight", 5500, -1.0), MANY
    ),
    "other experts": Other(other_experts, {"ffn_type": "moe", "num_local_experts": 4, "num_experts_per_tok": 1}),
    "other code": Other(lambda folder: write(folder, "modeling_skipless.py", "class SkiplessForCausalLM:\n    pass\n")),
    "another end": Other(lambda folder: edit_config(folder, eos_token_id=5), generation=True),
    "another beginning": Other(lambda folder: edit_config(folder, bos_token_id=5), generation=True),
    "another padding": Other(lambda folder: edit_config(folder, pad_token_id=5), generation=True),
    "another generation_config": Other(
        lambda folder: write(folder, "generation_config.json", '{"eos_token_id": 3}'), generation=True
    ),
    "another tokenizer": Other(
        lambda folder: write(folder, "special_tokens_map.json", '{"eos_token": "x"}'), generation=True
    ),
}

"""ExecuTorch: one program for phones and small devices, computed by XNNPACK where it can.

It takes tokens (1, T), T from 1 to PROMPT, and the position of the first, (1,); keeps the cache to itself; and gives
the logits of the last token, (1, 1, vocab). ExecuTorch's own runner of language models asks for no more.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import nn
from transformers import PreTrainedModel

from skipless.errors import InputError
from skipless.model.modeling_skipless import CACHE
from skipless.quiet import errors_only
from skipless.serving.decoder import load_decoder

MODEL = "model.pte"
WEIGHTS = ("f32",)
# Tokens that the cache holds at most, and that are given at once: memory for so many is planned from the start.
CONTEXT, PROMPT = 4096, 128
# And of the prompt that the program is traced with: of one or two, torch would take the number for a constant.
EXAMPLE = 3


class Kept:
    """A cache of fixed length, among a module's buffers: (1, K, length, h) for each layer's keys and values."""

    def __init__(self, module: nn.Module, positions: torch.Tensor):
        self.module, self.positions = module, positions

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a layer, those of the tokens given in their places."""
        keys, values = (self.module.get_buffer(f"{kind}_{layer_idx}") for kind in ("key", "value"))
        return keys.index_copy_(2, self.positions, key), values.index_copy_(2, self.positions, value)


class Step(nn.Module):
    """Tokens and the first one's position -> logits of the last one; the cache is in buffers, of `length` tokens."""

    def __init__(self, model: PreTrainedModel, length: int):
        super().__init__()
        self.model, self.length, config = model, length, model.config
        cache = torch.zeros(1, config.num_key_value_heads, length, config.head_dim)
        for layer in range(config.num_hidden_layers):
            for kind in ("key", "value"):
                self.register_buffer(f"{kind}_{layer}", cache.clone(), persistent=False)

    def forward(self, tokens: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1]) + start
        keys, queries = torch.arange(self.length), positions[:, None]
        seen = keys <= queries
        if (window := self.model.config.sliding_window) is not None:
            seen = seen & (keys > queries - window)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        cache = {CACHE: Kept(self, positions)}
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions[None]}
        return self.model(**given, logits_to_keep=1, use_cache=True, **cache).logits


def write(source: Path, folder: Path, weights: str) -> None:
    """The skipless model folder `source` as one program in `folder`. Raises InputError."""
    model = load_decoder(source, torch.float32).model.eval()
    if model.config.ffn_type == "moe":
        raise InputError(
            "config.json: ffn_type: expected 'mlp' or 'glu' for executorch, which plans all memory beforehand; found "
            "'moe', where how many tokens an expert gets depends on the data"
        )
    length = min(model.config.max_position_embeddings, CONTEXT)
    longest = min(PROMPT, length)
    if longest < EXAMPLE:
        raise InputError(
            f"config.json: max_position_embeddings: expected {EXAMPLE} at least for executorch, found {length}"
        )
    example = torch.zeros(1, EXAMPLE, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    shapes = {1: torch.export.Dim("tokens", min=1, max=longest)}, None
    with errors_only("torch"), errors_only("executorch"), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(Step(model, length), example, dynamic_shapes=shapes)
        lowered = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods=described(model, length, longest)
        ).to_executorch()
    with (folder / MODEL).open("wb") as file:
        lowered.write_to_file(file)


def described(model: PreTrainedModel, length: int, longest: int) -> dict[str, Any]:
    """What the runner asks of a program."""
    tokens = model.generation_config
    eos = tokens.eos_token_id if isinstance(tokens.eos_token_id, list) else [tokens.eos_token_id]
    found = {
        "get_vocab_size": model.config.vocab_size,
        "get_max_context_len": length,
        "get_max_seq_len": longest,
        "get_bos_id": tokens.bos_token_id,
        "get_eos_ids": None if eos == [None] else eos,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    return {name: value for name, value in found.items() if value is not None}

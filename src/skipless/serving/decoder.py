"""A model as exporters see it: tensors in, tensors out, the cache among both, and no weight rounded on the way.

Shapes: B batch, T tokens given, S tokens in the cache and given, K key-value heads, h head_dim.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from skipless.algebra.tolerances import dtype_name
from skipless.errors import InputError
from skipless.inference import load
from skipless.model.modeling_skipless import CACHE, ropes_by_length


class Grown:
    """A cache that is given, and keeps what it becomes: (B, K, S, h) for each layer's keys and values, in turn."""

    def __init__(self, past: tuple[torch.Tensor, ...]):
        self.past = past
        self.present: list[torch.Tensor] = []

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, with those of the tokens given; called layer by layer."""
        past_key, past_value = self.past[2 * layer_idx : 2 * layer_idx + 2]
        grown = torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)
        self.present += grown
        return grown


class Decoder(nn.Module):
    """input_ids (B, T), attention_mask (B, S), position_ids (B, T) and the cache -> logits (B, T, vocab) and the cache.

    The mask is made here, of operations that every exporter knows. A padding token sees itself: with nothing to see,
    its softmax would be 0 / 0.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.window: int | None = model.config.sliding_window

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        keys = torch.arange(attention_mask.shape[1])
        queries = keys[-input_ids.shape[1] :, None]
        seen = keys <= queries
        if self.window is not None:
            seen = seen & (keys > queries - self.window)
        seen = seen & attention_mask[:, None, None, :].bool() | (keys == queries)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        cache = Grown(past)
        outputs = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=True, **{CACHE: cache}
        )
        return outputs.logits, *cache.present


class Widened(nn.Module):
    """A weight that is stored in 16 bits, and computed with in 32."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.float()


def load_skipless(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A skipless model folder. Raises InputError for what does not load, for other models, and for weights that `dtype`
    cannot hold, or that are no numbers.
    """
    model = load(folder, dtype)
    if model.config.model_type != "skipless":
        raise InputError(
            f"{folder}: expected a skipless model, found model_type {model.config.model_type!r}; optimum exports others"
        )
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise InputError(
                f"{name}: expected numbers that {dtype_name(dtype)} holds, found NaN or infinity; store them in f32 or "
                f"bf16"
            )
    return model


def check_fixed_angles(config: Any) -> None:
    """Raise InputError where RoPE's angles depend on how long the sequence is."""
    for parameters in ropes_by_length(config):
        raise InputError(
            f"config.json: rope_parameters.rope_type: expected one whose angles do not depend on the length of the "
            f"sequence, found {parameters['rope_type']!r}, which a graph of fixed angles cannot be"
        )


def load_decoder(folder: Path, stored: torch.dtype, rest: torch.dtype | None = None) -> Decoder:
    """A skipless model folder, its weights in the dtype `stored`, all arithmetic in fp32.

    rest: the dtype of rest_proj where config.json does not say one [default: what load gives it]. Raises InputError for
    what does not load, and for other models.
    """
    model = load_skipless(folder, stored)
    check_fixed_angles(model.config)
    if len(kinds := set(model.config.attention_kinds)) > 1:
        raise InputError(
            f"config.json: layer_types: expected one kind, so that one mask serves all; found {sorted(kinds)}"
        )
    if rest is not None and model.config.rest_dtype is None:
        for layer in model.model.layers:
            if layer.self_attn.rest_proj is not None:
                layer.self_attn.rest_proj.to(rest)
    for module in list(model.modules()):
        if isinstance(module, PreTrainedModel):
            module.loss_function = None  # tracers look at every property, and this one warns that it had to choose
        if isinstance(module, nn.Embedding):  # widening the rows looked up is cheaper than the table
            module.register_forward_hook(lambda module, inputs, output: output.float())
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.dtype != torch.float32 and not (isinstance(module, nn.Embedding) and name == "weight"):
                parametrize.register_parametrization(module, name, Widened(), unsafe=True)
    return Decoder(model)


def cache_names(config: Any, prefix: str) -> list[str]:
    """The names that readers of exported models expect of the cache, after "past_key_values" or "present"."""
    layers = range(config.num_hidden_layers)
    return [f"{prefix}.{layer}.{kind}" for layer in layers for kind in ("key", "value")]


def example(decoder: Decoder) -> tuple[torch.Tensor, ...]:
    """Inputs to trace with: no size is 1, or another's, as tracers take such for constants."""
    config, batch, past, tokens = decoder.model.config, 2, 3, 4
    positions = torch.arange(past, past + tokens).expand(batch, tokens)
    cache = torch.zeros(batch, config.num_key_value_heads, past, config.head_dim)
    return (
        torch.zeros(batch, tokens, dtype=torch.long),
        torch.ones(batch, past + tokens, dtype=torch.long),
        positions,
        *(cache.clone() for _ in cache_names(config, "")),
    )

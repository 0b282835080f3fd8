"""The model for vLLM: its Transformers backend around the model file, and the parts that backend does not know.

The backend keeps the model file's forward and replaces linears, embeddings and attention by vLLM's. It leaves out what
only a fused model has: a head that is partly the stream itself, values of which some pass through, a rest_proj wider
than the others in precision; and ALiBi.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from skipless.model.modeling_skipless import SkiplessAttention, alibi_slopes


class SplitHeads(nn.Module):
    """A rank's share of all heads, which are the last dimension."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        share = states.shape[-1] // get_tensor_model_parallel_world_size()
        return states.narrow(-1, get_tensor_model_parallel_rank() * share, share)


class GatherHeads(nn.Module):
    """All ranks' heads, of each rank's own; they are the last dimension."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return tensor_model_parallel_all_gather(states)


class PlainWeight(nn.Module):
    """The weight of a linear that the model file reads itself: vLLM's would pack it into another layout."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.in_features = inputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)


class SkiplessForCausalLM(TransformersForCausalLM):
    """SkiplessModel in vLLM, with its head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        vocabulary, passed = self.config.vocab_size, self.config.hidden_size
        scale, cap = self.config.logit_scale, self.config.final_logit_softcapping
        # vLLM scales what it has capped; the model caps what it has scaled
        self.logits_processor = LogitsProcessor(
            vocabulary, logits_as_input=self.config.head_removed, scale=scale, soft_cap=cap and cap / scale
        )
        if self.config.head_removed:
            name = maybe_prefix(prefix, "lm_head")
            self.lm_head = ParallelLMHead(vocabulary - passed, passed, quant_config=self.quant_config, prefix=name)
            self.lm_head.register_buffer("column_order", torch.arange(vocabulary, dtype=torch.int32))
            self.other_logits = LogitsProcessor(vocabulary - passed)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        if not self.config.head_removed:
            return super().compute_logits(hidden_states)
        logits = self.other_logits(self.lm_head, hidden_states)
        if logits is None:  # gathered on another rank
            return None
        logits = torch.cat((hidden_states, logits), -1).index_select(-1, self.lm_head.column_order)
        return self.logits_processor(self.lm_head, logits)

    def recursive_replace(self) -> None:
        """The backend's replacement of modules, and then of those that need another one."""
        super().recursive_replace()
        for name, attention in self.model.named_modules(prefix="model"):
            if isinstance(attention, SkiplessAttention):
                self.replace_special(attention, name)

    def replace_special(self, attention: Any, name: str) -> None:
        """Give an attention module vLLM's ranks, and the projections that it reads in its own way."""
        attention.split_heads, attention.gather_heads = SplitHeads(), GatherHeads()
        for order, projection in (("key_order", "k_proj"), ("value_order", "v_proj")):
            if getattr(attention, order) is not None:
                linear = getattr(attention, projection)
                setattr(attention, projection, PlainWeight(linear.input_size, linear.output_size))
        if self.config.rest_dtype is not None and attention.rest_proj is not None:
            linear = attention.rest_proj
            attention.rest_proj = ReplicatedLinear(
                linear.input_size,
                linear.output_size,
                bias=linear.bias is not None,
                params_dtype=getattr(torch, self.config.rest_dtype),
                prefix=f"{name}.rest_proj",
                return_bias=False,
            )

    def _get_attn_cls(self) -> Any:
        """The attention of vLLM; it adds ALiBi's bias itself, which the model file would put into the mask."""
        if self.config.position_type != "alibi":
            return super()._get_attn_cls()
        self.model.alibi = False
        slopes = torch.tensor(alibi_slopes(self.config.num_attention_heads))
        if self.config.attention_shaping == "full":
            slopes = nn.functional.pad(slopes.view(self.config.num_key_value_heads, -1), (0, 1)).flatten()
        return partial(Attention, alibi_slopes=SplitHeads()(slopes).tolist())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load, and refuse a checkpoint that lacks an order, since vLLM itself asks for parameters only."""
        loaded = super().load_weights(weights)
        for name, _ in self.named_buffers():
            if name.endswith("_order") and name not in loaded:
                raise ValueError(f"{name}: expected in the checkpoint, not found; the folder is damaged")
        return loaded

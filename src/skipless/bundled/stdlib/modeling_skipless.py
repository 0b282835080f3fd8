"""A decoder-only transformer without skip connections, with or without the weights such a model can do without.

Serial layer (arXiv:2404.12362, Fig. 1): attention -> P (o_proj) -> M (gate/up) -> activation -> O (down_proj) -> next.
Parallel layer (Fig. 3): attention and FFN read the same stream, and their outputs are added. Skips and norms, where the
config asks for them, stand as in Fig. 4, with trainable gains as in arXiv:2311.01906.
A closed stream seam leaves out q_proj (or k_proj, v_proj): the stream itself is then the query (key, value).
Pivoted, it leaves out all three: d of their outputs are the stream itself, rest_proj computes the others from it.
A closed P-M seam leaves out o_proj: the concatenated heads feed gate_proj and up_proj directly. Closed value, query,
head and wide P-M seams leave out a square block of v_proj, k_proj, lm_head and o_proj: an index tensor says which
inputs or outputs are passed through. With first_layer_removed, layer 0 takes what it makes of a token before any
attention from the token's row of the table (arXiv:2402.13388).

Shapes: B batch, T tokens, d hidden_size, R the width of the token table, H query heads, K key-value heads, g = H / K
queries per group, h head_dim.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import initialization
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_skipless import ROPE_BY_LENGTH, SkiplessConfig

# The cache's name in this release of transformers: "cache" from 5.24 on, "past_key_values" before.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

# Keywords of a forward that attention functions take, or whoever captures outputs; those of continuous batching
# (transformers' PagedAttentionArgs) and of vLLM's backend among them.
ATTENTION_KEYWORDS = frozenset(
    {
        *TransformersKwargs.__annotations__, "attention_instances", "block_table", "logits_indices",
        "logits_processor_args", "max_seqlen_q", "max_seqlen_k", "read_index", "write_index",
    }
)  # fmt: skip
# Keywords that only the loss takes.
LOSS_KEYWORDS = frozenset({"num_items_in_batch", "ignore_index", "shift_labels"})


def check_keywords(keywords: dict[str, Any], known: frozenset[str]) -> None:
    """Refuse keywords that nothing here reads: TypeError, as of a function without **kwargs."""
    for name in keywords:
        if name not in known:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache, whichever of its two names it came by. Raises TypeError if it came by both."""
    if past_key_values is not None and cache is not None:
        raise TypeError("forward() got both past_key_values and cache, which are two names of one argument; pass one")
    return past_key_values if cache is None else cache


def rotary_frequencies(
    config: SkiplessConfig, kind: str, device: torch.device, length: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """RoPE's angles by position, (rotary_dim / 2) in fp32, and by what cosine and sine are multiplied: exactly those of
    transformers' models. kind: of the layer; length: of the sequence, for types that depend on it.
    """
    parameters = config.rope_of(kind)
    if (rope_type := parameters["rope_type"]) != "default":
        own = kind if kind in config.rope_parameters else None
        return ROPE_INIT_FUNCTIONS[rope_type](config, device, seq_len=length, layer_type=own)
    rotated = config.rotated(parameters)
    exponent = torch.arange(0, rotated, 2, device=device, dtype=torch.float32) / rotated
    return 1.0 / parameters["rope_theta"] ** exponent, 1.0


def rotary_cos_sin(
    position_ids: torch.Tensor, config: SkiplessConfig, dtype: torch.dtype, kind: str = "full_attention"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of RoPE's angles, (B, 1, T, rotary_dim / 2) each (arXiv:2104.09864, eq. 15), in layers of a kind;
    angles in fp32 at least.

    Computed from the config at every call rather than kept as a buffer, which casting the model would round.
    """
    by_length = config.rope_of(kind)["rope_type"] in ROPE_BY_LENGTH
    length = position_ids.max() + 1 if by_length else None  # as transformers has it, whose arithmetic differs by type
    frequency, scale = rotary_frequencies(config, kind, position_ids.device, length)
    wide = torch.promote_types(dtype, torch.float32)
    angle = (position_ids[..., None].to(wide) * frequency.to(wide))[:, None]
    return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)


def ropes_by_length(config: SkiplessConfig) -> list[dict[str, Any]]:
    """RoPE's parameters of the kinds of layers in which angles depend on how long the sequence is."""
    rotates = config.position_type.startswith("rope")
    ropes = [config.rope_of(kind) for kind in sorted(set(config.attention_kinds))] if rotates else []
    return [parameters for parameters in ropes if parameters["rope_type"] in ROPE_BY_LENGTH]


def exchanged(order: torch.Tensor, size: int) -> torch.Tensor:
    """Of each head, all of 0..size-1, after i has changed places with order[i]: of an order (K, w), (K, size)."""
    first = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    every = torch.arange(size, device=order.device).repeat(len(order), 1).scatter(-1, order.long(), first)
    return torch.cat((order.to(every.dtype), every[:, order.shape[-1] :]), -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the first 2 * cos.shape[-1] dimensions of x (B, heads, T, h), in pairs (i, i + half) or (2i, 2i + 1)."""
    half = cos.shape[-1]
    rotated, kept = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :half], rotated[..., half:]
    first, second = first * cos - second * sin, second * cos + first * sin
    rotated = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((rotated, kept), -1)


def alibi_slopes(heads: int) -> list[float]:
    """Slope of each head i of n (arXiv:2108.12409): 2^(-8 i / n).

    Where n is no power of two, the heads beyond the last such power take every second slope of twice as many heads.
    """
    whole = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / whole) for i in range(1, whole + 1)]
    return slopes + [2 ** (-4 * i / whole) for i in range(1, 2 * (heads - whole), 2)]


def alibi_mask(
    mask: torch.Tensor | None, position_ids: torch.Tensor, config: SkiplessConfig, dtype: torch.dtype
) -> torch.Tensor:
    """A causal mask (B, 1, T, S), boolean or to be added, plus every head's slope times the distance (B, H, T, S).

    A constant along a query's keys does not matter: keys may be counted from where the cache begins.
    """
    if mask is None:
        raise ValueError(
            f"position_type: 'alibi' is in the mask, and attention by {config._attn_implementation!r} takes none; use "
            f"attn_implementation 'sdpa' or 'eager', or in vLLM the plugin that pip install skipless brings"
        )
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    wide = torch.promote_types(dtype, torch.float32)
    slopes = torch.tensor(alibi_slopes(config.num_attention_heads), device=mask.device, dtype=wide)
    if config.attention_shaping == "full":  # the zero query of each group asks for the mean
        slopes = nn.functional.pad(slopes.view(config.num_key_value_heads, -1), (0, 1)).flatten()
    distance = torch.arange(mask.shape[-1], device=mask.device) - position_ids[:, None, :, None]
    biased = mask + (slopes[:, None, None] * distance).to(dtype)
    return biased.masked_fill(mask < 0, torch.finfo(dtype).min)


def every_pair(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask function (transformers.masking_utils) that hides nothing."""
    return query >= 0


class SkiplessNorm(nn.Module):
    """RMS or layer norm over the last dimension, in fp32 at least; its gain may have been folded into what reads it."""

    def __init__(self, config: SkiplessConfig, size: int, norm_type: str, name: str = ""):
        super().__init__()
        self.norm_type, self.eps, self.offset = norm_type, config.norm_eps, config.gain_offset
        gain = name not in config.gains_removed
        self.register_parameter("weight", nn.Parameter(torch.ones(size)) if gain else None)
        biased = gain and (norm_type == "layer" if config.norm_bias is None or name == "" else config.norm_bias)
        self.register_parameter("bias", nn.Parameter(torch.zeros(size)) if biased else None)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        if self.norm_type == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.offset and self.weight is not None:  # beside which a weight of few bits would be lost
            normed = (wide * (self.offset + self.weight.to(wide.dtype))).to(hidden_states.dtype)
        else:
            normed = wide.to(hidden_states.dtype)
            normed = normed if self.weight is None else normed * self.weight
        return normed if self.bias is None else normed + self.bias


class SkiplessLayerNorm(SkiplessNorm):
    """A layer norm. A class of its own, because vLLM takes all norms of a class for RMS norms when the first is one."""


def norm_of(config: SkiplessConfig, name: str) -> SkiplessNorm | None:
    """The norm of this name, or None where there is none."""
    norm = SkiplessLayerNorm if config.norm_type == "layer" else SkiplessNorm
    return norm(config, config.hidden_size, config.norm_type, name) if config.has_norm(name) else None


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention spelled out; softmax in fp32 at least (fp64 stays fp64)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Heads(nn.Identity):
    """Where tensor parallelism leaves each rank its part of all heads (split), or all ranks' parts (gather).

    The heads are the last dimension. No linear layer can do it where the queries are the stream, or where M reads them.
    """

    def __init__(self, config: SkiplessConfig):
        super().__init__()
        self.groups = config.num_key_value_heads


class HeadsParallel(TensorParallelLayer):
    """The style of a tp_plan for Heads: from how they come to how they leave. Needs transformers 5.16 or newer."""

    def __init__(self, before: Replicate | Shard, after: Replicate | Shard):
        self.before, self.after = before, after

    def prepare_module_tp(self, *args: Any, **kwargs: Any) -> None:
        """What releases of transformers before 5.16 call."""
        raise RuntimeError("tensor parallelism: a skipless model needs transformers 5.16 or newer for it; update it")

    def install_forward(self, module: Heads, mesh: Any) -> nn.Module:
        if module.groups % mesh.size():
            raise ValueError(
                f"num_key_value_heads: expected a multiple of the {mesh.size()} ranks of tensor parallelism, found "
                f"{module.groups}"
            )
        return super().install_forward(module, mesh)

    def transform_output_post_forward(self, module: Heads, output: torch.Tensor, mesh: Any) -> torch.Tensor:
        states = DTensor.from_local(output, mesh, [self.before], run_check=False)
        return states.redistribute(placements=[self.after]).to_local()


ALL_PARALLEL_STYLES.register("split_heads", HeadsParallel(Replicate(), Shard(-1)))
ALL_PARALLEL_STYLES.register("gather_heads", HeadsParallel(Shard(-1), Replicate()))


class SkiplessAttention(nn.Module):
    """Grouped-query attention, with optional shaping, some of whose projections' columns may be the identity."""

    def __init__(self, config: SkiplessConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        # "full" shaping asks one more question per group, a zero query, whose answer is the causal mean of the values
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads + (config.attention_shaping == "full")
        multiplier = config.attention_multiplier
        self.scaling = self.head_dim**-0.5 if multiplier is None else float(multiplier)
        self.attention_dropout = 0.0
        self.is_causal = True

        stream_basis = None if layer_idx in config.layers_open else config.stream_basis
        query_width, value_width = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.widths = (query_width, value_width, value_width)[: 2 if config.values_removed else 3]
        bias = config.attention_bias or config.qkv_bias
        p_bias = config.attention_bias or f"model.layers.{layer_idx}.self_attn.o_proj" in config.folded_biases
        self.row = config.row if config.first_layer_removed and layer_idx == 0 else {}
        rest_proj, column_order, key_order, value_order, row_order = None, None, None, None, None
        pivoted = "" if stream_basis != "pivoted" else "qk" if config.values_removed else "qkv"
        if pivoted:
            column_order = torch.arange(config.hidden_size + config.rest_width, dtype=torch.int32)
            if config.rest_width and not self.row:
                dtype = torch.get_default_dtype()
                if config.rest_dtype is not None:  # loading casts into the dtype that a parameter was made with
                    dtype = torch.promote_types(dtype, getattr(torch, config.rest_dtype))
                rest_proj = nn.Linear(config.hidden_size, config.rest_width, bias, dtype=dtype)
        self.register_module("rest_proj", rest_proj)
        for name, width in (("q", query_width), ("k", value_width), ("v", value_width)):
            gone = name in pivoted or name == stream_basis or name in self.row
            blocks = {"v": config.values_removed * self.head_dim, "k": config.keys_removed * config.unrotated}
            passed = blocks.get(name, 0)
            outputs = self.num_key_value_heads * passed or width
            linear = None if gone else nn.Linear(config.hidden_size - passed, outputs, bias and not passed)
            self.register_module(f"{name}_proj", linear)
            if name == "k":
                rotated = nn.Linear(config.hidden_size, width - outputs, bias) if outputs < width else None
                self.register_module("k_rope_proj", rotated)
        if config.values_removed and not self.row:
            value_order = torch.arange(self.head_dim, dtype=torch.int32).repeat(self.num_key_value_heads, 1)
        if config.keys_removed:
            key_order = torch.arange(config.unrotated, dtype=torch.int32).repeat(self.num_key_value_heads, 1)
        if config.p_removed and config.p_rows:
            row_order = torch.arange(query_width, dtype=torch.int32)
        self.o_proj = nn.Linear(config.p_rows, config.hidden_size, p_bias) if config.p_rows else None
        self.register_buffer("column_order", column_order)
        self.register_buffer("key_order", key_order)
        self.register_buffer("value_order", value_order)
        self.register_buffer("row_order", row_order)
        for name, width in (("q_norm", query_width), ("k_norm", value_width)):
            size = self.head_dim if config.qk_norm == "head_dim" else width
            self.register_module(name, SkiplessNorm(config, size, "rms") if config.qk_norm else None)
        gains = {None: (), "value": ("alpha", "beta"), "full": ("alpha", "beta", "gamma")}[config.attention_shaping]
        for name in gains:
            self.register_parameter(name, nn.Parameter(torch.empty(self.num_heads)))
        self.split_heads, self.gather_heads = Heads(config), Heads(config)
        # what only some attention functions know
        sliding = config.attention_kinds[layer_idx] == "sliding_attention"
        window = config.sliding_window if sliding else None
        options = {"softcap": config.attn_logit_softcapping, "sliding_window": window}
        self.options = {name: value for name, value in options.items() if value is not None}

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query, key and value, (B, T, heads * h) each, of the stream (B, T, d), or of rows of the table (B, T, R); of
        the rank's heads, where there are ranks.
        """
        given = split_row(hidden_states, self.row)
        hidden_states = given.get("x", hidden_states)
        if self.column_order is None:
            projected = [self.project_one(name, hidden_states, given) for name in "qkv"[: len(self.widths)]]
        else:
            rest = given.get("rest")
            if self.rest_proj is not None:
                rest = self.rest_proj(hidden_states.to(self.rest_proj.weight.dtype)).to(hidden_states.dtype)
            columns = hidden_states if rest is None else torch.cat((hidden_states, rest), -1)
            placed = columns.index_select(-1, self.column_order).split(self.widths, -1)
            projected = [self.split_heads(states) for states in placed]
        if self.config.values_removed:
            values = given["v"] if "v" in given else self.project_others(hidden_states, self.v_proj, self.value_order)
            projected.append(self.split_heads(values))
        return tuple(projected)

    def project_one(self, name: str, hidden_states: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of query, key and value the one of this name: as the table gives it, the stream itself, or its projection."""
        if name in given:
            return self.split_heads(given[name])
        linear = getattr(self, f"{name}_proj")
        if name == "k" and self.key_order is not None:
            keys = self.split_heads(self.project_others(hidden_states, linear, self.key_order))
            return keys if self.k_rope_proj is None else self.join_heads(self.k_rope_proj(hidden_states), keys)
        return self.split_heads(hidden_states) if linear is None else linear(hidden_states)

    def project_others(self, hidden_states: torch.Tensor, linear: Any, order: torch.Tensor) -> torch.Tensor:
        """Keys or values (B, T, K * h) of which each head's are entries of the stream (B, T, d), those in its order,
        plus a map of the others; of keys, what RoPE does not rotate of them.
        """
        every = exchanged(order, hidden_states.shape[-1])
        ordered = hidden_states.index_select(-1, every.flatten()).unflatten(-1, every.shape)
        passed, others = ordered.split((order.shape[-1], linear.in_features), -1)
        weight = linear.weight.unflatten(0, (self.num_key_value_heads, -1))
        return (passed + torch.einsum("...kn,khn->...kh", others, weight)).flatten(-2)

    def join_heads(self, rotated: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Keys (B, T, K * h) of the rank's heads, of the parts of each that RoPE rotates, and does not."""
        size = self.config.unrotated
        heads = rotated.unflatten(-1, (-1, self.head_dim - size)), others.unflatten(-1, (-1, size))
        return torch.cat(heads, -1).flatten(-2)

    def project_out(self, heads: torch.Tensor) -> torch.Tensor:
        """P: the rank's concatenated heads (B, T, H * h) -> (B, T, d), or all as they are where P has been merged."""
        if self.o_proj is not None and self.row_order is None:
            return self.o_proj(heads)
        heads = self.gather_heads(heads)
        if self.o_proj is None:
            return heads
        passed, others = heads.index_select(-1, self.row_order).split((self.config.hidden_size, self.config.p_rows), -1)
        return passed + self.o_proj(others)

    def shape(self, answers: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Out = alpha v + beta softmax(.) v - gamma mean_causal(v) per head (arXiv:2311.01906, eq. 8, value path).

        answers (B, T, heads * h, head-wise; vLLM gives B * T as one), value (B, K, T, h) at the query's own positions
        -> (B, T, K, g, h).
        """
        batch, groups, tokens, _ = value.shape
        answers = answers.reshape(batch, tokens, groups, self.num_key_value_groups, self.head_dim)
        own = value.transpose(1, 2).unsqueeze(3)
        alpha, beta = (self.split_heads(gain).view(groups, -1, 1) for gain in (self.alpha, self.beta))
        if self.config.attention_shaping == "value":
            return alpha * own + beta * answers
        gamma = self.split_heads(self.gamma).view(groups, -1, 1)
        return alpha * own + beta * answers[..., :-1, :] - gamma * answers[..., -1:, :]

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = kwargs.pop(CACHE, None)
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        projected = self.project(hidden_states)
        if self.config.qk_norm == "heads":
            projected = (self.q_norm(projected[0]), self.k_norm(projected[1]), projected[2])
        query, key, value = (states.view(hidden_shape).transpose(1, 2) for states in projected)
        own_value = value

        if self.config.qk_norm == "head_dim":
            query, key = self.q_norm(query), self.k_norm(key)
        if position_embeddings is not None:
            interleaved = self.config.position_type == "rope_interleaved"
            query = rotate(query, *position_embeddings, interleaved)
            key = rotate(key, *position_embeddings, interleaved)
        if self.config.attention_shaping == "full":
            query = query.unflatten(1, (key.shape[1], -1))
            query = torch.cat((query, torch.zeros_like(query[:, :, :1])), 2).flatten(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        if self.config.position_type == "alibi" and attention_mask is not None:
            attention_mask = self.split_heads(attention_mask.movedim(1, -1)).movedim(-1, 1)

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout,
            scaling=self.scaling,
            **self.options,
            **kwargs,
        )
        if self.config.attention_shaping is not None:
            output = self.shape(output, own_value)
        if self.config.attention_shaping == "full" and weights is not None:
            weights = weights.unflatten(1, (own_value.shape[1], -1))[:, :, :-1].flatten(1, 2)
        output = output.reshape(*input_shape, -1).contiguous()
        return self.project_out(output), weights


def split_row(hidden_states: torch.Tensor, row: dict[str, int]) -> dict[str, torch.Tensor]:
    """The parts of rows of the table (B, T, R), by name; of the stream, for which no parts are named, none."""
    return dict(zip(row, hidden_states.split(list(row.values()), -1), strict=True)) if row else {}


class SkiplessMLP(nn.Module):
    """M, activation, O: an MLP or a gated linear unit. With o_proj merged, its input is the concatenated heads."""

    def __init__(self, config: SkiplessConfig, name: str):
        super().__init__()
        inputs = ffn_inputs(config)

        def linear(matrix: str, in_features: int, out_features: int, bias: bool) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias or f"{name}.{matrix}" in config.folded_biases)

        self.gate_proj = (
            linear("gate_proj", inputs, config.intermediate_size, config.mlp_bias or config.gate_bias)
            if config.ffn_type != "mlp"
            else None
        )
        self.up_proj = linear("up_proj", inputs, config.intermediate_size, config.mlp_bias)
        self.down_proj = linear("down_proj", config.intermediate_size, config.hidden_size, config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(hidden_states)
        return self.down_proj(
            self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(hidden_states)) * up
        )


def ffn_inputs(config: SkiplessConfig) -> int:
    """What M reads: the stream, or, with o_proj merged, the concatenated heads."""
    merged = config.p_removed and config.p_merged
    return config.num_attention_heads * config.head_dim if merged else config.hidden_size


class SkiplessExperts(nn.Module):
    """A router and gated linear units, num_experts_per_tok of which each token takes (arXiv:2401.04088, sec. 2.1)."""

    def __init__(self, config: SkiplessConfig, name: str):
        super().__init__()
        self.top_k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        biased = f"{name}.router" in config.folded_biases
        self.router = nn.Linear(ffn_inputs(config), config.num_local_experts, biased)
        self.experts = nn.ModuleList(
            SkiplessMLP(config, f"{name}.experts.{expert}") for expert in range(config.num_local_experts)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)
        logits = self.router(tokens)
        weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        taken = self.choose(weights)
        weights = weights.gather(-1, taken)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        outputs = torch.zeros_like(hidden_states[..., :1]).flatten(0, -2)
        for index, expert in enumerate(self.experts):
            token, place = torch.where(taken == index)
            answer = expert(tokens[token]) * weights[token, place, None].to(tokens.dtype)
            outputs = outputs + answer.new_zeros(tokens.shape[0], answer.shape[-1]).index_add(0, token, answer)
        return outputs.unflatten(0, hidden_states.shape[:-1])

    def choose(self, weights: torch.Tensor) -> torch.Tensor:
        """The experts that each token takes, (tokens, top_k), by their weights, (tokens, experts)."""
        return weights.topk(self.top_k, dim=-1).indices


class SkiplessDecoderLayer(GradientCheckpointingLayer):
    """Attention, then FFN, or both at once; between them and around them only what the config asks for."""

    def __init__(self, config: SkiplessConfig, layer_idx: int):
        super().__init__()
        name = f"model.layers.{layer_idx}"
        self.parallel = config.block_type == "parallel"
        self.attention_skip = config.residual in ("attention", "both")
        self.ffn_skip = config.residual in ("ffn", "both") and not self.parallel
        self.self_attn = SkiplessAttention(config, layer_idx)
        looked_up = "beside" in self.self_attn.row
        mlp = SkiplessExperts if config.ffn_type == "moe" else SkiplessMLP
        self.mlp: Any = None if looked_up else mlp(config, f"{name}.mlp")
        self.input_layernorm = norm_of(config, f"{name}.input_layernorm")
        self.post_attention_layernorm = norm_of(config, f"{name}.post_attention_layernorm")
        self.attention_output_norm = norm_of(config, f"{name}.attention_output_norm")
        self.ffn_output_norm = None if looked_up else norm_of(config, f"{name}.ffn_output_norm")
        gains = {"attention_gain": True, "ffn_gain": not looked_up}
        gains |= {"attention_skip_gain": self.attention_skip and not looked_up, "ffn_skip_gain": self.ffn_skip}
        for gain, exists in gains.items():
            exists = exists and config.residual_gains
            self.register_parameter(gain, nn.Parameter(torch.ones(1)) if exists else None)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        read = apply(self.input_layernorm, hidden_states)
        attention, _ = self.self_attn(read, **kwargs)
        attention = scale(apply(self.attention_output_norm, attention), self.attention_gain)
        if (beside := self.beside(hidden_states, read)) is not None:
            attention = attention + beside
        if self.parallel:
            return attention
        ffn = self.mlp(apply(self.post_attention_layernorm, attention))
        ffn = scale(apply(self.ffn_output_norm, ffn), self.ffn_gain)
        return ffn + scale(attention, self.ffn_skip_gain) if self.ffn_skip else ffn

    def beside(self, hidden_states: torch.Tensor, read: torch.Tensor) -> torch.Tensor | None:
        """What is added to the attention's output: what a skip passes by, and, of a parallel layer, the FFN's output.

        hidden_states: the stream, or rows of the table; read: the same, as the attention reads it.
        """
        given = split_row(hidden_states, self.self_attn.row)
        if "beside" in given:
            return given["beside"]
        skip = scale(given.get("x", hidden_states), self.attention_skip_gain) if self.attention_skip else None
        if not self.parallel:
            return skip
        norm = self.post_attention_layernorm
        ffn = self.mlp(read if norm is None else norm(hidden_states))
        ffn = scale(apply(self.ffn_output_norm, ffn), self.ffn_gain)
        return ffn if skip is None else skip + ffn


def apply(norm: nn.Module | None, hidden_states: torch.Tensor) -> torch.Tensor:
    """The norm's output, or its input where there is none."""
    return hidden_states if norm is None else norm(hidden_states)


def scale(hidden_states: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """The input times a gain, or as it is where there is none."""
    return hidden_states if gain is None else hidden_states * gain


class SkiplessEmbedding(nn.Embedding):
    """A token table, plus a bias for every token where a tied table could not take one in (identities: seam 0)."""

    def __init__(self, config: SkiplessConfig):
        super().__init__(config.vocab_size, sum(config.row.values()))
        self.multiplier = config.embedding_multiplier
        folded = "model.embed_tokens" in config.folded_biases
        self.register_parameter("bias", nn.Parameter(torch.empty(config.hidden_size)) if folded else None)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeddings = super().forward(input_ids)
        if self.multiplier is not None:  # rounded as embeddings are, as in transformers' Gemma
            embeddings = embeddings * torch.tensor(self.multiplier, dtype=embeddings.dtype, device=embeddings.device)
        return embeddings if self.bias is None else embeddings + self.bias


class SkiplessHead(nn.Linear):
    """The stream -> logits. Of a closed head seam, hidden_size logits are the stream itself, and column_order puts all
    in their places.
    """

    def __init__(self, config: SkiplessConfig):
        passed = config.hidden_size if config.head_removed else 0
        super().__init__(config.hidden_size, config.vocab_size - passed, config.head_bias)
        order = torch.arange(config.vocab_size, dtype=torch.int32) if config.head_removed else None
        self.register_buffer("column_order", order)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = super().forward(hidden_states)
        if self.column_order is None:
            return logits
        return torch.cat((hidden_states, logits), -1).index_select(-1, self.column_order)


class SkiplessPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization common to the skipless models."""

    config: SkiplessConfig
    config_class = SkiplessConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SkiplessDecoderLayer"]
    _skip_keys_device_placement = [CACHE]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": SkiplessDecoderLayer, "attentions": SkiplessAttention}

    def __init__(self, config: SkiplessConfig, *args: Any, **kwargs: Any):
        if config.attn_logit_softcapping is not None:  # between the scores and the softmax PyTorch's kernel has no room
            self._supports_sdpa = False
        if config.position_type == "alibi":  # needs a mask of numbers
            self._supports_flash_attn = self._supports_flex_attn = False
        if config.ffn_type == "moe" or ropes_by_length(config):  # what runs, or rotates by how much, is the data's
            self._can_compile_fullgraph = False
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As for any model, but ValueError naming a tensor that config.json has no place for.

        A checkpoint that has more than its config says, such as a q_proj that should be the identity, is another
        model's. A head may be left out.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for name in sorted(name for name in info["unexpected_keys"] if not name.startswith("lm_head.")):
            raise ValueError(
                f"{name!r}: expected no such tensor with stream_basis {model.config.stream_basis!r} and the other "
                f"fields of config.json, found one; this config.json is another checkpoint's"
            )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Variance 1 / inputs, since no norm will rescale; shaped attention starts as its value path."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        for name, order in module.named_buffers(recurse=False):
            if name.endswith("_order"):
                initialization.copy_(order, torch.arange(order.shape[-1]).expand_as(order))
        if isinstance(module, SkiplessNorm) and module.weight is not None:
            nn.init.constant_(module.weight, 1 - module.offset)
        if isinstance(module, SkiplessDecoderLayer):
            for gain in module.parameters(recurse=False):
                nn.init.ones_(gain)
        if isinstance(module, SkiplessAttention) and self.config.attention_shaping is not None:
            nn.init.ones_(module.alpha)
            if self.config.attention_shaping == "value":
                nn.init.zeros_(module.beta)
            else:
                nn.init.ones_(module.beta)
                nn.init.ones_(module.gamma)


class SkiplessModel(SkiplessPreTrainedModel):
    """Embedding, layers and the norm before the head, if there is one: token ids -> hidden states (B, T, d)."""

    def __init__(self, config: SkiplessConfig):
        super().__init__(config)
        self.embed_tokens = SkiplessEmbedding(config)
        self.position_embeddings = (
            nn.Embedding(config.max_position_embeddings + config.position_offset, config.hidden_size)
            if config.position_type == "learned"
            else None
        )
        self.layers = nn.ModuleList(SkiplessDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.alibi = config.position_type == "alibi"  # in the mask; an engine that adds it to the scores unsets this
        self.embed_norm = norm_of(config, "model.embed_norm")
        self.norm = norm_of(config, "model.norm")
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        check_keywords(kwargs, ATTENTION_KEYWORDS)
        if CACHE != "cache" and cache is not None and not isinstance(cache, Cache):
            kwargs["cache"], cache = cache, None  # of continuous batching: here only attention functions know it
        cache = one_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + past
        kinds = self.config.attention_kinds
        masks: dict[str, Any] = (
            attention_mask if isinstance(attention_mask, dict) else {}
        )  # of layers' kinds, as generation makes them
        for kind in set(kinds) - masks.keys():
            create = create_causal_mask if kind == "full_attention" else create_sliding_window_causal_mask
            masks[kind] = create(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                and_mask_function=every_pair if self.alibi else None,  # so that there is one, for ALiBi to be added to
                **{CACHE: cache},
            )
        if self.alibi:
            masks = {
                kind: alibi_mask(mask, position_ids, self.config, inputs_embeds.dtype) for kind, mask in masks.items()
            }

        hidden_states = apply(self.embed_norm, inputs_embeds)
        if self.position_embeddings is not None:
            hidden_states = hidden_states + self.position_embeddings(position_ids + self.config.position_offset)
        cos_sin: dict[str, Any] = {}
        if self.config.position_type.startswith("rope"):
            cos_sin = {
                kind: rotary_cos_sin(position_ids, self.config, hidden_states.dtype, kind) for kind in set(kinds)
            }
        for kind, layer in zip(kinds, self.layers, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[kind],
                position_embeddings=cos_sin.get(kind),
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        hidden_states = apply(self.norm, hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: cache})


class SkiplessForCausalLM(SkiplessPreTrainedModel, GenerationMixin):
    """The language model: SkiplessModel and lm_head, token ids -> logits (B, T, vocab_size)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: SkiplessConfig):
        super().__init__(config)
        self.model = SkiplessModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = SkiplessHead(config)
        self.post_init()
        if config.head_removed:
            self._tp_plan.pop("lm_head", None)  # column_order places all of its outputs

    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, **kwargs: Any) -> dict[str, Any]:
        """As for any model; but where longrope changes to its long factors, the cache is made anew, as in Phi-3.

        The short factors have rotated what it holds.
        """
        cache = kwargs.get(CACHE)
        for parameters in ropes_by_length(self.config) if cache else ():
            switch = parameters.get("original_max_position_embeddings")
            if switch is not None and cache.get_seq_length() <= switch < input_ids.shape[1]:
                kwargs |= {CACHE: None, "next_sequence_length": None}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        for_loss = {name: kwargs.pop(name) for name in LOSS_KEYWORDS.intersection(kwargs)}
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept, :])
        if (scale := self.config.logit_scale) != 1:
            logits = logits * scale
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * (logits / cap).tanh()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **for_loss)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


__all__ = ["SkiplessForCausalLM", "SkiplessModel", "SkiplessPreTrainedModel"]

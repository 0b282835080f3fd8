"""A decoder-only transformer without skip connections, with or without the weights such a model can do without.

Serial layer (arXiv:2404.12362, Fig. 1): attention -> P (o_proj) -> M (gate/up) -> activation -> O (down_proj) -> next.
A closed stream seam leaves out q_proj (or k_proj, v_proj): the stream itself is then the query (key, value).
Pivoted, it leaves out all three: d of their outputs are the stream itself, rest_proj computes the others from it.
A closed P-M seam leaves out o_proj: the concatenated heads feed gate_proj and up_proj directly.

Shapes: B batch, T tokens, d hidden_size, H query heads, K key-value heads, g = H / K queries per group, h head_dim.
"""

import torch
from torch import nn
from transformers import initialization
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_skipless import SkiplessConfig


def rotary_cos_sin(
    position_ids: torch.Tensor, config: SkiplessConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of RoPE's angles, (B, 1, T, rotary_dim / 2) each (arXiv:2104.09864, eq. 15).

    Computed from the config at every call rather than kept as a buffer, which casting the model would round.
    """
    exponent = torch.arange(0, config.rotary_dim, 2, device=position_ids.device, dtype=torch.float32)
    frequency = config.rope_parameters["rope_theta"] ** (-exponent / config.rotary_dim)
    angle = (position_ids[..., None].float() * frequency)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


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


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention spelled out; softmax in fp32 at least (fp64 stays fp64)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


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
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = 0.0
        self.is_causal = True

        stream_basis = None if layer_idx in config.layers_open else config.stream_basis
        query_width, value_width = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.widths = (query_width, value_width, value_width)
        rest_proj, column_order = None, None
        if stream_basis == "pivoted":
            column_order = torch.arange(sum(self.widths), dtype=torch.int32)
            if config.rest_width:
                dtype = torch.get_default_dtype()
                if config.rest_dtype is not None:  # loading casts into the dtype that a parameter was made with
                    dtype = torch.promote_types(dtype, getattr(torch, config.rest_dtype))
                rest_proj = nn.Linear(config.hidden_size, config.rest_width, config.attention_bias, dtype=dtype)
        self.register_module("rest_proj", rest_proj)
        self.register_buffer("column_order", column_order)
        for name, width in zip("qkv", self.widths, strict=True):
            gone = stream_basis in (name, "pivoted")
            linear = None if gone else nn.Linear(config.hidden_size, width, config.attention_bias)
            self.register_module(f"{name}_proj", linear)
        self.o_proj = None if config.p_removed else nn.Linear(query_width, config.hidden_size, config.attention_bias)
        gains = {None: (), "value": ("alpha", "beta"), "full": ("alpha", "beta", "gamma")}[config.attention_shaping]
        for name in gains:
            self.register_parameter(name, nn.Parameter(torch.empty(self.num_heads)))

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query, key and value, (B, T, heads * h) each, of the stream (B, T, d)."""
        if self.column_order is None:
            linears = (self.q_proj, self.k_proj, self.v_proj)
            return tuple(hidden_states if linear is None else linear(hidden_states) for linear in linears)
        columns = hidden_states
        if self.rest_proj is not None:
            rest = self.rest_proj(hidden_states.to(self.rest_proj.weight.dtype))
            columns = torch.cat((hidden_states, rest.to(hidden_states.dtype)), -1)
        return columns.index_select(-1, self.column_order).split(self.widths, -1)

    def shape(self, answers: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Out = alpha v + beta softmax(.) v - gamma mean_causal(v) per head (arXiv:2311.01906, eq. 8, value path).

        answers (B, T, heads * h, head-wise), value (B, K, T, h) at the query's own positions -> (B, T, H, h).
        """
        batch, tokens = answers.shape[:2]
        grouped = (batch, tokens, self.num_key_value_heads, -1, self.head_dim)
        answers = answers.reshape(grouped)
        own = value.transpose(1, 2).unsqueeze(3)
        alpha, beta = (gain.view(self.num_key_value_heads, -1, 1) for gain in (self.alpha, self.beta))
        if self.config.attention_shaping == "value":
            return alpha * own + beta * answers
        gamma = self.gamma.view(self.num_key_value_heads, -1, 1)
        return alpha * own + beta * answers[..., :-1, :] - gamma * answers[..., -1:, :]

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query, key, value = (states.view(hidden_shape).transpose(1, 2) for states in self.project(hidden_states))
        own_value = value

        if position_embeddings is not None:
            interleaved = self.config.position_type == "rope_interleaved"
            query = rotate(query, *position_embeddings, interleaved)
            key = rotate(key, *position_embeddings, interleaved)
        if self.config.attention_shaping == "full":
            query = query.unflatten(1, (self.num_key_value_heads, -1))
            query = torch.cat((query, torch.zeros_like(query[:, :, :1])), 2).flatten(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

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
            **kwargs,
        )
        if self.config.attention_shaping is not None:
            output = self.shape(output, own_value)
        if self.config.attention_shaping == "full" and weights is not None:
            weights = weights.unflatten(1, (self.num_key_value_heads, -1))[:, :, :-1].flatten(1, 2)
        output = output.reshape(*input_shape, -1).contiguous()
        return (output if self.o_proj is None else self.o_proj(output)), weights


class SkiplessMLP(nn.Module):
    """M, activation, O: an MLP or a gated linear unit. With o_proj merged, its input is the concatenated heads."""

    def __init__(self, config: SkiplessConfig, layer_idx: int):
        super().__init__()
        inputs = config.num_attention_heads * config.head_dim if config.p_removed else config.hidden_size

        def linear(name: str, in_features: int, out_features: int, bias: bool) -> nn.Linear:
            folded = f"model.layers.{layer_idx}.mlp.{name}" in config.folded_biases
            return nn.Linear(in_features, out_features, bias or folded)

        self.gate_proj = (
            linear("gate_proj", inputs, config.intermediate_size, config.mlp_bias or config.gate_bias)
            if config.ffn_type == "glu"
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


class SkiplessDecoderLayer(GradientCheckpointingLayer):
    """attention, then FFN: nothing is added to or normalized on the way."""

    def __init__(self, config: SkiplessConfig, layer_idx: int):
        super().__init__()
        self.self_attn = SkiplessAttention(config, layer_idx)
        self.mlp = SkiplessMLP(config, layer_idx)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        hidden_states, _ = self.self_attn(hidden_states, **kwargs)
        return self.mlp(hidden_states)


class SkiplessEmbedding(nn.Embedding):
    """A token table, plus a bias for every token where a tied table could not take one in (identities: seam 0)."""

    def __init__(self, config: SkiplessConfig):
        super().__init__(config.vocab_size, config.hidden_size)
        folded = "model.embed_tokens" in config.folded_biases
        self.register_parameter("bias", nn.Parameter(torch.empty(config.hidden_size)) if folded else None)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeddings = super().forward(input_ids)
        return embeddings if self.bias is None else embeddings + self.bias


class SkiplessPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization common to the skipless models."""

    config: SkiplessConfig
    config_class = SkiplessConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SkiplessDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": SkiplessDecoderLayer, "attentions": SkiplessAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Variance 1 / inputs, since no norm will rescale; shaped attention starts as its value path."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, SkiplessAttention) and module.column_order is not None:
            initialization.copy_(module.column_order, torch.arange(len(module.column_order)))
        if isinstance(module, SkiplessAttention) and self.config.attention_shaping is not None:
            nn.init.ones_(module.alpha)
            if self.config.attention_shaping == "value":
                nn.init.zeros_(module.beta)
            else:
                nn.init.ones_(module.beta)
                nn.init.ones_(module.gamma)


class SkiplessModel(SkiplessPreTrainedModel):
    """Embedding and layers: token ids -> the last layer's output (B, T, d)."""

    def __init__(self, config: SkiplessConfig):
        super().__init__(config)
        self.embed_tokens = SkiplessEmbedding(config)
        self.position_embeddings = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size)
            if config.position_type == "learned"
            else None
        )
        self.layers = nn.ModuleList(SkiplessDecoderLayer(config, index) for index in range(config.num_hidden_layers))
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + past
        attention_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )

        hidden_states = inputs_embeds
        if self.position_embeddings is not None:
            hidden_states = hidden_states + self.position_embeddings(position_ids)
        cos_sin = None
        if self.config.position_type.startswith("rope"):
            cos_sin = rotary_cos_sin(position_ids, self.config, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=cos_sin,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


class SkiplessForCausalLM(SkiplessPreTrainedModel, GenerationMixin):
    """The language model: SkiplessModel and lm_head, token ids -> logits (B, T, vocab_size)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SkiplessConfig):
        super().__init__(config)
        self.model = SkiplessModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["SkiplessForCausalLM", "SkiplessModel", "SkiplessPreTrainedModel"]

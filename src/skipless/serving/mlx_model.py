"""A skipless model in MLX, for mlx_lm: what model/modeling_skipless.py computes. It travels with what is exported.

config.json has the fields of a skipless config, and what follows from them (serving/mlx.py, `described`).
Shapes: B batch, T tokens, d hidden_size, R the width of the token table, H query heads, K key-value heads, g = H / K
queries per group, h head_dim.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache
from mlx_lm.models.switch_layers import SwitchLinear

ACTIVATIONS = {
    "silu": nn.silu,
    "swish": nn.silu,
    "relu": nn.relu,
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
}
# How rest_proj is quantized.
REST = {"group_size": 32, "bits": 8}


class ModelArgs(SimpleNamespace):
    """config.json."""

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelArgs":
        """As mlx_lm asks for it."""
        return cls(**config)

    def linear(self, name: str, inputs: int, outputs: int, bias: bool) -> nn.Linear:
        """A matrix, with a bias if all of its kind have one, or if one was folded into it."""
        return nn.Linear(inputs, outputs, bias or name in self.folded_biases)


class Norm(nn.Module):
    """RMS or layer norm over the last dimension, with a gain or without."""

    def __init__(self, args: ModelArgs, size: int, norm_type: str, name: str = ""):
        super().__init__()
        self.norm_type, self.eps, self.offset = norm_type, args.norm_eps, args.gain_offset
        if name not in args.gains_removed:
            self.weight = mx.ones(size)
            if norm_type == "layer" if args.norm_bias is None or not name else args.norm_bias:
                self.bias = mx.zeros(size)

    def __call__(self, x: mx.array) -> mx.array:
        gain = self.get("weight")
        if self.offset and gain is not None:  # beside which a weight of few bits would be lost
            gain = self.offset + gain.astype(mx.float32)
        layer = self.norm_type == "layer"
        normed = mx.fast.layer_norm(x, gain, None, self.eps) if layer else mx.fast.rms_norm(x, gain, self.eps)
        normed = normed.astype(x.dtype)
        return normed + self.bias if "bias" in self else normed


def norm_of(args: ModelArgs, name: str) -> nn.Module:
    """The norm of this name, or what does nothing where there is none."""
    kind = name if name in ("model.embed_norm", "model.norm") else name.rpartition(".")[2]
    there = kind in (args.norms or ()) and name not in args.norms_removed
    return Norm(args, args.hidden_size, args.norm_type, name) if there else nn.Identity()


class Attention(nn.Module):
    """Grouped-query attention, some of whose projections' columns may be the identity."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        d, h, self.heads, self.groups = (
            args.hidden_size, args.head_dim, args.num_attention_heads, args.num_key_value_heads,
        )  # fmt: skip
        self.head_dim, self.shaping, self.qk_norm = h, args.attention_shaping, args.qk_norm
        self.scale = h**-0.5 if args.attention_multiplier is None else args.attention_multiplier
        self.softcap = args.attn_logit_softcapping
        self.passed = d if args.p_removed else 0
        self.row = args.row if args.first_layer_removed and layer == 0 else {}
        name, bias = f"model.layers.{layer}.self_attn", args.attention_bias or args.qkv_bias
        basis = None if layer in args.layers_open else args.stream_basis
        widths = {"q": self.heads * h, "k": self.groups * h, "v": self.groups * h}
        pivoted = "" if basis != "pivoted" else "qk" if args.values_removed else "qkv"
        if pivoted:
            self.column_order = mx.arange(d + args.rest_width)
            self.cuts = [sum(widths[each] for each in pivoted[:end]) for end in range(1, len(pivoted))]
            if args.rest_width and not self.row:
                self.rest_proj = nn.Linear(d, args.rest_width, bias)
        for each, width in widths.items():
            if each not in pivoted and each != basis and each not in self.row:
                passed = {"v": args.values_removed * h, "k": args.keys_removed * args.unrotated}.get(each, 0)
                outputs = self.groups * passed or width
                self[f"{each}_proj"] = nn.Linear(d - passed, outputs, bias and not passed)
                if outputs < width:
                    self.k_rope_proj = nn.Linear(d, width - outputs, bias)
        if args.keys_removed:
            self.key_order = mx.zeros((self.groups, args.unrotated), mx.int32)
        if args.values_removed and not self.row:
            self.value_order = mx.zeros((self.groups, h), mx.int32)
        if args.p_rows:
            self.o_proj = args.linear(f"{name}.o_proj", args.p_rows, d, args.attention_bias)
            if args.p_removed:
                self.row_order = mx.arange(self.heads * h)
        if args.qk_norm:
            for each in "qk":
                self[f"{each}_norm"] = Norm(args, h if args.qk_norm == "head_dim" else widths[each], "rms")
        for gain in {None: (), "value": ("alpha", "beta"), "full": ("alpha", "beta", "gamma")}[self.shaping]:
            self[gain] = mx.ones(self.heads)
        self.rope = args.ropes.get(args.attention_kinds[layer])
        self.interleaved = args.position_type == "rope_interleaved"

    def project(self, x: mx.array) -> list[mx.array]:
        """Query, key and value, (B, T, heads * h) each, of the stream (B, T, d), or of rows of the table (B, T, R)."""
        given = split_row(x, self.row)
        x = given.get("x", x)
        if "column_order" in self:
            rest = [given["rest"]] if "rest" in given else []
            if "rest_proj" in self:
                rest = [self.rest_proj(x).astype(x.dtype)]
            found = [*mx.split(mx.concatenate([x, *rest], -1)[..., self.column_order], self.cuts, -1)]
        else:
            names = "qk" if "value_order" in self else "qkv"
            found = [self.project_one(name, x, given) for name in names]
        if "value_order" in self:
            found.append(self.project_others("v", x, self.value_order))
        elif len(found) < 3:
            found.append(given["v"])
        return found

    def project_one(self, name: str, x: mx.array, given: dict[str, mx.array]) -> mx.array:
        """Of query, key and value the one of this name: as the table gives it, its projection, or the stream itself."""
        if name in given:
            return given[name]
        if name == "k" and "key_order" in self:
            keys = self.project_others(name, x, self.key_order)
            if "k_rope_proj" not in self:
                return keys
            parts = [mx.unflatten(each, -1, (self.groups, -1)) for each in (self.k_rope_proj(x), keys)]
            return mx.concatenate(parts, -1).flatten(-2)
        return self[f"{name}_proj"](x) if f"{name}_proj" in self else x

    def project_others(self, name: str, x: mx.array, order: mx.array) -> mx.array:
        """Key or value, each head the inputs in its order and its projection of the others."""
        passed = order.shape[-1]
        every = mx.broadcast_to(mx.arange(x.shape[-1]), (self.groups, x.shape[-1]))
        every = mx.put_along_axis(every, order, mx.broadcast_to(mx.arange(passed), order.shape), -1)
        ordered = x[..., mx.concatenate([order, every[:, passed:]], -1)]
        weight = mx.unflatten(self[f"{name}_proj"].weight, 0, (self.groups, -1))
        others = mx.einsum("...kn,khn->...kh", ordered[..., passed:], weight)
        return (ordered[..., :passed] + others).flatten(-2)

    def project_out(self, heads: mx.array) -> mx.array:
        """P: the concatenated heads (B, T, H * h) -> (B, T, d), or all as they are where P has been merged."""
        if "o_proj" not in self:
            return heads
        if "row_order" not in self:
            return self.o_proj(heads)
        heads = heads[..., self.row_order]
        return heads[..., : self.passed] + self.o_proj(heads[..., self.passed :])

    def rotate(self, x: mx.array, offset: Any) -> mx.array:
        """RoPE of the first dimensions of x (B, heads, T, h), whose first token stands at `offset`."""
        if self.rope is None:
            return x
        periods, factor = mx.array(self.rope["periods"]), self.rope["factor"]
        size = 2 * len(periods)
        if factor != 1:
            x = mx.concatenate([x[..., :size] * factor, x[..., size:]], -1)
        return mx.fast.rope(
            x, size, traditional=self.interleaved, base=None, scale=1.0, offset=offset, freqs=periods
        )  # fmt: skip

    def attend(self, query: mx.array, key: mx.array, value: mx.array, mask: Any, cache: Any) -> mx.array:
        """Softmax attention, (B, heads, T, h), its scores capped where the config says so."""
        if self.softcap is None:
            return scaled_dot_product_attention(query, key, value, cache, self.scale, mask)
        groups = (key.shape[1], -1)
        scores = mx.unflatten(query * self.scale, 1, groups) @ key[:, :, None].swapaxes(-1, -2)
        scores = self.softcap * mx.tanh(scores / self.softcap)
        if mask is not None:
            if mask.dtype == mx.bool_:
                scores = mx.where(mask if mask.ndim < 4 else mask[:, None], scores, mx.finfo(scores.dtype).min)
            else:
                scores = scores + mx.unflatten(mask, 1, groups)
        return (mx.softmax(scores, -1, precise=True) @ value[:, :, None]).flatten(1, 2)

    def shape(self, answers: mx.array, value: mx.array) -> mx.array:
        """Out = alpha v + beta softmax(.) v - gamma mean_causal(v) per head (arXiv:2311.01906, eq. 8, value path)."""

        def gain(name: str) -> mx.array:
            return self[name].reshape(self.groups, -1, 1, 1)

        answers, own = mx.unflatten(answers, 1, (self.groups, -1)), value[:, :, None]
        if self.shaping == "value":
            return (gain("alpha") * own + gain("beta") * answers).flatten(1, 2)
        answers, mean = answers[:, :, :-1], answers[:, :, -1:]
        return (gain("alpha") * own + gain("beta") * answers - gain("gamma") * mean).flatten(1, 2)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        query, key, value = self.project(x)
        if self.qk_norm == "heads":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (mx.unflatten(each, -1, (-1, self.head_dim)).swapaxes(1, 2) for each in (query, key, value))
        own = value
        if self.qk_norm == "head_dim":
            query, key = self.q_norm(query), self.k_norm(key)
        offset = 0 if cache is None else cache.offset
        query, key = self.rotate(query, offset), self.rotate(key, offset)
        if self.shaping == "full":  # a zero query of each group asks for the mean
            query = mx.pad(mx.unflatten(query, 1, (self.groups, -1)), [(0, 0), (0, 0), (0, 1), (0, 0), (0, 0)])
            query = query.flatten(1, 2)
        if cache is not None:
            key, value = cache.update_and_fetch(key, value)
        heads = self.attend(query, key, value, mask, cache)
        if self.shaping is not None:
            heads = self.shape(heads, own)
        return self.project_out(heads.swapaxes(1, 2).flatten(-2))


def split_row(x: mx.array, row: dict[str, int]) -> dict[str, mx.array]:
    """The parts of rows of the table (B, T, R), by name; of the stream, for which no parts are named, none."""
    ends = [sum(list(row.values())[: number + 1]) for number in range(len(row))]
    return dict(zip(row, mx.split(x, ends[:-1], -1), strict=True)) if row else {}


class MLP(nn.Module):
    """M, activation, O: an MLP or a gated linear unit."""

    def __init__(self, args: ModelArgs, name: str):
        super().__init__()
        self.act = ACTIVATIONS[args.hidden_act]
        inner, bias = args.intermediate_size, args.mlp_bias
        if args.ffn_type == "glu":
            self.gate_proj = args.linear(f"{name}.gate_proj", args.ffn_inputs, inner, bias or args.gate_bias)
        self.up_proj = args.linear(f"{name}.up_proj", args.ffn_inputs, inner, bias)
        self.down_proj = args.linear(f"{name}.down_proj", inner, args.hidden_size, bias)

    def __call__(self, x: mx.array) -> mx.array:
        up = self.up_proj(x)
        return self.down_proj(self.act(self.gate_proj(x)) * up if "gate_proj" in self else self.act(up))


class Experts(nn.Module):
    """A router and gated linear units, num_experts_per_tok of which each token takes (arXiv:2401.04088, sec. 2.1)."""

    def __init__(self, args: ModelArgs, name: str):
        super().__init__()
        self.act, self.taken = ACTIVATIONS[args.hidden_act], args.num_experts_per_tok
        self.normalize = args.norm_topk_prob
        d, f, experts = args.ffn_inputs, args.intermediate_size, range(args.num_local_experts)
        self.router = args.linear(f"{name}.router", d, len(experts), False)
        sizes = {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, args.hidden_size)}
        for matrix, (inputs, outputs) in sizes.items():
            folded = any(f"{name}.experts.{expert}.{matrix}" in args.folded_biases for expert in experts)
            self[matrix] = SwitchLinear(inputs, outputs, len(experts), args.mlp_bias or folded)

    def __call__(self, x: mx.array) -> mx.array:
        weights = mx.softmax(self.router(x), -1, precise=True)
        taken = mx.argpartition(-weights, self.taken - 1, -1)[..., : self.taken]
        weights = mx.take_along_axis(weights, taken, -1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdims=True)
        x = mx.expand_dims(x, (-2, -3))
        found = self.down_proj(self.act(self.gate_proj(x, taken)) * self.up_proj(x, taken), taken)
        return (found.squeeze(-2) * weights[..., None].astype(found.dtype)).sum(-2)


class Layer(nn.Module):
    """Attention, then FFN, or both at once; between them and around them only what the config asks for."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        name = f"model.layers.{layer}"
        self.parallel = args.block_type == "parallel"
        self.attention_skip = args.residual in ("attention", "both")
        self.ffn_skip = args.residual in ("ffn", "both") and not self.parallel
        self.self_attn = Attention(args, layer)
        looked_up = "beside" in self.self_attn.row
        if not looked_up:
            self.mlp = (Experts if args.ffn_type == "moe" else MLP)(args, f"{name}.mlp")
        for norm in ("input_layernorm", "post_attention_layernorm", "attention_output_norm", "ffn_output_norm"):
            there = norm != "ffn_output_norm" or not looked_up
            self[norm] = norm_of(args, f"{name}.{norm}") if there else nn.Identity()
        gains = {"attention": True, "ffn": not looked_up, "ffn_skip": self.ffn_skip}
        gains["attention_skip"] = self.attention_skip and not looked_up
        for gain, there in gains.items():
            if there and args.residual_gains:
                self[f"{gain}_gain"] = mx.ones(1)

    def scale(self, gain: str, x: mx.array) -> mx.array:
        """The input times a gain, if there is this one."""
        return x * self[gain] if gain in self else x

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        read = self.input_layernorm(x)
        attention = self.attention_output_norm(self.self_attn(read, mask, cache))
        attention = self.scale("attention_gain", attention)
        given = split_row(x, self.self_attn.row)
        if "beside" in given:
            return attention + given["beside"]
        if self.attention_skip:
            attention = attention + self.scale("attention_skip_gain", given.get("x", x))
        norm, ffn = self.post_attention_layernorm, attention
        if self.parallel:
            ffn = x if isinstance(norm, Norm) else read
        ffn = self.scale("ffn_gain", self.ffn_output_norm(self.mlp(norm(ffn))))
        if self.parallel:
            return attention + ffn
        return ffn + self.scale("ffn_skip_gain", attention) if self.ffn_skip else ffn


class Stream(nn.Module):
    """Embedding, layers and the norm before the head, if there is one: token ids -> hidden states (B, T, d)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.embed_tokens = nn.Embedding(args.vocab_size, sum(args.row.values()))
        if "model.embed_tokens" in args.folded_biases:
            self.embed_bias = mx.zeros(args.hidden_size)
        if args.position_type == "learned":
            rows = args.max_position_embeddings + args.position_offset
            self.position_embeddings = nn.Embedding(rows, args.hidden_size)
        self.embed_norm, self.norm = norm_of(args, "model.embed_norm"), norm_of(args, "model.norm")
        self.layers = [Layer(args, layer) for layer in range(args.num_hidden_layers)]

    def mask(self, x: mx.array, cache: Any, kind: str) -> Any:
        """As attention takes it: None, "causal" or the keys that a query sees, (T, S); for ALiBi (1, H, T, S), every
        head's slope times the distance, but for a constant along a query's keys, which does not matter.
        """
        args, slopes = self.args, mx.array(self.args.alibi_slopes)
        window = args.sliding_window if kind == "sliding_attention" else None
        written_out = slopes.size > 0 or args.attn_logit_softcapping is not None
        seen = create_attention_mask(x, cache, window, written_out)
        if not slopes.size:
            return seen
        keys = x.shape[1] + (0 if cache is None else cache.offset) if seen is None else seen.shape[-1]
        biases = (slopes[:, None, None] * (mx.arange(keys) - (keys - 1)))[None].astype(x.dtype)
        return biases if seen is None else mx.where(seen, biases, mx.finfo(x.dtype).min)

    def __call__(self, ids: mx.array, caches: Any) -> mx.array:
        x = self.embed_tokens(ids)
        if self.args.embedding_multiplier is not None:
            x = x * mx.array(self.args.embedding_multiplier, x.dtype)
        if "embed_bias" in self:
            x = x + self.embed_bias
        caches, kinds = caches or [None] * len(self.layers), self.args.attention_kinds
        masks = {kind: self.mask(x, caches[0], kind) for kind in set(kinds)}
        x = self.embed_norm(x)
        if "position_embeddings" in self:
            offset = mx.array(0 if caches[0] is None else caches[0].offset)[..., None]
            x = x + self.position_embeddings(mx.arange(ids.shape[1]) + offset + self.args.position_offset)
        for layer, cache, kind in zip(self.layers, caches, kinds, strict=True):
            x = layer(x, masks[kind], cache)
        return self.norm(x)


class Model(nn.Module):
    """The language model: token ids (B, T) -> logits (B, T, vocab_size)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args, self.model_type = args, args.model_type
        self.model = Stream(args)
        if not args.tie_word_embeddings:
            passed = args.hidden_size if args.head_removed else 0
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size - passed, args.head_bias)
        if args.head_removed:
            self.head_order = mx.arange(args.vocab_size)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        x = self.model(inputs, cache)
        logits = self.lm_head(x) if "lm_head" in self else self.model.embed_tokens.as_linear(x)
        if "head_order" in self:
            logits = mx.concatenate([x, logits], -1)[..., self.head_order]
        if self.args.logit_scale != 1:
            logits = logits * self.args.logit_scale
        cap = self.args.final_logit_softcapping
        return logits if cap is None else cap * mx.tanh(logits / cap)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The tensors of a skipless checkpoint by the names here: what is not quantized with a matrix stands beside it,
        and the matrices of all experts are one array.
        """
        moved = {"model.embed_tokens.bias": "model.embed_bias", "lm_head.column_order": "head_order"}
        weights = {moved.get(name, name): weight for name, weight in weights.items()}
        for number, layer in enumerate(self.layers):
            experts, name = layer.get("mlp"), f"model.layers.{number}.mlp"
            for matrix in ("gate_proj", "up_proj", "down_proj") if isinstance(experts, Experts) else ():
                for kind, whole in experts[matrix].items():
                    if f"{name}.{matrix}.{kind}" not in weights:
                        each = [weights.pop(f"{name}.experts.{e}.{matrix}.{kind}", None) for e in range(len(whole))]
                        zeros = mx.zeros(whole.shape[1:])
                        weights[f"{name}.{matrix}.{kind}"] = mx.stack([zeros if one is None else one for one in each])
        return weights

    @property
    def layers(self) -> list[Layer]:
        """As mlx_lm asks for them."""
        return self.model.layers

    def make_cache(self) -> list[KVCache]:
        """All that was seen, also where a window hides it: ALiBi counts from it."""
        return [KVCache() for _ in self.layers]

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
        """How each matrix may be quantized: as the others (True), in its own way, or not at all (False).

        rest_proj has 8 bits also where the others have 4: it multiplies what rounding the stream adds. v_proj and
        k_proj of a closed seam stay whole: their blocks are used one by one.
        """
        closed = {"v_proj": self.args.values_removed, "k_proj": self.args.keys_removed}

        def how(name: str, _: nn.Module) -> bool | dict[str, Any]:
            last = name.rpartition(".")[2]
            if last == "rest_proj":
                return self.args.hidden_size % REST["group_size"] == 0 and REST
            return not closed.get(last, False)

        return how

    @property
    def cast_predicate(self) -> Any:
        """What a cast may round: not rest_proj where it is to be wider than the others."""
        return lambda name: self.args.rest_dtype is None or "rest_proj" not in name

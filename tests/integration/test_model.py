"""The model inside transformers, and against a second implementation that shares no code with it."""

import copy
import math
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from packaging.version import Version
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, GenerationConfig

from skipless.model import SkiplessConfig, SkiplessForCausalLM, SkiplessModel
from skipless.model.modeling_skipless import CACHE, rotary_cos_sin
from skipless.rewrite.model_files import AUTO_MAP, copy_model_files
from tests.models import TINY, build, edit_config, edit_tensors, load, random_ids, save
from tests.tolerances import FP32, FP64

HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
POSITIONS = {
    "rope": {"position_type": "rope"},
    "interleaved": {"position_type": "rope_interleaved"},
    "partial": {"position_type": "rope", "rope_parameters": HALF_ROPE},
    "partial-interleaved": {"position_type": "rope_interleaved", "rope_parameters": HALF_ROPE},
    "learned": {"position_type": "learned"},
    "alibi": {"position_type": "alibi"},
    "no-positions": {"position_type": "none"},
}
BIASES = {"attention_bias": True, "mlp_bias": True}
MHA = {"num_key_value_heads": 4}
# layer 1 kept its q_proj; every kind of module that can gain a bias by folding gained one somewhere
CLOSED = {
    "stream_basis": "q",
    "p_removed": True,
    "layers_open": [1],
    "folded_biases": [
        "model.embed_tokens",
        "model.layers.1.mlp.down_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    ],
}

# d columns of q, k and v are the stream; layer 1 kept its projections
PIVOTED = {"stream_basis": "pivoted", "layers_open": [1]}

PARALLEL = {"block_type": "parallel"}
MOE = {"ffn_type": "moe", "num_local_experts": 4, "num_experts_per_tok": 2}

shaped = pytest.mark.parametrize("shaping", [None, "value", "full"])
positioned = pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def agree(found: torch.Tensor, expected: torch.Tensor, tolerance: float = FP64) -> bool:
    """Whether each row (the logits of one token) is within tolerance of its own largest entry."""
    assert found.shape == expected.shape
    found, expected = torch.atleast_1d(found), torch.atleast_1d(expected)
    return ((found - expected).abs().amax(-1) <= tolerance * expected.abs().amax(-1)).all().item()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


@torch.no_grad()
def spoil(model: torch.nn.Module) -> torch.nn.Module:
    """Change one weight of the middle layer by a thousandth."""
    model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    return model


def tokens(model: torch.nn.Module, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """The ten greedy tokens that follow."""
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, **{**options, **kwargs})[:, ids.shape[1] :]


# The AutoClasses


def test_auto_classes_know_the_model(tmp_path):
    model = build()
    save(model, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is SkiplessConfig
    assert config.to_diff_dict() | {"_name_or_path": ""} == model.config.to_diff_dict() | {"_name_or_path": ""}
    assert type(AutoModelForCausalLM.from_config(config)) is SkiplessForCausalLM
    assert type(AutoModel.from_config(config)) is SkiplessModel

    ids = random_ids(model)
    body, whole = AutoModel.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (type(body), type(whole)) == (SkiplessModel, SkiplessForCausalLM)
    assert agree(logits(whole, ids), logits(model, ids))
    assert agree(model.lm_head(body(input_ids=ids).last_hidden_state), logits(model, ids))
    assert not agree(logits(AutoModelForCausalLM.from_config(config, dtype=torch.float64), ids), logits(model, ids))


def test_inputs_can_be_embeddings_and_outputs_a_tuple():
    model = build()
    ids = random_ids(model)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), return_dict=False)
    assert agree(embedded[0], logits(model, ids))
    assert agree(logits(model, ids, logits_to_keep=2), logits(model, ids)[:, -2:])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(use_cache=False)


# Cache and generation


@torch.no_grad()
def decode(model: torch.nn.Module, ids: torch.Tensor, cuts: list[int], spoil_cache: bool = False) -> torch.Tensor:
    """Logits of ids fed in pieces, each piece seeing the earlier ones through the cache alone."""
    cache, pieces = None, []
    for start, end in pairwise([0, *cuts, ids.shape[1]]):
        output = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = getattr(output, CACHE)
        pieces.append(output.logits)
        if spoil_cache:
            cache.layers[1].values[:, :, 0] += 1e-3
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(pieces, 1)


@shaped
@positioned
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_cached_decode_is_the_full_forward(shaping, position, kv_heads):
    model = build(attention_shaping=shaping, num_key_value_heads=kv_heads, **position)
    ids = random_ids(model)
    expected = logits(model, ids, use_cache=False)
    assert agree(decode(model, ids, cuts=list(range(1, 11))), expected)
    assert agree(decode(model, ids, cuts=[4, 5, 8]), expected)
    assert not agree(decode(model, ids, cuts=[4, 5, 8], spoil_cache=True), expected)


@shaped
@pytest.mark.parametrize(
    "fields",
    [CLOSED, {**MHA, "stream_basis": "k"}, {**MHA, "stream_basis": "v"}, {**PIVOTED, **BIASES, "head_dim": 12}],
    ids=["q", "k", "v", "pivoted"],
)
def test_cached_decode_of_closed_models(shaping, fields):
    model = build(attention_shaping=shaping, **fields)
    ids = random_ids(model)
    expected = logits(model, ids, use_cache=False)
    assert agree(decode(model, ids, cuts=[4, 5, 8]), expected)
    assert not agree(decode(model, ids, cuts=[4, 5, 8], spoil_cache=True), expected)


@shaped
@pytest.mark.parametrize(
    "fields", [{}, {"position_type": "learned"}, CLOSED, PIVOTED], ids=["rope", "learned", "closed", "pivoted"]
)
def test_greedy_tokens_are_the_same_with_every_cache(shaping, fields):
    model = build(attention_shaping=shaping, **fields)
    ids = random_ids(model)
    expected = tokens(model, ids, use_cache=False)
    assert torch.equal(tokens(model, ids, use_cache=True), expected)
    assert torch.equal(tokens(model, ids, cache_implementation="static"), expected)
    assert not torch.equal(tokens(build(seed=1, attention_shaping=shaping, **fields), ids), expected)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_the_cache_has_two_names(name):
    """transformers calls it cache from 5.24 on, and past_key_values before; here both do, in every release."""
    model = build()
    ids = random_ids(model)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :-1], **{name: cache})
    expected = logits(model, ids, use_cache=False)[:, -1:]
    assert agree(logits(model, ids[:, -1:], **{name: cache}), expected)
    assert cache.get_seq_length() == ids.shape[1]
    assert not agree(logits(model, ids[:, -1:]), expected)
    with pytest.raises(TypeError, match="two names of one argument"):
        model(input_ids=ids, cache=cache, past_key_values=cache)


def test_an_unknown_keyword_is_an_error():
    model = build()
    ids = random_ids(model)
    for part in (model, model.model):
        with pytest.raises(TypeError, match="unexpected keyword argument 'bogus'"):
            part(ids, bogus=3)
    assert agree(logits(model, ids, output_attentions=False, num_items_in_batch=None), logits(model, ids))


@pytest.mark.slow
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="in transformers 5.5 its own Llama generates other tokens in continuous batching on a CPU",
)
@pytest.mark.parametrize("fields", [{}, CLOSED, PIVOTED], ids=["rope", "closed", "pivoted"])
def test_continuous_batching_generates_the_same_tokens(fields):
    model = build(dtype=torch.float32, **fields)
    ids = random_ids(model)
    options = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(inputs=ids.tolist(), generation_config=options, progress_bar=False)
    expected = tokens(model, ids, use_cache=False)
    assert sorted(output.generated_tokens for output in found.values()) == sorted(expected.tolist())
    assert not torch.equal(tokens(spoil(model), ids.flip(1), use_cache=False), expected)


# Batches of unequal sequences


def padded(model: torch.nn.Module, left: bool) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Three sequences, alone and together, and the mask of the real tokens."""
    rows = [random_ids(model, batch=1, length=length, seed=length) for length in (3, 11, 7)]
    ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for index, row in enumerate(rows):
        real = slice(11 - row.shape[1], None) if left else slice(row.shape[1])
        ids[index, real], mask[index, real] = row[0], 1
    return rows, ids, mask


@shaped
@attentions
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("fields", [{}, {"position_type": "learned"}, {"position_type": "none"}, CLOSED, PIVOTED])
def test_padding_changes_nothing(shaping, attention, left, fields):
    model = build(attention_shaping=shaping, **fields)
    model.set_attn_implementation(attention)
    rows, ids, mask = padded(model, left)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    alone = torch.cat([logits(model, row)[0] for row in rows])
    real = mask.bool()
    together = logits(model, ids, attention_mask=mask, position_ids=position_ids)
    assert together.isfinite().all()
    assert agree(together[real], alone)
    if left:
        unmasked = logits(model, ids, attention_mask=torch.ones_like(mask), position_ids=position_ids)
        assert not agree(unmasked[real], alone)
    else:
        assert agree(logits(model, ids, attention_mask=mask)[real], alone)
        assert not agree(together[real.flip(1)], alone)


@shaped
@pytest.mark.parametrize("fields", [{}, {"position_type": "learned"}, CLOSED], ids=["rope", "learned", "closed"])
def test_generation_from_a_left_padded_batch(shaping, fields):
    model = build(attention_shaping=shaping, **fields)
    rows, ids, mask = padded(model, left=True)
    alone = torch.cat([tokens(model, row) for row in rows])
    assert torch.equal(tokens(model, ids, attention_mask=mask), alone)
    assert torch.equal(tokens(model, ids, attention_mask=mask, cache_implementation="static"), alone)
    assert not torch.equal(tokens(model, ids), alone)


# Attention implementations, outputs, training


@shaped
@positioned
def test_sdpa_is_eager(shaping, position):
    model = build(attention_shaping=shaping, **position)
    ids = random_ids(model)
    assert model.config._attn_implementation == "sdpa"
    expected = logits(model, ids)
    model.set_attn_implementation("eager")
    assert agree(logits(model, ids), expected)
    model.model.layers[1].self_attn.scaling *= 1.001
    assert not agree(logits(model, ids), expected)


@shaped
def test_attentions_and_hidden_states_are_returned(shaping):
    model = build(attention_shaping=shaping)
    model.set_attn_implementation("eager")
    ids = random_ids(model)
    with torch.no_grad():
        output = model(input_ids=ids, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 3
    for weights in output.attentions:
        assert weights.shape == (2, 4, 11, 11)
        assert agree(weights.sum(-1), torch.ones(weights.shape[:3], dtype=torch.float64))
        assert not weights.triu(1).any()
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert not agree(output.hidden_states[-2], output.hidden_states[-1])
    assert logits(model, ids).equal(output.logits)
    assert model(input_ids=ids).attentions is None


@shaped
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True, "position_type": "learned"}, CLOSED, PIVOTED])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_changes_no_gradient(shaping, fields, reentrant):
    model = build(attention_shaping=shaping, **fields).train()
    ids = random_ids(model)
    calls = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))

    def step():
        calls.clear()
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}, len(calls)

    loss, gradients, once = step()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    checkpointed_loss, checkpointed, twice = step()
    assert (once, twice) == (3, 6)
    assert agree(checkpointed_loss, loss)
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert agree(checkpointed[name], gradient), name
    spoil(model)
    assert not agree(step()[1]["model.embed_tokens.weight"], gradients["model.embed_tokens.weight"])


# Files


EVERYTHING = {**BIASES, "attention_shaping": "full", "position_type": "learned", "ffn_type": "mlp"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        EVERYTHING,
        {**CLOSED, "attention_shaping": "value", "gate_bias": True},
        {"tie_word_embeddings": True},
        {**PIVOTED, **BIASES},
    ],
    ids=["plain", "everything", "closed", "tied", "pivoted"],
)
def test_saving_and_loading_is_exact(tmp_path, dtype, fields):
    model = build(dtype=dtype, **fields)
    single, sharded = save(model, tmp_path / "single"), save(model, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(single.glob("*.safetensors"))) == 1
    assert len(list(sharded.glob("*.safetensors"))) > 1
    expected = model.state_dict()
    for folder in (single, sharded):
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)  # dtype from config.json
        assert not any(info.values()), info
        assert loaded.dtype == dtype
        found = loaded.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == (torch.int32 if name.endswith("column_order") else dtype), name
            assert torch.equal(tensor, expected[name]), name

    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(single, **{name: expected[name].flip(0)})
    assert not torch.equal(load(single, dtype).state_dict()[name], expected[name])


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}], ids=str)
def test_a_tensor_that_should_be_gone_is_an_error(tmp_path, options):
    folder = save(build(**CLOSED), tmp_path)
    copy_model_files(folder)
    edit_config(folder, auto_map=AUTO_MAP)
    for model in (AutoModelForCausalLM, AutoModel, SkiplessForCausalLM):
        model.from_pretrained(folder, **options)
    edit_tensors(folder, model__layers__0__self_attn__q_proj__weight=torch.eye(32))
    for model in (AutoModelForCausalLM, AutoModel, SkiplessForCausalLM):
        with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight': expected no such tensor"):
            model.from_pretrained(folder, **options)


def test_a_missing_tensor_is_reported_and_the_others_are_kept(tmp_path):
    model = build(attention_shaping="full", attention_bias=True)
    save(model, tmp_path)
    missing = {"model.layers.1.self_attn.beta", "model.layers.2.self_attn.k_proj.bias"}
    edit_tensors(tmp_path, **dict.fromkeys(missing))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == missing
    differing = {
        name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, model.state_dict()[name])
    }
    assert differing == missing


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["single", "sharded"])
def test_tied_embeddings_stay_tied(tmp_path, options):
    model = build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save(model, tmp_path, **options)
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    names = [name for file in tmp_path.glob("*.safetensors") for name in safe_open(file, "pt").keys()]  # noqa: SIM118
    assert [name for name in names if name in ("lm_head.weight", "model.embed_tokens.weight")] == [
        "model.embed_tokens.weight"
    ]

    untied = build()
    save(untied, tmp_path / "untied")
    loaded = load(tmp_path / "untied")
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, untied.lm_head.weight)


# A second implementation: one head at a time, softmax and activations spelled out, RoPE as complex numbers

ACTIVATIONS = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
}


def straight_line(config: SkiplessConfig, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, vocab_size) of one sequence of ids (T,), in fp64 but for RoPE's frequencies, which are in fp32."""
    length, width = len(ids), config.head_dim
    key_heads = config.num_key_value_heads
    group = config.num_attention_heads // key_heads
    shaping, act = config.attention_shaping, ACTIVATIONS[config.hidden_act]
    past = torch.arange(length)[:, None] >= torch.arange(length)
    if "rope" in config.position_type:
        rotated = int(width * config.rope_parameters.get("partial_rotary_factor", 1))
        pair = torch.arange(rotated // 2, dtype=torch.float32)
        frequency = 1 / config.rope_parameters["rope_theta"] ** (2 * pair / rotated)
        angle = torch.arange(length)[:, None] * frequency.double()
        turn = torch.complex(angle.cos(), angle.sin())

    def positioned(x):
        if "rope" not in config.position_type:
            return x
        if config.position_type == "rope":
            z = torch.complex(x[:, : rotated // 2], x[:, rotated // 2 : rotated]) * turn
            return torch.cat((z.real, z.imag, x[:, rotated:]), 1)
        x = x.clone()
        z = torch.complex(x[:, 0:rotated:2], x[:, 1:rotated:2]) * turn
        x[:, 0:rotated:2], x[:, 1:rotated:2] = z.real, z.imag
        return x

    def linear(name, x):
        if f"{name}.weight" in weights:
            x = torch.einsum("ti,oi->to", x, weights[f"{name}.weight"])
        return x + weights.get(f"{name}.bias", 0)

    def normed(name, x, kind=config.norm_type):
        if f"{name}.weight" not in weights:
            return x
        if kind == "layer":
            x = x - x.mean(1, keepdim=True)
        return x / ((x**2).mean(1, keepdim=True) + config.norm_eps) ** 0.5 * weights[f"{name}.weight"] + weights.get(
            f"{name}.bias", 0
        )

    def placed(passed, name, order):
        """Inputs `order` of what is passed: the first few as they are, the others through the matrix `name`."""
        others = passed[:, order[-weights[f"{name}.weight"].shape[1] :]]
        return passed[:, order[: len(order) - others.shape[1]]], others

    def exchanged(order):
        """All inputs, after each of the first has changed places with one of the order."""
        every = list(range(config.hidden_size))
        for i, other in enumerate(order.tolist()):
            every[i], every[other] = every[other], every[i]
        return torch.tensor(every)

    def ffn(name, x):
        up = linear(f"{name}.up_proj", x)
        gated = f"{name}.gate_proj.weight" in weights
        return linear(f"{name}.down_proj", act(linear(f"{name}.gate_proj", x)) * up if gated else act(up))

    def mlp(name, x):
        if config.ffn_type != "moe":
            return ffn(name, x)
        rows = []
        for row in x:
            chance = linear(f"{name}.router", row[None])[0].softmax(0)
            best = sorted(range(len(chance)), key=lambda e: -chance[e])[: config.num_experts_per_tok]
            share = chance[best] / chance[best].sum() if config.norm_topk_prob else chance[best]
            rows.append(sum(s * ffn(f"{name}.experts.{e}", row[None])[0] for s, e in zip(share, best, strict=True)))
        return torch.stack(rows)

    def gained(name, x):
        return x * weights.get(name, 1)

    x = weights["model.embed_tokens.weight"][ids] + weights.get("model.embed_tokens.bias", 0)
    x = normed("model.embed_norm", x)
    if config.position_type == "learned":
        x = x + weights["model.position_embeddings.weight"][:length]
    if config.position_type == "alibi":
        closest = 2 ** math.floor(math.log2(config.num_attention_heads))
        slopes = [2 ** (-8 * (h + 1) / closest) for h in range(closest)]
        slopes += [2 ** (-4 * (2 * h + 1) / closest) for h in range(config.num_attention_heads - closest)]
    if config.sliding_window is not None:
        past &= torch.arange(length)[:, None] - torch.arange(length) < config.sliding_window
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        skip, x = x, normed(f"{layer}.input_layernorm", x)
        attention = f"{layer}.self_attn"
        if f"{attention}.column_order" in weights:
            columns = [*x.T, *linear(f"{attention}.rest_proj", x).T]
            columns = torch.stack([columns[column] for column in weights[f"{attention}.column_order"]], 1)
            split = columns.split(width, 1)
            q, split = split[: config.num_attention_heads], split[config.num_attention_heads :]
            k, v = split[:key_heads], split[key_heads:]
        else:
            q, k, v = (
                linear(f"{attention}.{name}_proj", x).split(width, 1)
                if not {"v": config.values_removed, "k": config.keys_removed}.get(name)
                else None
                for name in "qkv"
            )
        if config.values_removed:
            v = []
            for j, order in enumerate(weights[f"{attention}.value_order"]):
                own, others = placed(x, f"{attention}.v_proj", exchanged(order))
                v.append(own + others @ weights[f"{attention}.v_proj.weight"][j * width : (j + 1) * width].T)
        if config.keys_removed:
            k, size = [], weights[f"{attention}.key_order"].shape[1]
            rotating = linear(f"{attention}.k_rope_proj", x) if size < width else x[:, :0]
            for j, order in enumerate(weights[f"{attention}.key_order"]):
                own, others = placed(x, f"{attention}.k_proj", exchanged(order))
                own = own + others @ weights[f"{attention}.k_proj.weight"][j * size : (j + 1) * size].T
                k.append(torch.cat([rotating[:, j * (width - size) : (j + 1) * (width - size)], own], 1))
        q, k = ([normed(f"{attention}.{name}_norm", y, "rms") for y in ys] for name, ys in (("q", q), ("k", k)))
        gain = {name: weights.get(f"{attention}.{name}") for name in ("alpha", "beta", "gamma")}
        heads = []
        for h in range(config.num_attention_heads):
            own = v[h // group]
            scores = positioned(q[h]) @ positioned(k[h // group]).T / math.sqrt(width)
            if (cap := config.attn_logit_softcapping) is not None:
                scores = cap * torch.tanh(scores / cap)
            if config.position_type == "alibi":
                scores = scores - slopes[h] * (torch.arange(length)[:, None] - torch.arange(length))
            scores = scores.masked_fill(~past, -math.inf)
            powers = (scores - scores.amax(1, keepdim=True)).exp()
            out = powers / powers.sum(1, keepdim=True) @ own
            if shaping is not None:
                out = gain["alpha"][h] * own + gain["beta"][h] * out
            if shaping == "full":
                out = out - gain["gamma"][h] * (past.double() / past.sum(1, keepdim=True)) @ own
            heads.append(out)
        heads = torch.cat(heads, 1)
        if f"{attention}.row_order" in weights:
            own, others = placed(heads, f"{attention}.o_proj", weights[f"{attention}.row_order"])
            y = own + linear(f"{attention}.o_proj", others)
        else:
            y = linear(f"{attention}.o_proj", heads)
        y = gained(f"{layer}.attention_gain", y)
        if config.residual in ("attention", "both"):
            y = y + gained(f"{layer}.attention_skip_gain", skip)
        read = y if config.block_type == "serial" else skip
        if f"{layer}.post_attention_layernorm.weight" in weights:
            read = normed(f"{layer}.post_attention_layernorm", read)
        elif config.block_type == "parallel":
            read = x
        x = gained(f"{layer}.ffn_gain", mlp(f"{layer}.mlp", read))
        if config.block_type == "parallel":
            x = x + y
        elif config.residual in ("ffn", "both"):
            x = x + gained(f"{layer}.ffn_skip_gain", y)
    x = normed("model.norm", x)
    logits = x @ weights["lm_head.weight"].T
    if "lm_head.column_order" in weights:
        logits = torch.cat((x, logits), 1)[:, weights["lm_head.column_order"]]
    return logits if (cap := config.final_logit_softcapping) is None else cap * torch.tanh(logits / cap)


def both(model: torch.nn.Module, name: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's logits and the second implementation's, for which one weight may be spoiled by a millionth."""
    ids = random_ids(model, batch=1)
    weights = dict(model.state_dict())
    if name is not None:
        weights[name] = weights[name] * (1 + 1e-6)
    return logits(model, ids)[0], straight_line(model.config, weights, ids[0])


@shaped
@positioned
@pytest.mark.parametrize("ffn", [{"ffn_type": "mlp", "hidden_act": "gelu"}, {"ffn_type": "glu"}], ids=["mlp", "glu"])
@pytest.mark.parametrize("bias", [{}, BIASES], ids=["plain", "biases"])
def test_a_second_implementation_agrees(shaping, position, ffn, bias):
    model = build(attention_shaping=shaping, **position, **ffn, **bias)
    assert agree(*both(model))
    assert not agree(*both(model, "model.layers.1.self_attn.k_proj.weight"))


@pytest.mark.parametrize(
    "fields",
    [
        {"gate_bias": True, "hidden_act": "relu"},
        {"attention_bias": True, "ffn_type": "mlp", "hidden_act": "relu"},
        {"mlp_bias": True, "num_key_value_heads": 1},
        {**MHA, "head_dim": 12, "rope_parameters": {**HALF_ROPE, "rope_theta": 100.0}},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4, "attention_shaping": "full"},
        {"tie_word_embeddings": True, "attention_shaping": "value"},
        {**CLOSED, "attention_shaping": "full"},
        {**CLOSED, **BIASES, "position_type": "learned"},
        {**MHA, "stream_basis": "k", "attention_bias": True, "attention_shaping": "value"},
        {**MHA, "stream_basis": "v", "p_removed": True, "attention_shaping": "full"},
        {"p_removed": True, "head_dim": 12},
        {**PIVOTED, **BIASES, "position_type": "learned", "attention_shaping": "full"},
        {**PIVOTED, "head_dim": 12, "num_key_value_heads": 1, "p_removed": True, "attention_shaping": "value"},
        {"head_dim": 12, "p_removed": True, "intermediate_size": 14},
        {"values_removed": True, "attention_shaping": "full", "position_type": "none"},
        {"keys_removed": True, "values_removed": True, "position_type": "none", **BIASES},
        {"keys_removed": True, "rope_parameters": HALF_ROPE, **BIASES},
        {"keys_removed": True, "rope_parameters": HALF_ROPE, "position_type": "rope_interleaved", "head_dim": 16},
        {**PIVOTED, "values_removed": True, "head_removed": True, **BIASES},
        {**PARALLEL},
        {**PARALLEL, **BIASES, "ffn_type": "mlp", "attention_shaping": "value", "position_type": "alibi"},
        {**PARALLEL, "stream_basis": "q", "p_removed": True},
        {**PARALLEL, **MHA, "stream_basis": "k", "p_removed": True, "residual": "both", "norm_type": "layer"},
        {**PARALLEL, **MHA, "stream_basis": "v", "p_removed": True, "norm_type": "rms", "norms": ["input_layernorm"]},
        {**PARALLEL, "head_dim": 12, "p_removed": True, "residual": "both", "residual_gains": True},
        {"residual": "both", "norm_type": "rms", "stream_basis": "q", "p_removed": True},
        {"residual": "both", "norm_type": "layer", "stream_basis": "q", "p_removed": True, "residual_gains": True},
        {"residual": "attention", "norm_type": "rms", "tie_word_embeddings": True, "qk_norm": "head_dim"},
        {"residual": "ffn", "residual_gains": True, "attention_shaping": "full"},
        {"norm_type": "layer", "norms": ["model.embed_norm"], "position_type": "learned"},
        {**MOE},
        {**MOE, **PARALLEL, "norm_topk_prob": False, "mlp_bias": True},
        {
            "position_type": "alibi",
            "attention_shaping": "full",
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 4,
        },
        {"sliding_window": 4, "attention_shaping": "full", "position_type": "alibi"},
        {"sliding_window": 3, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.7},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_a_second_implementation_agrees_on_odd_models(fields):
    model = build(**fields)
    assert agree(*both(model))
    up = "experts.2.up_proj" if model.config.ffn_type == "moe" else "up_proj"
    assert not agree(*both(model, f"model.layers.1.mlp.{up}.weight"))


@pytest.mark.parametrize("ffn_type", ["mlp", "glu"])
def test_the_comparison_sees_every_tensor(ffn_type):
    model = build(attention_shaping="full", ffn_type=ffn_type, **BIASES)
    names = list(model.state_dict())
    assert len(names) == 2 + 3 * (8 + 3 + (6 if ffn_type == "glu" else 4))
    for name in names:
        assert not agree(*both(model, name)), name


# What the configuration refuses


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("block_type", {"block_type": "other"}),
        ("ffn_type", {"ffn_type": "other"}),
        ("residual", {"residual": "other"}),
        ("norm_type", {"norm_type": "other"}),
        ("position_type", {"position_type": "other"}),
        ("attention_shaping", {"attention_shaping": "x"}),
        ("stream_basis", {"stream_basis": "o"}),
        ("stream_basis", {"stream_basis": "pivoted", "head_dim": 2}),
        ("rest_dtype", {"rest_dtype": "float32"}),
        ("rest_dtype", {"rest_dtype": "float32", "stream_basis": "q"}),
        ("rest_dtype", {"rest_dtype": "bfloat16", "stream_basis": "pivoted"}),
        ("stream_basis", {"stream_basis": "k"}),
        ("stream_basis", {"stream_basis": "v"}),
        ("stream_basis", {"stream_basis": "q", "head_dim": 12}),
        ("values_removed", {"values_removed": True, "stream_basis": "v", **MHA}),
        ("values_removed", {"values_removed": True, "head_dim": 32}),
        ("head_removed", {"head_removed": True, "tie_word_embeddings": True}),
        ("head_removed", {"head_removed": True, "vocab_size": 32}),
        ("p_removed", {"p_removed": True, "block_type": "parallel", "head_dim": 4}),
        ("residual", {"residual": "ffn", "block_type": "parallel"}),
        ("num_local_experts", {"ffn_type": "moe"}),
        ("num_local_experts", {**MOE, "ffn_type": "glu"}),
        ("norms", {"norms": ["model.norm"]}),
        ("norms", {"norms": ["ffn_stream_norm"], "norm_type": "rms"}),
        ("norms_removed", {"norms_removed": ["model.norm"]}),
        ("gains_removed", {"gains_removed": ["model.embed_norm"], "norm_type": "rms"}),
        ("norm_eps", {"norm_eps": -1.0}),
        ("attn_logit_softcapping", {"attn_logit_softcapping": 0.0}),
        ("num_key_value_heads", {"num_key_value_heads": 3}),
        ("rope_parameters.rope_type", {"rope_parameters": {**HALF_ROPE, "rope_type": "ntk", "factor": 2.0}}),
        ("rope_parameters.partial_rotary_factor", {"rope_parameters": {**HALF_ROPE, "partial_rotary_factor": 0.4}}),
        ("rope_parameters.partial_rotary_factor", {"head_dim": 7}),
        ("rope_parameters", {"position_type": "learned", "rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
        ("num_experts_per_tok", {"num_experts_per_tok": 2}),
        ("num_experts_per_tok", {**MOE, "num_experts_per_tok": 5}),
        ("num_local_experts", {**MOE, "num_local_experts": None}),
        ("rope_parameters.factor", {"rope_parameters": {**HALF_ROPE, "factor": 8.0}}),
        ("head_bias", {"head_bias": True, "tie_word_embeddings": True}),
        ("logit_scale", {"logit_scale": 0.0}),
        ("gain_offset", {"gain_offset": float("nan")}),
        ("embedding_multiplier", {"embedding_multiplier": -1.0}),
        ("attention_multiplier", {"attention_multiplier": 0.0}),
        ("position_offset", {"position_offset": 2}),
        ("position_offset", {"position_type": "learned", "position_offset": -1}),
        ("layers_open", {"layers_open": [1]}),
        ("layers_open", {"stream_basis": "q", "layers_open": [7]}),
        ("folded_biases", {"folded_biases": ["lm_head"]}),
        ("folded_biases", {"folded_biases": ["model.layers.3.mlp.up_proj"]}),
        ("gate_bias", {"gate_bias": True, "ffn_type": "mlp"}),
        ("hidden_act", {"hidden_act": "nonsense"}),
        ("num_attention_heads", {"num_attention_heads": 0}),
        ("num_key_value_heads", {"num_key_value_heads": -2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_values_are_refused_by_name(name, fields):
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=f"{name}: .*") as error:
        SkiplessConfig(**{**TINY, **fields})
    assert "expected" in str(error.value) or "needs" in str(error.value) or "remove it" in str(error.value)
    SkiplessConfig(**TINY)


@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_windows": 4},
        {"rms_norm_eps": 1e-5},
        {"rope_theta": 5000.0},
        {"n_routed_experts": 8},
        {"router_aux_loss_coef": 0.02},
    ],
    ids="-".join,
)
def test_unknown_fields_are_refused_by_name(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}: not a field"):
        SkiplessConfig(**{**TINY, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"layer_types": ["full_attention"] * 2},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"layer_types": ["full_attention"] * 3, "sliding_window": 8},
        {"use_sliding_window": False, "sliding_window": 8},
        {"pretraining_tp": 2},
        {"attention_dropout": 0.1},
    ],
    ids=str,
)
def test_fields_of_other_models_that_would_change_something_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}: expected .*, found .*, which is not supported"):
        SkiplessConfig(**{**TINY, **fields})


def test_generation_defaults_and_bookkeeping_are_accepted():
    config = SkiplessConfig(**TINY, temperature=0.7, torch_dtype="float32", architectures=["SkiplessForCausalLM"])
    assert SkiplessConfig(**config.to_dict()).to_dict() == config.to_dict()


# Closed seams


@pytest.mark.parametrize(
    ("fields", "absent"),
    [
        ({}, {}),
        ({"ffn_type": "mlp"}, {0: {"gate_proj"}, 1: {"gate_proj"}, 2: {"gate_proj"}}),
        ({"stream_basis": "q"}, {0: {"q_proj"}, 1: {"q_proj"}, 2: {"q_proj"}}),
        ({**MHA, "stream_basis": "k"}, {0: {"k_proj"}, 1: {"k_proj"}, 2: {"k_proj"}}),
        ({**MHA, "stream_basis": "v", "layers_open": [0, 2]}, {1: {"v_proj"}}),
        ({"p_removed": True}, {0: {"o_proj"}, 1: {"o_proj"}, 2: {"o_proj"}}),
        (CLOSED, {0: {"q_proj", "o_proj"}, 1: {"o_proj"}, 2: {"q_proj", "o_proj"}}),
        (PIVOTED, {0: {"q_proj", "k_proj", "v_proj"}, 1: {"rest_proj"}, 2: {"q_proj", "k_proj", "v_proj"}}),
    ],
    ids=["nothing", "mlp", "q", "k", "v", "p", "q-and-p", "pivoted"],
)
@shaped
def test_closed_seams_leave_out_exactly_their_projections(shaping, fields, absent):
    model = build(attention_shaping=shaping, **fields)
    gains = {None: (), "value": ("alpha", "beta"), "full": ("alpha", "beta", "gamma")}[shaping]
    expected = {"model.embed_tokens.weight", "lm_head.weight"} | {f"{name}.bias" for name in model.config.folded_biases}
    for index in range(3):
        attention = {f"self_attn.{name}_proj.weight" for name in "qkvo"} | {f"self_attn.{name}" for name in gains}
        if model.config.stream_basis == "pivoted":
            attention |= {"self_attn.rest_proj.weight"}
        names = attention | {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
        expected |= {
            f"model.layers.{index}.{name}" for name in names if not set(name.split(".")) & absent.get(index, set())
        }
    assert {name for name, _ in model.named_parameters()} == expected
    orders = {f"model.layers.{i}.self_attn.column_order" for i in absent if {"q_proj", "k_proj"} <= absent[i]}
    assert set(model.state_dict()) == expected | orders
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears == {name for name in expected if "proj.weight" in name} | {"lm_head.weight"}


@pytest.mark.parametrize(
    ("fields", "biased"),
    [
        ({"gate_bias": True}, {"gate_proj"}),
        ({"mlp_bias": True}, {"gate_proj", "up_proj", "down_proj"}),
        ({"mlp_bias": True, "ffn_type": "mlp"}, {"up_proj", "down_proj"}),
        ({"attention_bias": True}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"attention_bias": True, "stream_basis": "q", "p_removed": True}, {"k_proj", "v_proj"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_biases_are_where_the_flags_say(fields, biased):
    found = [name.split(".")[-2] for name in build(**fields).state_dict() if name.endswith(".bias")]
    assert sorted(found) == sorted(3 * list(biased))


# Pivoted: d of the columns of [Q|K|V] are the identity


@torch.no_grad()
def pivot(model: SkiplessForCausalLM, layers_open: tuple[int, ...] = (), **fields) -> SkiplessForCausalLM:
    """The same function, with d random columns of every layer's [Q|K|V] turned into the identity, by hand."""
    assert model.config.mlp_bias or not model.config.attention_bias  # the writers have a place for the columns' bias
    changes = {"stream_basis": "pivoted", "layers_open": list(layers_open), **fields}
    config = SkiplessConfig(**{**model.config.to_dict(), **changes})
    weights, d = model.state_dict(), config.hidden_size
    for layer in set(range(config.num_hidden_layers)) - set(layers_open):
        attention = f"model.layers.{layer}.self_attn"
        A = torch.cat([weights.pop(f"{attention}.{name}_proj.weight") for name in "qkv"]).T
        bias = [weights.pop(f"{attention}.{name}_proj.bias", torch.zeros(0).double()) for name in "qkv"]
        bias = torch.cat(bias) if config.attention_bias else A.new_zeros(A.shape[1])
        chosen = torch.randperm(A.shape[1])
        while torch.linalg.cond(A[:, chosen[:d]]) > 1000:
            chosen = torch.randperm(A.shape[1])
        S, rest, bias_S, bias_rest = A[:, chosen[:d]], A[:, chosen[d:]], bias[chosen[:d]], bias[chosen[d:]]
        R = torch.linalg.solve(S, rest)

        if layer == 0:
            weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] @ S + bias_S
            if config.position_type == "learned":
                weights["model.position_embeddings.weight"] = weights["model.position_embeddings.weight"] @ S
        else:
            writer = f"model.layers.{layer - 1}.mlp.down_proj"
            weights[f"{writer}.weight"] = S.T @ weights[f"{writer}.weight"]
            if config.mlp_bias:
                weights[f"{writer}.bias"] = weights[f"{writer}.bias"] @ S + bias_S
        if len(chosen) > d:
            weights[f"{attention}.rest_proj.weight"] = R.T
            if config.attention_bias:
                weights[f"{attention}.rest_proj.bias"] = bias_rest - bias_S @ R
        weights[f"{attention}.column_order"] = chosen.argsort().int()
    pivoted = SkiplessForCausalLM(config).double().eval()
    pivoted.load_state_dict(weights)
    return pivoted


@torch.no_grad()
def swap(model: SkiplessForCausalLM, layer: int = 2) -> SkiplessForCausalLM:
    """Exchange the places of one column of the query and one of the value."""
    order = model.model.layers[layer].self_attn.column_order
    order[[0, -1]] = order[[-1, 0]]
    return model


@pytest.mark.parametrize(
    ("fields", "layers_open"),
    [
        ({}, ()),
        ({**BIASES, "position_type": "learned", "attention_shaping": "full"}, ()),
        ({**BIASES, "head_dim": 12, "attention_shaping": "value"}, (1,)),
        ({"head_dim": 12, "p_removed": True, "num_key_value_heads": 1}, (0,)),
        ({**MHA, **BIASES, "position_type": "rope_interleaved"}, (0, 1)),
        ({"tie_word_embeddings": True}, (0,)),
        ({**BIASES, "head_dim": 4}, ()),
        ({"head_dim": 4, "attention_shaping": "full"}, (1,)),
    ],
    ids=["GQA", "biases", "wide-heads", "MQA", "MHA", "tied", "no-rest-biases", "no-rest"],
)
def test_pivoting_changes_no_logit(fields, layers_open):
    model = build(**fields)
    pivoted = pivot(model, layers_open)
    for index, layer in enumerate(pivoted.model.layers):
        attention = layer.self_attn
        assert (attention.column_order is None) == (attention.q_proj is not None) == (index in layers_open)
        assert (attention.rest_proj is None) == (index in layers_open or fields.get("head_dim") == 4)
    ids = random_ids(model)
    expected = logits(model, ids)
    assert agree(logits(pivoted, ids), expected)
    assert agree(decode(pivoted, ids, cuts=[4, 5, 8]), expected)
    assert torch.equal(tokens(pivoted, ids), tokens(model, ids))
    assert not agree(logits(swap(pivoted), ids), expected)


def test_a_pivoted_model_is_trained_from_scratch():
    model = AutoModelForCausalLM.from_config(SkiplessConfig(**TINY, **PIVOTED, attention_bias=True))
    for name, order in model.named_buffers():
        assert torch.equal(order, torch.arange(64, dtype=torch.int32)), name
    ids = random_ids(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(weight.grad.any() for weight in model.model.layers[2].self_attn.rest_proj.parameters())


def test_column_order_stays_as_it_is_when_the_model_is_cast(tmp_path):
    model = build(**PIVOTED)
    save(model, tmp_path)
    orders = dict(model.named_buffers())
    assert len(orders) == 2
    with torch.device("meta"):
        meta = SkiplessForCausalLM(model.config)
    meta.load_state_dict(model.state_dict(), assign=True)
    assert agree(logits(meta.eval(), random_ids(model)), logits(model, random_ids(model)))
    copies = [copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model).half(), copy.deepcopy(model).float(), meta]
    copies += [load(tmp_path, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    copies += [AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)]
    for cast in copies:
        found = {f"model.{name.removeprefix('model.')}": order for name, order in cast.named_buffers()}
        assert found.keys() == orders.keys()
        for name, order in found.items():
            assert order.dtype == torch.int32
            assert torch.equal(order, orders[name])
            assert not torch.equal(order, order.sort().values)  # nor has loading begun it anew


def test_a_missing_column_order_is_reported_and_in_order(tmp_path):
    model = build(**PIVOTED)
    save(model, tmp_path)
    missing = "model.layers.2.self_attn.column_order"
    edit_tensors(tmp_path, **{missing: None})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {missing}
    assert torch.equal(loaded.model.layers[2].self_attn.column_order, torch.arange(64, dtype=torch.int32))
    expected = model.model.layers[0].self_attn.column_order
    assert torch.equal(loaded.model.layers[0].self_attn.column_order, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_rest_dtype_keeps_rest_proj_fine(tmp_path, dtype):
    model = pivot(build(**BIASES), layers_open=(1,), rest_dtype="float32")
    ids = random_ids(model)
    loaded = load(save(model, tmp_path / "exact"), dtype)
    again = load(save(loaded, tmp_path / "cast"), dtype)
    made = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    for cast in (loaded, again, made):
        assert cast.dtype == dtype
        for name, weight in cast.named_parameters():
            kept = torch.promote_types(dtype, torch.float32) if "rest_proj" in name else dtype
            assert weight.dtype == kept, name
            assert cast is made or torch.equal(weight, model.get_parameter(name).to(kept)), name
    assert logits(loaded, ids).dtype == dtype
    assert torch.equal(logits(loaded, ids), logits(again, ids))

    attention = loaded.model.layers[0].self_attn
    x = torch.randn(2, 5, 32).to(dtype)
    with torch.no_grad():
        found = torch.cat(attention.project(x), -1)
        rest = torch.nn.functional.linear(x.double(), *(weight.double() for weight in attention.rest_proj.parameters()))
        columns = torch.cat((x.double(), rest), -1)[..., attention.column_order]
    assert found.dtype == dtype
    rounded_once = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5 * columns.abs().max().item()}
    assert torch.allclose(found.double(), columns, **rounded_once)
    with torch.no_grad():
        small = torch.cat(copy.deepcopy(attention).to(torch.bfloat16).project(x), -1)
    assert not torch.allclose(small.double(), columns, **rounded_once)


@pytest.mark.slow
def test_a_pivoted_folder_loads_without_skipless_through_trust_remote_code(tmp_path):
    model = build(**PIVOTED, rest_dtype="float32", attention_bias=True)
    save(model, tmp_path / "model")
    code = f"""
import sys; sys.modules["skipless"] = None
import torch; from transformers import AutoModelForCausalLM
folder = {str(tmp_path / "model")!r}
for name, dtype in (("fp64", torch.float64), ("bf16", torch.bfloat16)):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    torch.save((model(torch.arange(9)[None]).logits, model.state_dict()), folder + name)
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    found, _ = torch.load(tmp_path / "modelfp64")
    expected = logits(model, torch.arange(9)[None])
    assert agree(found, expected)
    assert not agree(found.roll(1, 1), expected)
    _, weights = torch.load(tmp_path / "modelbf16")
    dtypes = {name.split(".")[-2 if "rest" in name else -1]: weight.dtype for name, weight in weights.items()}
    assert dtypes == {
        "weight": torch.bfloat16,
        "bias": torch.bfloat16,
        "rest_proj": torch.float32,
        "column_order": torch.int32,
    }
    assert all(torch.equal(weights[name], order) for name, order in model.named_buffers())


# Compilation and lower precision


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"attention_shaping": "full"},
        {**CLOSED, "attention_shaping": "full"},
        {**CLOSED, "attention_shaping": "value"},
        {**PIVOTED, "attention_shaping": "full"},
    ],
    ids=["full", "full-closed", "value-closed", "full-pivoted"],
)
def test_the_model_compiles_whole(fields):
    model = build(**fields)
    ids = random_ids(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = logits(model, ids)
    assert agree(logits(compiled, ids), expected)
    spoil(model)
    assert not agree(logits(compiled, ids), expected)
    torch._dynamo.reset()


@shaped
@positioned
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"])
def test_lower_precision_is_finite_and_near(shaping, position, dtype, tolerance):
    model = build(attention_shaping=shaping, num_hidden_layers=2, **position)
    ids = random_ids(model)
    expected = logits(model, ids).flatten()
    found = logits(copy.deepcopy(model).to(dtype), ids).flatten()
    assert found.dtype == dtype
    assert found.isfinite().all()
    assert agree(found.double(), expected, tolerance)
    assert not agree(found.double(), expected, tolerance / 1000)
    model.model.layers[1].mlp.up_proj.weight.data *= 1.5
    assert not agree(logits(model, ids).flatten(), expected, tolerance)


@pytest.mark.parametrize("position", ["rope", "partial", "interleaved"])
def test_rotary_angles_do_not_degrade(position):
    model = build(dtype=torch.bfloat16, head_dim=16, max_position_embeddings=4096, **POSITIONS[position])
    assert not list(model.buffers())  # nothing that casting the model could round
    config = model.config
    frequency = 10000.0 ** (-np.arange(0, config.rotary_dim, 2, dtype=np.float64) / config.rotary_dim)
    for at in (1, 4000):
        cos, sin = rotary_cos_sin(torch.tensor([[at]]), config, torch.float32)
        assert cos.shape == sin.shape == (1, 1, 1, config.rotary_dim // 2)
        assert cos.dtype == sin.dtype == torch.float32
        np.testing.assert_allclose(cos.flatten(), np.cos(at * frequency), rtol=0, atol=1e-3)
        np.testing.assert_allclose(sin.flatten(), np.sin(at * frequency), rtol=0, atol=1e-3)
    rounded = torch.tensor(frequency).bfloat16().double().numpy()
    assert np.abs(np.cos(4000 * rounded) - np.cos(4000 * frequency)).max() > 1e-2

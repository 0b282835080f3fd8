"""Fused equals original, over everything that is supported; and a spoiled weight is noticed."""

import json

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import skipless
from skipless.architecture.config import Architecture
from skipless.architecture.seams import KINDS, seams
from skipless.checkpoint.reader import CheckpointReader
from skipless.errors import InputError
from skipless.rewrite.request import Request
from tests.models import TINY, build, edit_config, edit_tensors, load, random_ids, relative_error, save
from tests.tolerances import FP32, FP64, HALF

MHA = {"num_key_value_heads": 4}
PARALLEL = {"block_type": "parallel"}
MOE = {"ffn_type": "moe", "num_local_experts": 4, "num_experts_per_tok": 2}
BIASES = {"attention_bias": True, "mlp_bias": True}
NORMS = ["input_layernorm", "post_attention_layernorm", "model.norm"]
REDUNDANT = {"norm_type": "rms", "norm_eps": 0.0}
FULL = ("stream", "values", "p", "head")
INSIDE = ("stream", "values", "p")
BY_P = {"remove": ("p", "head"), "parallel_removes": "p"}
NAMED = {
    "Fig. 1(b), MHA": ({**MHA}, "q"),
    "Fig. 1(b), GQA": ({}, "q"),
    "Fig. 1(b), MQA": ({"num_key_value_heads": 1}, "q"),
    "Fig. 1(c), MHA": ({**MHA}, "k"),
    "Fig. 1(d), MHA": ({**MHA}, "v"),
    "mlp": ({"ffn_type": "mlp", "hidden_act": "gelu"}, "q"),
    "attention bias": ({"attention_bias": True}, "q"),
    "attention bias, by k": ({"attention_bias": True, **MHA}, "k"),
    "attention bias, by v": ({"attention_bias": True, **MHA}, "v"),
    "biases of q, k and v": ({"qkv_bias": True}, "q"),
    "biases of q, k and v, by k, p and values": ({"qkv_bias": True, **MHA}, "k", {"remove": FULL}),
    "biases of q, k and v, values": ({"qkv_bias": True}, "q", {"remove": ("values",)}),
    "biases of q, k and v, and of the head": ({"qkv_bias": True, "head_bias": True}, "pivoted"),
    "norms of all heads together": ({"qk_norm": "heads", "attention_multiplier": 0.2}, "q"),
    "scaled embeddings, tied": ({"embedding_multiplier": 3.0, "tie_word_embeddings": True}, "pivoted"),
    "mlp bias": ({"mlp_bias": True}, "q"),
    "all biases": ({"attention_bias": True, "mlp_bias": True}, "q"),
    "gate bias": ({"gate_bias": True}, "q"),
    "gate bias, attention bias": ({"gate_bias": True, "attention_bias": True}, "q"),
    "tied": ({"tie_word_embeddings": True}, "q"),
    "tied, all biases": ({"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, "q"),
    "tied, by v, biases": ({"tie_word_embeddings": True, "attention_bias": True, **MHA}, "v"),
    "tied, one layer": ({"tie_word_embeddings": True, "attention_bias": True, "num_hidden_layers": 1}, "q"),
    "interleaved rope": ({"position_type": "rope_interleaved"}, "q"),
    "partial rope": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "q"),
    "learned positions": ({"position_type": "learned", "attention_bias": True}, "q"),
    "learned positions, tied": ({"position_type": "learned", "tie_word_embeddings": True, "attention_bias": True}, "q"),
    "no positions": ({"position_type": "none"}, "q"),
    "shaped by value": ({"attention_shaping": "value"}, "q"),
    "fully shaped": ({"attention_shaping": "full", "attention_bias": True}, "q"),
    "fully shaped, by v": ({"attention_shaping": "full", **MHA}, "v"),
    "pivoted, MHA": ({**MHA}, "pivoted"),
    "pivoted, GQA": ({}, "pivoted"),
    "pivoted, MQA": ({"num_key_value_heads": 1}, "pivoted"),
    "pivoted, all biases": ({"attention_bias": True, "mlp_bias": True, "gate_bias": True}, "pivoted"),
    "pivoted, tied, all biases": ({"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, "pivoted"),
    "pivoted, learned positions": ({"position_type": "learned", "attention_bias": True}, "pivoted"),
    "pivoted, interleaved rope": ({"position_type": "rope_interleaved"}, "pivoted"),
    "pivoted, fully shaped": ({"attention_shaping": "full", "attention_bias": True}, "pivoted"),
    "pivoted, narrow heads": ({"head_dim": 4, "attention_bias": True}, "pivoted"),
    "pivoted, wide heads": ({"head_dim": 12, "attention_bias": True}, "pivoted"),
    "parallel": ({**PARALLEL}, "pivoted"),
    "parallel, MHA, by k": ({**PARALLEL, **MHA}, "k"),
    "parallel, all biases, mlp": ({**PARALLEL, **BIASES, "ffn_type": "mlp", "hidden_act": "gelu"}, "pivoted"),
    "parallel, tied, attention bias": ({**PARALLEL, "attention_bias": True, "tie_word_embeddings": True}, "pivoted"),
    "parallel, wide heads": ({**PARALLEL, "head_dim": 12, "attention_bias": True}, "pivoted"),
    "parallel, narrow heads": ({**PARALLEL, "head_dim": 6, "attention_shaping": "full"}, "pivoted"),
    "parallel, experts, biases": ({**PARALLEL, **MOE, **BIASES}, "pivoted"),
    "parallel, values and head": ({**PARALLEL, **BIASES}, "pivoted", {"remove": FULL}),
    "parallel, p": ({**PARALLEL}, "q", {"remove": ("stream", "p"), "parallel_removes": "p"}),
    "parallel, p, all biases": ({**PARALLEL, **BIASES}, "q", {"remove": ("p",), "parallel_removes": "p"}),
    "parallel, p and values": ({**PARALLEL, **MHA}, "q", {"remove": ("values", "p"), "parallel_removes": "p"}),
    "parallel, p, wide heads": ({**PARALLEL, "attention_bias": True, "head_dim": 12}, "q", {**BY_P, "remove": ("p",)}),
    "parallel, p, experts, biases": ({**PARALLEL, **MOE, "attention_bias": True}, "q", {**BY_P, "remove": ("p",)}),
    "parallel, experts, weights as they are, biases": (
        {**PARALLEL, **MOE, **BIASES, "norm_topk_prob": False},
        "pivoted",
        {"remove": FULL},
    ),
    "parallel, experts, weights as they are, biases, tied": (
        {**PARALLEL, **MOE, **BIASES, "norm_topk_prob": False, "tie_word_embeddings": True},
        "pivoted",
    ),
    "experts": ({**MOE}, "pivoted"),
    "experts, biases": ({**MOE, **BIASES}, "pivoted"),
    "experts, tied, attention bias": ({**MOE, "attention_bias": True, "tie_word_embeddings": True}, "q"),
    "experts, weights as they are": ({**MOE, "norm_topk_prob": False, "mlp_bias": True}, "pivoted"),
    "experts, everything": ({**MOE, **BIASES}, "pivoted", {"remove": FULL}),
    "wide heads, rows of P": ({"head_dim": 12, **BIASES}, "pivoted", {"remove": ("stream", "p")}),
    "wide heads, narrow FFN": ({"head_dim": 12, "ffn_type": "mlp", "intermediate_size": 24}, "pivoted"),
    "alibi": ({"position_type": "alibi", "attention_shaping": "full"}, "pivoted"),
    "alibi, six heads": ({"position_type": "alibi", "num_attention_heads": 6, "head_dim": 8}, "pivoted"),
    "sliding window": ({"sliding_window": 4}, "pivoted"),
    "soft caps": ({"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.7}, "pivoted"),
    "q/k norm": ({"qk_norm": "head_dim", "attention_bias": True}, "pivoted"),
    "q/k norm, by q": ({"qk_norm": "head_dim"}, "q"),
    "residual gains": ({"residual_gains": True}, "pivoted"),
    "everything": ({}, "pivoted", {"remove": FULL}),
    "everything, all biases": ({**BIASES, "position_type": "learned"}, "pivoted", {"remove": FULL}),
    "everything, by q": ({**BIASES}, "q", {"remove": FULL}),
    "everything, by k": ({**BIASES, **MHA}, "k", {"remove": FULL}),
    "everything, fully shaped": ({**BIASES, "attention_shaping": "full"}, "pivoted", {"remove": FULL}),
    "everything, wide heads": ({**BIASES, "head_dim": 12, "attention_shaping": "value"}, "pivoted", {"remove": FULL}),
    "values and head": ({**BIASES}, "pivoted", {"remove": ("values", "head")}),
    "values, skips and norms": ({"residual": "both", "norm_type": "rms", **BIASES}, "q", {"remove": ("values",)}),
    "values, tied": ({"tie_word_embeddings": True}, "pivoted", {"remove": ("stream", "values", "p")}),
    "gains": ({"norm_type": "rms"}, "q", {"remove": ("norms",)}),
    "gains and table, skips": (
        {"norm_type": "rms", "residual": "both", "norms": [*NORMS, "model.embed_norm"]},
        "q",
        {"remove": ("norms", "values")},
    ),
    "gains, parallel, tied": (
        {**PARALLEL, "norm_type": "rms", "tie_word_embeddings": True},
        "q",
        {"remove": ("norms",)},
    ),
    "table, layer norm": ({"norm_type": "layer", "norms": ["model.embed_norm"]}, "q", {"remove": ("norms",)}),
    "table, learned positions": (
        {"norm_type": "layer", "norms": ["model.embed_norm"], "position_type": "learned"},
        "q",
        {"remove": ("norms",)},
    ),
    "table and everything": (
        {"norm_type": "rms", "norms": ["model.embed_norm"], **BIASES},
        "pivoted",
        {"remove": (*FULL, "norms")},
    ),
    "redundant norm": ({**REDUNDANT, "hidden_act": "relu", "attention_bias": True}, "q", {"remove": ("p",)}),
    "redundant norm, mlp, gains": (
        {**REDUNDANT, "ffn_type": "mlp", "hidden_act": "relu2"},
        "q",
        {"remove": ("norms", "values", "p")},
    ),
    "redundant norm, wide heads": (
        {**REDUNDANT, "hidden_act": "relu", "head_dim": 12, "num_key_value_heads": 4, "attention_bias": True},
        "q",
        {"remove": ("p",)},
    ),
    "redundant norm, biases, gains": (
        {**REDUNDANT, "hidden_act": "relu", "attention_bias": True, "residual_gains": True},
        "q",
        {"remove": ("p",)},
    ),
    "p's bias, gains": ({"attention_bias": True, "residual_gains": True}, "q", {"remove": ("p",)}),
    "values' and p's bias, gains": (
        {"attention_bias": True, "residual_gains": True, "attention_shaping": "full"},
        "q",
        {"remove": ("values", "p")},
    ),
    "gains, biases, everything": ({"residual_gains": True, **BIASES}, "pivoted", {"remove": FULL}),
    "gains, biases, experts, tied": ({"residual_gains": True, **BIASES, **MOE, "tie_word_embeddings": True}, "pivoted"),
    "gains, biases, parallel": ({"residual_gains": True, **BIASES, **PARALLEL}, "pivoted", {"remove": FULL}),
    "gains, biases, parallel, experts as they are": (
        {"residual_gains": True, **BIASES, **PARALLEL, **MOE, "norm_topk_prob": False},
        "pivoted",
    ),
    "gains, biases, parallel, p": (
        {"residual_gains": True, **BIASES, **PARALLEL},
        "q",
        {"remove": ("p",), "parallel_removes": "p"},
    ),
    "gains, biases, skip past the attention": (
        {"residual_gains": True, **BIASES, "residual": "attention"},
        "pivoted",
        {"remove": FULL},
    ),
    "gains, biases, skip past the FFN": (
        {"residual_gains": True, **BIASES, "residual": "ffn"},
        "pivoted",
        {"remove": FULL},
    ),
    "skip past the attention": ({"residual": "attention"}, "q"),
    "skip past the attention, everything": ({"residual": "attention", **BIASES}, "pivoted", {"remove": FULL}),
    "skip past the attention, tied": ({"residual": "attention", "tie_word_embeddings": True, **BIASES}, "q"),
    "skip past the attention, gains": (
        {"residual": "attention", "residual_gains": True, "attention_shaping": "full"},
        "pivoted",
        {"remove": FULL},
    ),
    "skip past the attention, experts": ({"residual": "attention", **MOE, **BIASES}, "pivoted"),
    "skip past the FFN": ({"residual": "ffn"}, "q"),
    "skip past the FFN, everything": ({"residual": "ffn", **BIASES}, "pivoted", {"remove": FULL}),
    "skip past the FFN, experts": ({"residual": "ffn", **MOE, **BIASES}, "pivoted", {"remove": FULL}),
    "skip past the FFN, positions, by k": ({"residual": "ffn", "position_type": "learned", **MHA}, "k"),
    "skips, no norms": ({"residual": "both"}, "q"),
    "skips, no norms, everything": (
        {"residual": "both", "residual_gains": True},
        "pivoted",
        {"remove": ("stream", "values", "p")},
    ),
    "skips, no norms, parallel, experts": (
        {"residual": "both", **PARALLEL, **MOE},
        "pivoted",
        {"remove": ("stream", "values")},
    ),
    "pivoted, nothing left of Q, K, V": (
        {"num_attention_heads": 2, "head_dim": 8, "num_key_value_heads": 1},
        "pivoted",
    ),
}


CASES = [(*case, {})[:3] for case in NAMED.values()]
# Of these, what other cases together have, too.
COVERED = {
    "attention bias, by k",
    "attention bias, by v",
    "biases of q, k and v, values",
    "mlp bias",
    "gate bias",
    "learned positions",
    "fully shaped, by v",
    "pivoted, MHA",
    "pivoted, MQA",
    "pivoted, all biases",
    "pivoted, learned positions",
    "pivoted, interleaved rope",
    "pivoted, fully shaped",
    "parallel, MHA, by k",
    "parallel, tied, attention bias",
    "parallel, wide heads",
    "parallel, experts, biases",
    "parallel, p and values",
    "parallel, p, wide heads",
    "parallel, experts, weights as they are, biases, tied",
    "experts",
    "experts, biases",
    "experts, tied, attention bias",
    "experts, weights as they are",
    "alibi",
    "everything",
    "everything, by q",
    "everything, fully shaped",
    "values and head",
    "gains",
    "gains, parallel, tied",
    "table, layer norm",
    "redundant norm",
    "redundant norm, wide heads",
    "gains, biases, experts, tied",
    "gains, biases, parallel",
    "gains, biases, parallel, p",
    "gains, biases, skip past the FFN",
    "skip past the attention",
    "skip past the attention, gains",
    "skip past the attention, experts",
    "skip past the FFN",
    "skip past the FFN, experts",
    "skips, no norms",
}


@pytest.mark.parametrize(
    ("fields", "basis", "options"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in COVERED))
        for name, case in zip(NAMED, CASES, strict=True)
    ],
)
def test_named_cases(fields, basis, options, tmp_path):
    check(build(**fields), basis, tmp_path, **options)
    if basis == "pivoted" and "values" not in options.get(
        "remove", ()
    ):  # and other columns than Q's, unless all of them are the stream
        trivial = [torch.equal(order, order.sort().values) for order in orders(tmp_path / "fused")]
        assert not any(trivial) or Architecture.from_config(CheckpointReader(tmp_path / "fused").config).rest_width == 0


@st.composite
def cases(draw):
    """An architecture, what becomes the identity, and what else is removed: whatever is not blocked."""
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    head_dim = draw(st.sampled_from([2, 4, 8]))
    basis = draw(st.sampled_from(["pivoted", "pivoted", *("qkv" if kv_heads == heads else "q")]))
    hidden_size = heads * head_dim
    if basis == "pivoted":  # also narrower and wider than the query heads, up to all of q and k
        hidden_size = draw(st.integers(max(2, hidden_size // 2), hidden_size + kv_heads * head_dim))
    position = draw(st.sampled_from(["rope", "rope_interleaved", "learned", "alibi", "none"]))
    ffn = draw(st.sampled_from(["mlp", "glu", "moe"]))
    block = draw(st.sampled_from(["serial", "serial", "parallel"]))
    fields = {
        "vocab_size": draw(st.integers(5, 70)),
        "hidden_size": hidden_size,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.integers(2 * hidden_size, 3 * hidden_size)),
        "block_type": block,
        "ffn_type": ffn,
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "leaky_relu"])),
        "position_type": position,
        "attention_shaping": draw(st.sampled_from([None, "value", "full"])),
        "norm_type": draw(st.sampled_from(["none", "none", "none", "rms", "layer"])),
        "residual": draw(
            st.sampled_from(["none", "none", "none", "both"] + ["ffn", "attention"] * (block == "serial"))
        ),
        "sliding_window": draw(st.sampled_from([None, None, 3])),
        "attn_logit_softcapping": draw(st.sampled_from([None, None, 0.5])),
        "qk_norm": draw(st.sampled_from([None, None, "head_dim"])),
        "residual_gains": draw(st.integers(0, 3)) == 0,
    }
    if ffn == "moe":
        fields |= {"num_local_experts": 3, "num_experts_per_tok": draw(st.integers(1, 3))}
        fields["norm_topk_prob"] = draw(st.booleans())
    if position.startswith("rope"):
        fields["rope_parameters"] = {"rope_theta": 1e4, "partial_rotary_factor": draw(st.sampled_from([1.0, 0.5]))}
        if head_dim == 2:
            fields["rope_parameters"]["partial_rotary_factor"] = 1.0
    for switch in ("attention_bias", "mlp_bias", "gate_bias", "tie_word_embeddings"):
        fields[switch] = draw(st.booleans()) and not (switch == "gate_bias" and ffn != "glu")
    asked = draw(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=5, unique=True))
    options = {"parallel_removes": draw(st.sampled_from(["readers", "p"]))}
    options["remove"] = possible(fields, basis, asked, **options)
    assume(options["remove"])
    return fields, basis, options, draw(st.integers(0, 2**16))


def possible(fields, basis, kinds, parallel_removes):
    """Of these kinds, those that can be removed together."""
    architecture = Architecture.from_config({"model_type": "skipless", **TINY, **fields})
    kinds = list(kinds)
    while kinds:
        try:
            asked = Request(basis, remove=tuple(kinds), parallel_removes=parallel_removes).seams(architecture)
        except InputError:
            alone = "queries" in kinds and not {"stream", "first_layer"}.isdisjoint(kinds)
            kinds.remove("queries" if alone else "stream")
            continue
        blocked = {seam.kind for seam in asked if seam.blocked}
        if not blocked:
            return tuple(kinds) if asked else ()
        kinds = [kind for kind in kinds if kind not in blocked]
    return ()


def test_no_bias_gets_past_a_gain_of_0(tmp_path):
    model = build(residual_gains=True, attention_bias=True)
    model.model.layers[0].ffn_gain.data.zero_()
    source = save(model, tmp_path / "source")
    with pytest.raises(InputError, match=r"model.layers.0.ffn_gain: expected a gain other than 0, .* leave stream out"):
        skipless.fuse(source, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
    skipless.fuse(source, tmp_path / "fused", remove=("p",))
    assert relative_error(load(tmp_path / "fused"), model) <= FP64


@pytest.mark.slow
@settings(max_examples=200)
@given(case=cases())
def test_drawn_cases(case, tmp_path_factory):
    fields, basis, options, seed = case
    check(build(seed, **fields), basis, tmp_path_factory.mktemp("drawn"), **options)


@torch.no_grad()
def weaken_queries(model):
    """Make half of every layer's Q a copy of the other, nearly: the best columns then are not Q's alone."""
    for layer in model.model.layers:
        for weight in (layer.self_attn.q_proj.weight, layer.self_attn.q_proj.bias):
            if weight is not None:
                half = len(weight) // 2
                weight[:half] = weight[len(weight) - half :] + 0.05 * weight[:half]
    return model


def orders(folder):
    """Every column_order of a checkpoint."""
    return [tensor for name, tensor in load_file(folder / "model.safetensors").items() if "column_order" in name]


def check(model, basis, folder, **options):
    if basis == "pivoted" and "values" not in options.get("remove", ()):
        weaken_queries(model)
    source, fused = save(model, folder / "source"), folder / "fused"
    options = {"remove": ("stream", "p"), **options}
    try:
        plan = skipless.fuse(source, fused, basis=basis, **options)
    except InputError as error:  # a result that would be larger
        assume("of the weights that it replaces" not in str(error) and "expected fewer" not in str(error))
        raise
    assert "first_layer" in options["remove"] or plan.parameters[1] < plan.parameters[0]  # a table may be larger
    rewritten = load(fused)
    assert relative_error(rewritten, model) <= FP64
    if model.config.ffn_type != "moe":  # whose choice of experts may change with the least error
        assert relative_error(load(fused, torch.float32), model) <= FP32

    ids = random_ids(model, length=8)
    mask = torch.ones_like(ids)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(rewritten.generate(ids, **options), model.generate(ids, **options))

    spoil(fused)
    assert relative_error(load(fused), model) > 1e3 * FP64


def spoil(folder, factor=1.001):
    """The negative control: half of M (of every expert's), or of what layer 0 looks up in its place, off by one part in
    a thousand."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    ups = [name for name in tensors if name.startswith("model.layers.0.mlp.") and name.endswith("up_proj.weight")]
    halves = [tensors[name][::2] for name in ups] or [tensors["model.embed_tokens.weight"][:, ::2]]
    for half in halves:  # not all: a norm would undo it
        half *= factor
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True, "tie_word_embeddings": True}], ids=str)
def test_fp32_checkpoints_stay_within_fp32(fields, tmp_path):
    model = build(dtype=torch.float32, **fields)
    save(model, tmp_path / "source")
    skipless.fuse(tmp_path / "source", tmp_path / "fused")
    assert relative_error(load(tmp_path / "fused", torch.float32), model.double()) <= FP32
    spoil(tmp_path / "fused")
    assert relative_error(load(tmp_path / "fused", torch.float32), model.double()) > FP32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("fields", "basis", "options"), CASES, ids=NAMED.keys())
def test_half_precision(fields, basis, options, dtype, tmp_path):
    model = conditioned(fields, basis, options)
    source = save(model, tmp_path / "source")
    skipless.fuse(source, tmp_path / "fused", basis=basis, dtype=dtype, **{"remove": ("stream", "p"), **options})
    own = relative_error(load(source, getattr(torch, dtype)), model)
    assert relative_error(load(tmp_path / "fused", getattr(torch, dtype)), model) <= HALF * own
    spoil(tmp_path / "fused", factor=2)
    assert relative_error(load(tmp_path / "fused", getattr(torch, dtype)), model) > HALF * own


def conditioned(fields, basis, options):
    """Weights as they come if pivoted; a well-conditioned Q, K, V or P if that is to be the identity, or [Q|K] if V's
    columns cannot be.
    """
    if "num_local_experts" in fields:  # of which all are taken: which are the best changes with the least error
        fields = {**fields, "num_experts_per_tok": fields["num_local_experts"]}
    model = build(**fields)
    if basis == "pivoted" and "values" not in options.get("remove", ()):
        weaken_queries(model)
    elif basis != "pivoted":
        for layer in model.model.layers:
            for name in (f"{basis}_proj", "o_proj"):
                torch.nn.init.orthogonal_(getattr(layer.self_attn, name).weight)
    return model


@pytest.mark.parametrize("layers_open", [[0], [1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("basis", ["q", "pivoted"])
def test_layers_left_open(basis, layers_open, tied, tmp_path):
    model = build(tie_word_embeddings=tied, attention_bias=True)
    save(model, tmp_path / "source")
    plan = skipless.fuse(tmp_path / "source", tmp_path / "fused", basis=basis, layers_open=layers_open)
    assert relative_error(load(tmp_path / "fused"), model) <= FP64
    kept = {name for name in plan.outputs if name.endswith("q_proj.weight")}
    assert kept == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in layers_open}
    if len(layers_open) < 3:  # and close the rest later
        assert skipless.fuse(tmp_path / "fused", tmp_path / "whole").basis == basis
        assert relative_error(load(tmp_path / "whole"), model) <= FP64
    spoil(tmp_path / "fused")
    assert relative_error(load(tmp_path / "fused"), model) > 1e3 * FP64


def test_what_must_go_at_once_is_said_so_and_can(tmp_path):
    """Of a parallel layer P and values: after either the other is refused, and both together are not."""
    model = build(**PARALLEL)
    source = save(model, tmp_path / "source")
    said = {"p": "heads of layer 0 pass through to the stream", "values": "v_proj passes inputs of the stream"}
    for first, second in (("p", "values"), ("values", "p")):
        skipless.fuse(source, tmp_path / first, remove=(first,), parallel_removes="p")
        with pytest.raises(InputError, match=f"{said[first]}.*; close both at once, of the original"):
            skipless.fuse(tmp_path / first, tmp_path / "then", remove=(second,), parallel_removes="p")
        assert not (tmp_path / "then").exists()
    skipless.fuse(source, tmp_path / "both", remove=("p", "values"), parallel_removes="p")
    assert relative_error(load(tmp_path / "both"), model) <= FP64
    spoil(tmp_path / "both")
    assert relative_error(load(tmp_path / "both"), model) > 1e3 * FP64


@pytest.mark.parametrize("kind", ["stream", "p"])
def test_one_kind_of_seams(kind, tmp_path):
    model = build(head_dim=4, **MHA)
    save(model, tmp_path / "source")
    plan = skipless.fuse(tmp_path / "source", tmp_path / "fused", remove=[kind])
    assert relative_error(load(tmp_path / "fused"), model) <= FP64
    assert plan.parameters[0] - plan.parameters[1] == sum(
        seam.saves for seam in seams(plan.source) if seam.kind == kind
    )
    other = skipless.fuse(tmp_path / "fused", tmp_path / "both")
    assert other.parameters[1] == skipless.fuse(tmp_path / "source", tmp_path / "at once").parameters[1]
    assert relative_error(load(tmp_path / "both"), model) <= FP64
    name = "model.layers.1.self_attn.rest_proj.weight" if kind == "stream" else "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path / "fused", **{name: 1.001 * CheckpointReader(tmp_path / "fused").tensor(name)})
    assert relative_error(load(tmp_path / "fused"), model) > 1e3 * FP64


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
def test_the_files_are_smaller_by_what_the_seams_say(fields, tmp_path):
    save(build(dtype=torch.float32, **fields), tmp_path / "source")
    plan = skipless.fuse(tmp_path / "source", tmp_path / "fused")

    def weights(folder):
        tensors = CheckpointReader(folder).tensors
        return sum(info.weights for name, info in tensors.items() if name.endswith("weight"))

    architecture = Architecture.from_config(json.loads((tmp_path / "source" / "config.json").read_text()))
    saved = weights(tmp_path / "source") - weights(tmp_path / "fused")
    closed = [seam for seam in seams(architecture) if seam.kind in ("stream", "p")]
    assert saved == sum(seam.saves for seam in closed) == 3 * 2 * 32**2
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("source", "fused")]
    data = plan.bytes[0] - plan.bytes[1]
    assert abs(sizes[0] - sizes[1] - data) < 2000  # the rest is the shorter header
    if not fields.get("attention_bias"):
        assert data == 4 * saved


def test_what_eps_costs_where_a_norm_is_nearly_redundant(tmp_path):
    """Removed for eps = 0; with another in both models, they differ by about eps (1 - s^-2k) / (2 mean(z^2))."""
    save(build(**REDUNDANT, hidden_act="relu"), tmp_path / "source")
    skipless.fuse(tmp_path / "source", tmp_path / "fused", remove=["p"])
    errors = []
    for eps in (0.0, 1e-8, 1e-6):
        for name in ("source", "fused"):
            edit_config(tmp_path / name, norm_eps=eps)
        errors.append(relative_error(load(tmp_path / "fused"), load(tmp_path / "source")))
    assert errors[0] <= FP64 < errors[2]
    assert errors[2] == pytest.approx(100 * errors[1], rel=0.1)  # of first order
    assert errors[2] < 1e-4

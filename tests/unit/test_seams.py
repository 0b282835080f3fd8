import math
import re

import pytest

from skipless.architecture.config import Architecture
from skipless.architecture.graph import graph
from skipless.architecture.seams import closed, seams
from tests.models import TINY


def architecture(**changes) -> Architecture:
    return Architecture.from_config({"model_type": "skipless", **TINY, **changes})


MOE = {"ffn_type": "moe", "num_local_experts": 4, "num_experts_per_tok": 2}


def weights(model: Architecture) -> int:
    return sum(math.prod(shape) for name, shape in model.tensors().items() if name.endswith("weight"))


def test_a_serial_model_has_three_seams_a_layer_and_one_before_the_head():
    found = seams(architecture())
    kinds = ("stream", "values", "p")
    assert [(seam.kind, seam.layer) for seam in found] == [(kind, i) for i in range(3) for kind in kinds] + [
        ("head", 3)
    ]
    stream, values, p = found[3:6]
    assert (values.writers, values.readers) == (stream.readers[2:], p.writers)
    assert stream.writers == ("model.layers.0.mlp.down_proj",)
    assert stream.readers == tuple(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
    assert p.writers == ("model.layers.1.self_attn.o_proj",)
    assert p.readers == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    assert not any(seam.blocked for seam in found)


def test_the_first_seam_is_written_by_the_embeddings_and_pulls_the_tied_head_along():
    assert seams(architecture())[0].writers == ("model.embed_tokens",)
    seam = seams(architecture(position_type="learned", tie_word_embeddings=True))[0]
    assert seam.writers == ("model.embed_tokens", "model.position_embeddings")
    assert seam.duals == ("model.layers.2.mlp.down_proj",)


@pytest.mark.parametrize(
    ("kv_heads", "bases"), [(4, {"q", "k", "v", "pivoted"}), (2, {"q", "pivoted"}), (1, {"q", "pivoted"})]
)
def test_only_square_projections_and_pivoted_columns_can_become_the_identity(kv_heads, bases):
    assert set(seams(architecture(num_key_value_heads=kv_heads))[0].identities) == bases


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ffn_type": "mlp"},
        {"head_dim": 4},
        {"head_dim": 16},
        {"head_dim": 16, "ffn_type": "mlp", "intermediate_size": 24},
        MOE,
        {"block_type": "parallel"},
        {"block_type": "parallel", "head_dim": 16},
    ],
    ids=str,
)
@pytest.mark.parametrize("parallel_removes", ["readers", "p"])
def test_a_seam_saves_what_it_says(fields, parallel_removes):
    model = architecture(**fields)
    every = seams(model, parallel_removes)
    for seam in every:
        if seam.blocked or (seam.kind == "stream" and "q" not in seam.identities):
            continue
        each = [other for other in every if other.kind == seam.kind]  # one switch for all of them
        closing = [seam] if seam.kind == "stream" else each
        assert weights(model) - weights(closed(model, closing, "q")) == sum(other.saves for other in closing)


def test_square_q_and_p_save_twice_d_squared_a_layer():
    model = architecture()
    closing = [seam for seam in seams(model) if seam.kind in ("stream", "p")]
    assert weights(model) - weights(closed(model, closing, "q")) == 2 * 3 * 32**2


def test_closing_records_what_was_done():
    fused = closed(architecture(attention_bias=True), seams(architecture(attention_bias=True)), "q")
    assert (fused.stream_basis, fused.layers_open, fused.p_removed) == ("q", (), True)
    assert fused.folded_biases == (
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp.gate_proj",
        "model.layers.2.mlp.up_proj",
    )
    assert seams(fused) == []


def test_a_seam_left_open_can_be_closed_later():
    model = architecture()
    half = closed(model, [seam for seam in seams(model) if seam.layer != 1 or seam.kind == "p"], "q")
    assert half.layers_open == (1,)
    (left,) = seams(half)
    assert (left.kind, left.layer) == ("stream", 1)
    assert closed(half, [left], "q") == closed(model, seams(model), "q")


@pytest.mark.parametrize(
    ("fields", "kind", "reason"),
    [
        (
            {"block_type": "parallel"},
            "p",
            r"of the 4 stream seams gives up hidden_size\^2 = 1,024 .*rewriting cannot remove Q and P",
        ),
        (
            {"p_removed": True, "block_type": "parallel"},
            "stream",
            "heads of layer 0 are added to the stream as they are",
        ),
        ({"stream_basis": "pivoted"}, "values", "v_proj is not there any more"),
        ({"values_removed": True}, "stream", "v_proj passes inputs of the stream through"),
        ({**MOE, "attention_bias": True, "norm_topk_prob": False}, "stream", "do not sum to 1 would scale the bias"),
        ({"norm_type": "rms", "hidden_act": "relu"}, "p", "is not redundant, as norm_eps is 1e-06"),
        ({"norm_type": "rms", "norm_eps": 0.0}, "p", "hidden_act 'silu' is not homogeneous"),
        ({"norm_type": "rms", "norm_eps": 0.0, "hidden_act": "relu", "mlp_bias": True}, "p", "its FFN has biases"),
        (
            {"norm_type": "rms"},
            "stream",
            "model.layers.1.input_layernorm stands between model.layers.0.mlp.down_proj and",
        ),
        ({"norm_type": "layer"}, "p", "model.layers.1.post_attention_layernorm stands between"),
        ({"residual": "both"}, "stream", "residual 'both': skip connections join what model.embed_tokens and others"),
        ({"residual": "ffn"}, "p", r"one space, which gives up hidden_size\^2 = 1,024 weights once, .* of layer 2"),
        (
            {"residual": "attention"},
            "p",
            r"one space, which gives up hidden_size\^2 = 1,024 weights once, .* of layer 1",
        ),
        (
            {"residual": "both", "norm_type": "rms"},
            "stream",
            "join the stream of layers 0 to 2 into one space, .* model.layers.0.input_layernorm stands between it and",
        ),
        (
            {"residual": "attention", "norm_type": "rms"},
            "stream",
            "join the stream of layer 1 into one space, .*1.input_layernorm stands",
        ),
        (
            {"residual": "ffn", "norm_type": "rms"},
            "p",
            "join the stream of layer 1 into one space, .*1.post_attention_layernorm",
        ),
    ],
)
def test_a_blocked_seam_says_why(fields, kind, reason):
    seam = next(seam for seam in seams(architecture(**fields)) if seam.kind == kind and seam.layer == 1)
    assert seam.refusal
    assert re.search(reason, seam.refusal)


DOWN, OUT, UP = (f"model.layers.{{}}.{name}" for name in ("mlp.down_proj", "self_attn.o_proj", "mlp.up_proj"))


@pytest.mark.parametrize(
    ("fields", "layer", "scales"),
    [
        ({}, 0, {}),
        ({}, 1, {DOWN.format(0): {"model.layers.0.ffn_gain": 1}}),
        (
            {"block_type": "parallel"},
            1,
            {DOWN.format(0): {"model.layers.0.ffn_gain": 1}, OUT.format(0): {"model.layers.0.attention_gain": 1}},
        ),
        (
            {"residual": "attention"},  # M reads what Q, K, V read times the skip's gain, and P's, too
            1,
            {
                DOWN.format(0): {"model.layers.0.ffn_gain": 1},
                OUT.format(1): {"model.layers.1.attention_skip_gain": -1, "model.layers.1.attention_gain": 1},
                UP.format(1): {"model.layers.1.attention_skip_gain": 1},
            },
        ),
        (
            {"residual": "ffn"},  # Q, K, V read what M of the layer before reads times the skip's gain, and O's, too
            1,
            {
                OUT.format(0): {"model.layers.0.ffn_skip_gain": 1, "model.layers.0.attention_gain": 1},
                DOWN.format(0): {"model.layers.0.ffn_gain": 1},
                UP.format(0): {"model.layers.0.ffn_skip_gain": -1},
            },
        ),
    ],
    ids=str,
)
def test_the_gains_that_a_bias_moves_past(fields, layer, scales):
    model = architecture(residual_gains=True, attention_bias=True, ffn_type="mlp", **fields)
    seam = next(seam for seam in seams(model) if (seam.kind, seam.layer) == ("stream", layer))
    assert not seam.blocked
    assert seam.scales == scales
    assert set(seam.mixed) == {gain for gains in scales.values() for gain in gains}
    without = architecture(residual_gains=True, ffn_type="mlp", **fields)
    assert not any(seam.scales for seam in seams(without))


@pytest.mark.parametrize("residual", ["none", "attention", "ffn", "both"])
@pytest.mark.parametrize("block", ["serial", "parallel"])
def test_what_has_been_written_before_each_reads(block, residual):
    if block == "parallel" and residual in ("attention", "ffn"):
        return
    for space in graph(architecture(block_type=block, residual=residual)).spaces:
        place = space.places.index
        for port in space.readers:
            before = sum(place(writer.place) <= place(port.place) for writer in space.writers)
            assert space.seen.get(port.module, len(space.writers)) == before

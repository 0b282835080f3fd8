"""Fused equals original, over everything that is supported; and a spoiled weight is noticed."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import skipless
from skipless.architecture import Architecture
from skipless.checkpoint.reader import CheckpointReader
from skipless.seams import seams
from tests.models import build, edit_tensors, load, random_ids, relative_error, save
from tests.tolerances import FP32, FP64, HALF

MHA = {"num_key_value_heads": 4}
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
    "pivoted, nothing left of Q, K, V": (
        {"num_attention_heads": 2, "head_dim": 8, "num_key_value_heads": 1},
        "pivoted",
    ),
}


@pytest.mark.parametrize(("fields", "basis"), NAMED.values(), ids=NAMED.keys())
def test_named_cases(fields, basis, tmp_path):
    check(build(**fields), basis, tmp_path)
    if basis == "pivoted":  # and other columns than Q's, unless all of them are the stream
        trivial = [torch.equal(order, order.sort().values) for order in orders(tmp_path / "fused")]
        assert not any(trivial) or Architecture.from_config(CheckpointReader(tmp_path / "fused").config).rest_width == 0


@st.composite
def cases(draw):
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    head_dim = draw(st.sampled_from([2, 4, 8]))
    basis = draw(st.sampled_from(["pivoted", *("qkv" if kv_heads == heads else "q")]))
    hidden_size = heads * head_dim
    if basis == "pivoted":  # also narrower and wider than the query heads, up to all of q, k and v
        hidden_size = draw(st.integers(max(2, hidden_size // 2), hidden_size + 2 * kv_heads * head_dim))
    position = draw(st.sampled_from(["rope", "rope_interleaved", "learned", "none"]))
    fields = {
        "vocab_size": draw(st.integers(5, 70)),
        "hidden_size": hidden_size,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.integers(2 * hidden_size, 3 * hidden_size)),
        "ffn_type": draw(st.sampled_from(["mlp", "glu"])),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "leaky_relu"])),
        "position_type": position,
        "attention_shaping": draw(st.sampled_from([None, "value", "full"])),
    }
    if position.startswith("rope"):
        fields["rope_parameters"] = {"rope_theta": 1e4, "partial_rotary_factor": draw(st.sampled_from([1.0, 0.5]))}
        if head_dim == 2:
            fields["rope_parameters"]["partial_rotary_factor"] = 1.0
    for switch in ("attention_bias", "mlp_bias", "gate_bias", "tie_word_embeddings"):
        fields[switch] = draw(st.booleans()) and not (switch == "gate_bias" and fields["ffn_type"] == "mlp")
    return fields, basis, draw(st.integers(0, 2**16))


@settings(max_examples=200)
@given(case=cases())
def test_drawn_cases(case, tmp_path_factory):
    fields, basis, seed = case
    check(build(seed, **fields), basis, tmp_path_factory.mktemp("drawn"))


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


def check(model, basis, folder):
    if basis == "pivoted":
        weaken_queries(model)
    source, fused = save(model, folder / "source"), folder / "fused"
    skipless.fuse(source, fused, basis=basis, remove=removable(model))
    rewritten = load(fused)
    assert relative_error(rewritten, model) <= FP64
    assert relative_error(load(fused, torch.float32), model) <= FP32

    ids = random_ids(model, length=8)
    mask = torch.ones_like(ids)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(rewritten.generate(ids, **options), model.generate(ids, **options))

    spoil(fused)
    assert relative_error(load(fused), model) > 1e3 * FP64


def removable(model):
    """Every kind of seams that the model's widths allow to close."""
    config = model.config
    return ("stream", "p") if config.num_attention_heads * config.head_dim <= config.hidden_size else ("stream",)


def spoil(folder, factor=1.001):
    """The negative control: one folded matrix, off by one part in a thousand."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] *= factor
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True, "tie_word_embeddings": True}], ids=str)
def test_fp32_checkpoints_stay_within_fp32(fields, tmp_path):
    model = build(dtype=torch.float32, **fields)
    save(model, tmp_path / "source")
    skipless.fuse(tmp_path / "source", tmp_path / "fused")
    assert relative_error(load(tmp_path / "fused", torch.float32), model.double()) <= FP32
    spoil(tmp_path / "fused")
    assert relative_error(load(tmp_path / "fused", torch.float32), model.double()) > FP32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("fields", "basis"), NAMED.values(), ids=NAMED.keys())
def test_half_precision(fields, basis, dtype, tmp_path):
    """Weights as they come if pivoted; a well-conditioned Q, K or V if that is to be the identity."""
    model = build(**fields)
    if basis == "pivoted":
        weaken_queries(model)
    else:
        for layer in model.model.layers:
            torch.nn.init.orthogonal_(getattr(layer.self_attn, f"{basis}_proj").weight)
    source = save(model, tmp_path / "source")
    skipless.fuse(source, tmp_path / "fused", basis=basis, dtype=dtype, remove=removable(model))
    own = relative_error(load(source, getattr(torch, dtype)), model)
    assert relative_error(load(tmp_path / "fused", getattr(torch, dtype)), model) <= HALF * own
    spoil(tmp_path / "fused", factor=2)
    assert relative_error(load(tmp_path / "fused", getattr(torch, dtype)), model) > HALF * own


@pytest.mark.parametrize("layers_open", [[0], [1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("tied", [False, True])
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


@pytest.mark.parametrize("kind", ["stream", "p"])
def test_one_kind_of_seams(kind, tmp_path):
    model = build(head_dim=4, **MHA)
    save(model, tmp_path / "source")
    plan = skipless.fuse(tmp_path / "source", tmp_path / "fused", remove=[kind])
    assert relative_error(load(tmp_path / "fused"), model) <= FP64
    assert plan.weights[0] - plan.weights[1] == sum(seam.saves for seam in seams(plan.source) if seam.kind == kind)
    other = skipless.fuse(tmp_path / "fused", tmp_path / "both")
    assert other.weights[1] == skipless.fuse(tmp_path / "source", tmp_path / "at once").weights[1]
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
    assert saved == sum(seam.saves for seam in seams(architecture)) == 3 * 2 * 32**2
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("source", "fused")]
    data = plan.bytes[0] - plan.bytes[1]
    assert abs(sizes[0] - sizes[1] - data) < 2000  # the rest is the shorter header
    if not fields.get("attention_bias"):
        assert data == 4 * saved

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
from tests.models import build, load, random_ids, relative_error, save
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
}


@pytest.mark.parametrize(("fields", "basis"), NAMED.values(), ids=NAMED.keys())
def test_named_cases(fields, basis, tmp_path):
    check(build(**fields), basis, tmp_path)


@st.composite
def cases(draw):
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    head_dim = draw(st.sampled_from([2, 4, 8]))
    position = draw(st.sampled_from(["rope", "rope_interleaved", "learned", "none"]))
    fields = {
        "vocab_size": draw(st.integers(5, 70)),
        "hidden_size": heads * head_dim,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.integers(2 * heads * head_dim, 3 * heads * head_dim)),
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
    return fields, draw(st.sampled_from("qkv" if kv_heads == heads else "q")), draw(st.integers(0, 2**16))


@settings(max_examples=200)
@given(case=cases())
def test_drawn_cases(case, tmp_path_factory):
    fields, basis, seed = case
    check(build(seed, **fields), basis, tmp_path_factory.mktemp("drawn"))


def check(model, basis, folder):
    source, fused = save(model, folder / "source"), folder / "fused"
    skipless.fuse(source, fused, basis=basis)
    rewritten = load(fused)
    assert relative_error(rewritten, model) <= FP64
    assert relative_error(load(fused, torch.float32), model) <= FP32

    ids = random_ids(model, length=8)
    mask = torch.ones_like(ids)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(rewritten.generate(ids, **options), model.generate(ids, **options))

    spoil(fused)
    assert relative_error(load(fused), model) > 1e3 * FP64


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


def test_a_well_conditioned_model_holds_up_in_bf16(tmp_path):
    model = build()
    with torch.no_grad():
        for layer in model.model.layers:
            torch.nn.init.orthogonal_(layer.self_attn.q_proj.weight)
    save(model, tmp_path / "source")
    skipless.fuse(tmp_path / "source", tmp_path / "fused", dtype="bfloat16")
    own = relative_error(load(tmp_path / "source", torch.bfloat16), model)
    assert relative_error(load(tmp_path / "fused", torch.bfloat16), model) <= HALF * own
    spoil(tmp_path / "fused", factor=2)
    assert relative_error(load(tmp_path / "fused", torch.bfloat16), model) > HALF * own


@pytest.mark.parametrize("layers_open", [[0], [1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_layers_left_open(layers_open, tied, tmp_path):
    model = build(tie_word_embeddings=tied, attention_bias=True)
    save(model, tmp_path / "source")
    plan = skipless.fuse(tmp_path / "source", tmp_path / "fused", layers_open=layers_open)
    assert relative_error(load(tmp_path / "fused"), model) <= FP64
    kept = {name for name in plan.outputs if name.endswith("q_proj.weight")}
    assert kept == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in layers_open}
    if len(layers_open) < 3:  # and close the rest later
        skipless.fuse(tmp_path / "fused", tmp_path / "whole")
        assert relative_error(load(tmp_path / "whole"), model) <= FP64
    spoil(tmp_path / "fused")
    assert relative_error(load(tmp_path / "fused"), model) > 1e3 * FP64


def test_narrow_heads_merge_p_and_leave_the_stream_open(tmp_path):
    model = build(head_dim=4)
    save(model, tmp_path / "source")
    plan = skipless.fuse(tmp_path / "source", tmp_path / "fused", layers_open=[0, 1, 2])
    assert relative_error(load(tmp_path / "fused"), model) <= FP64
    saved = plan.weights[0] - plan.weights[1]
    assert saved == sum(seam.saves for seam in seams(plan.source) if seam.kind == "p")
    spoil(tmp_path / "fused")
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

"""Layer 0 precomputed (arXiv:2402.13388): the token table holds what it makes of each token before any attention."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import skipless
from skipless import cli
from skipless.architecture.config import Architecture
from skipless.errors import BugError, InputError
from skipless.removals.first_layer import Layer0
from skipless.serving import gguf
from tests.models import TINY, build, contents, edit_config, edit_tensors, load, relative_error, save, stop_fuse
from tests.tolerances import FP64

NORMS = ["input_layernorm", "post_attention_layernorm", "model.norm", "model.embed_norm"]
PARALLEL = {"block_type": "parallel"}
EXPERTS = {"ffn_type": "moe", "num_local_experts": 3, "num_experts_per_tok": 2}
GAINS = {"residual": "both", "residual_gains": True}
BIASES = {"attention_bias": True, "mlp_bias": True}
D, E = 32, 16  # of TINY: heads together, and key-value heads

# Fields, and the width of a row.
CASES = {
    "serial": ({}, D + 2 * E),
    "parallel": (PARALLEL, D + 2 * E + 32),
    "a skip past the attention": ({"residual": "attention"}, 32 + D + 2 * E),
    "parallel, skips and norms": ({**PARALLEL, **GAINS, "norm_type": "rms", "norms": NORMS}, D + 2 * E + 32),
    "parallel experts": ({**PARALLEL, **EXPERTS, "norm_topk_prob": False, "residual": "both"}, D + 2 * E + 32),
}
MORE = {
    "a skip past the FFN": ({"residual": "ffn"}, D + 2 * E),
    "skips and norms": ({**GAINS, "norm_type": "layer", "norms": NORMS}, 32 + D + 2 * E),
    "a norm of the embeddings": ({"norm_type": "layer", "norms": ["model.embed_norm"]}, D + 2 * E),
    "parallel, one norm": ({**PARALLEL, "norm_type": "layer", "norms": ["input_layernorm"]}, D + 2 * E + 32),
    "biases": (BIASES, D + 2 * E),
    "parallel, biases, an MLP": ({**PARALLEL, **BIASES, "ffn_type": "mlp", "hidden_act": "gelu"}, D + 2 * E + 32),
    "shaped": ({"attention_shaping": "full", "qk_norm": "head_dim"}, D + 2 * E),
    "ALiBi, multi-query": ({"position_type": "alibi", "num_key_value_heads": 1}, D + 16),
    "no positions, wide heads": ({"position_type": "none", "head_dim": 16}, 64 + 64),
    "narrow heads, a window": ({"head_dim": 4, "sliding_window": 3}, 16 + 16),
    "one layer": ({**PARALLEL, "num_hidden_layers": 1}, D + 2 * E + 32),
}


def case(fields):
    return [pytest.param(*values, id=name) for name, values in fields.items()]


@pytest.mark.parametrize(
    ("fields", "width"),
    [*case(CASES), *(pytest.param(*each.values, id=each.id, marks=pytest.mark.slow) for each in case(MORE))],
)
def test_it_is_the_same_function(fields, width, tmp_path):
    model = build(**fields)
    source, fused = save(model, tmp_path / "source"), tmp_path / "fused"
    plan = skipless.fuse(source, fused, remove=["first_layer"])
    found = load(fused)
    assert relative_error(found, model) < FP64
    assert found.model.embed_tokens.weight.shape == (61, width)
    old, new = (load_file(folder / "model.safetensors") for folder in (source, fused))
    gone = old.keys() - new.keys()
    assert all("layers.0." in name or "embed_norm" in name for name in gone)
    assert {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"} <= gone
    assert any(".mlp." in name for name in gone) == (model.config.block_type == "parallel")
    before, after = plan.parameters
    assert after == sum(weight.numel() for weight in found.parameters())
    assert before - after == sum(old[name].numel() for name in gone) - 61 * (width - 32)
    spoiled = new["model.embed_tokens.weight"]
    spoiled[:, -1] *= 1.001
    edit_tensors(fused, model__embed_tokens__weight=spoiled)
    assert relative_error(load(fused), model) > 1e3 * FP64


RUNS = {
    "stream and P": [("stream", "p", "first_layer")],
    "everything": [("stream", "values", "p", "head", "first_layer")],
    "after stream and P": [("stream", "p"), ("first_layer",)],
    "after values": [("values",), ("first_layer",)],
    "before the others": [("first_layer",), ("stream", "values", "p", "head")],
    "after everything": [("stream", "values", "p", "head"), ("first_layer",)],
}


@pytest.mark.parametrize(
    ("name", "basis"),
    [
        ("everything", "pivoted"),
        *(
            pytest.param(name, basis, marks=pytest.mark.slow)
            for name in RUNS
            for basis in ("q", "pivoted")
            if (name, basis) != ("everything", "pivoted")
        ),
    ],
)
def test_with_other_removals(name, basis, tmp_path):
    """However often a serial model without skips is fused, and in which order, a row is q, k and v."""
    model = build(attention_bias=True)
    source = first = save(model, tmp_path / "source")
    for number, kinds in enumerate(RUNS[name]):
        fused = tmp_path / f"fused{number}"
        skipless.fuse(first, fused, remove=kinds, basis=basis)
        first = fused
    found = load(first)
    assert relative_error(found, model) < FP64
    assert found.model.embed_tokens.weight.shape[1] == D + 2 * E
    assert found.model.layers[1].self_attn.q_proj is None or "stream" not in sum(RUNS[name], ())
    report = skipless.verify(source, first, dtypes=["float64"], tokens=8)
    assert report.same, report.note
    assert report.proved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("residual", "removes", "kinds"),
    [
        ("none", "readers", ("stream", "values", "head", "p", "first_layer")),
        ("none", "p", ("stream", "p", "first_layer")),
        ("both", "readers", ("first_layer",)),
    ],
)
def test_parallel_with_other_removals(residual, removes, kinds, tmp_path):
    """What is added to layer 0's attention is in the basis in which the stream seam after it has been closed."""
    model = build(**PARALLEL, **BIASES, residual=residual)
    source, fused = save(model, tmp_path / "source"), tmp_path / "fused"
    skipless.fuse(source, fused, remove=kinds, parallel_removes=removes)
    assert relative_error(load(fused), model) < FP64
    report = skipless.verify(source, fused, dtypes=["float64"], tokens=8)
    assert report.same, report.note
    assert report.proved


def test_a_norm_that_the_table_takes_in_either_way_goes_with_layer_0(tmp_path):
    """Without skips layer 0's norm reads the table alone, and `norms` would apply it to the rows, too."""
    model = build(norm_type="rms")
    source = save(model, tmp_path / "source")
    skipless.fuse(source, tmp_path / "fused", remove=["norms", "first_layer"])
    assert relative_error(load(tmp_path / "fused"), model) < FP64


def test_an_audit_of_what_is_left_reads_no_gain_that_is_in_the_table(tmp_path):
    source = save(build(**PARALLEL, **BIASES, residual_gains=True), tmp_path / "source")
    skipless.fuse(source, tmp_path / "fused", remove=["first_layer"])
    blocked = {seam.layer: seam.blocked for seam in skipless.audit(tmp_path / "fused").seams if seam.kind == "stream"}
    assert "first_layer" in blocked[1]


def test_with_a_skip_the_stream_that_q_has_become_is_stored_once(tmp_path):
    model = build(residual="attention")
    source, closed, fused = save(model, tmp_path / "source"), tmp_path / "closed", tmp_path / "fused"
    with pytest.raises(InputError, match=r"stream seam of layer 0 is blocked by first_layer, .* in a run before"):
        skipless.fuse(source, fused, remove=["stream", "first_layer"])
    skipless.fuse(source, closed, remove=["stream"], basis="q")
    skipless.fuse(closed, fused, remove=["first_layer"])
    assert load(fused).config.row == {"x": 32, "k": E, "v": E}
    assert relative_error(load(fused), model) < FP64
    assert skipless.verify(source, fused, dtypes=["float64"], tokens=8).proved


@pytest.mark.parametrize("fields", [{}, {**PARALLEL, "residual": "both"}], ids=["serial", "parallel"])
def test_in_half_precision_it_loses_no_more_than_the_original(fields, tmp_path):
    model = build(**fields)
    source, fused = save(model, tmp_path / "source"), tmp_path / "fused"
    skipless.fuse(source, fused, remove=["first_layer"], dtype="bfloat16")
    plain = build(**fields).to(torch.bfloat16).double()
    assert relative_error(load(fused), model) < 1.5 * relative_error(plain, model)
    (outcome,) = json.loads((fused / "skipless.json").read_text())["seams"]
    assert (outcome["kind"], outcome["way"], outcome["dtype"]) == ("first_layer", "lookup", "bfloat16")
    audit = skipless.audit(source, remove=["first_layer"], dtype="bfloat16")
    assert audit.safe
    (seam,) = (each for each in audit.seams if each.kind == "first_layer")
    errors, own = seam.ways["lookup"].errors["bfloat16"], seam.original["bfloat16"]
    assert all(errors[name] < own[name] for name in "qkv")


@pytest.mark.parametrize("part", [pytest.param("q", marks=pytest.mark.slow), "beside"])
def test_every_row_is_verified(part, tmp_path):
    """One number of one token that no sample reads is enough."""
    source, fused = save(build(**PARALLEL, vocab_size=400), tmp_path / "source"), tmp_path / "fused"
    skipless.fuse(source, fused, remove=["first_layer"])
    assert skipless.verify(source, fused, dtypes=["float64"], tokens=8).same
    table = load_file(fused / "model.safetensors")["model.embed_tokens.weight"]
    table[397, 0 if part == "q" else -1] += 0.01
    edit_tensors(fused, model__embed_tokens__weight=table)
    (fused / "skipless.json").unlink()  # by which it would show at once
    report = skipless.verify(source, fused, dtypes=["float64"], tokens=8)
    assert not report.same
    assert "a row of model.embed_tokens is off by" in report.note


@pytest.mark.parametrize("method", ["_ffn", "_values"])
def test_a_wrong_table_is_not_published(method, tmp_path, monkeypatch):
    right = getattr(Layer0, method)
    monkeypatch.setattr(Layer0, method, lambda *arguments: right(*arguments) * 1.01)
    source = save(build(**PARALLEL), tmp_path / "source")
    with pytest.raises(BugError, match="nothing was published"):
        skipless.fuse(source, tmp_path / "fused", remove=["first_layer"])
    assert not (tmp_path / "fused").exists()


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped(tmp_path):
    source, options = save(build(**PARALLEL), tmp_path / "source"), {"remove": ["first_layer"]}
    skipless.fuse(source, tmp_path / "whole", **options)
    for number in (0, 2):
        stop_fuse(source, tmp_path / "fused", number, **options)
        skipless.fuse(source, tmp_path / "fused", resume=True, **options)
        assert contents(tmp_path / "fused") == contents(tmp_path / "whole")
        for file in (tmp_path / "fused").iterdir():
            file.unlink()
        (tmp_path / "fused").rmdir()


def test_a_cache_gives_the_same_tokens(tmp_path):
    model = build()
    skipless.fuse(save(model, tmp_path / "source"), tmp_path / "fused", remove=["stream", "p", "first_layer"])
    ids = torch.tensor([[3, 14, 15, 9]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(load(tmp_path / "fused").generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"position_type": "learned"}, "position_type 'learned': positions are added to the embedding"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: the head reads the table of the embeddings"),
    ],
    ids=str,
)
def test_what_stands_in_the_way(fields, reason, tmp_path):
    source = save(build(**fields), tmp_path / "source")
    arguments = ["fuse", str(source), str(tmp_path / "fused"), "--remove", "first_layer"]
    result = CliRunner().invoke(cli.main, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"the first_layer seam of layer 0 is blocked by {reason}" in result.stderr
    assert not (tmp_path / "fused").exists()
    assert reason in skipless.audit(source, remove=["first_layer"]).problems[0]
    with pytest.raises(InputError, match=f"first_layer_removed: expected false, found true with {reason[:20]}"):
        Architecture.from_config({"model_type": "skipless", **TINY, **fields, "first_layer_removed": True})


def test_the_dry_run_says_what_it_costs(tmp_path):
    source = save(build(vocab_size=400), tmp_path / "source")
    arguments = ["fuse", str(source), str(tmp_path / "fused"), "--remove", "first_layer", "--dry-run"]
    text = " ".join(CliRunner().invoke(cli.main, arguments).stdout.split())
    removed, added = 32 * (D + 2 * E), 400 * (D + 2 * E - 32)
    assert f"the model grows by {added - removed:,} weights" in text
    assert (
        f"a step reads 64 instead of {32 + removed:,} at batch 1, 1,024 instead of {512 + removed:,} at batch 16"
        in text
    )
    assert "precompute layer 0 1 " in text


def test_count_says_what_fuse_adds_and_what_is_left(tmp_path):
    source, fused = save(build(), tmp_path / "source"), tmp_path / "fused"
    before = skipless.count(source)
    plan = skipless.fuse(source, fused, remove=["stream", "p", "first_layer"])
    assert before.first_layer is not None
    assert before.first_layer.row == D + 2 * E
    assert plan.parameters[1] - plan.parameters[0] == before.first_layer.grows - 2 * 32**2 - 3 * 32**2
    after = skipless.count(fused)
    assert after.first_layer is None
    assert after.limit == before.limit - 6 * 32**2


def test_a_config_that_contradicts_its_table(tmp_path):
    source, fused = save(build(norm_type="rms"), tmp_path / "source"), tmp_path / "fused"
    skipless.fuse(source, fused, remove=["first_layer"])
    edit_config(fused, norms_removed=[])
    with pytest.raises(InputError, match=r"norms_removed: expected model\.layers\.0\.input_layernorm"):
        skipless.count(fused)


def test_llama_cpp_has_no_place_for_it(tmp_path):
    source, fused = save(build(), tmp_path / "source"), tmp_path / "fused"
    skipless.fuse(source, fused, remove=["first_layer"])
    with pytest.raises(InputError, match="first_layer_removed: expected false for gguf"):
        gguf.write(fused, tmp_path, "f32")

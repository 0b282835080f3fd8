"""skipless audit: says before fusing what fusing would lose, and whether what is asked for is safe."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import skipless
from skipless import cli
from skipless.bundled import BUNDLED
from tests.models import build, edit_config, edit_tensors, save

Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def source(tmp_path):
    return save(build(), tmp_path / "source")


def run(*arguments):
    return CliRunner().invoke(cli.main, ["audit", *map(str, arguments)])


def weaken(folder, factor=1e-4):
    """Make one row of layer 1's Q nearly the same as another."""
    q = skipless.checkpoint.reader.CheckpointReader(folder).tensor(Q1)
    q[0] = q[1] + factor * q[0]
    edit_tensors(folder, **{Q1: q})


def test_every_seam_with_its_matrices_and_errors(source):
    result = run(source, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["safe"]
    assert found["basis"] == "q"
    assert "at most 1." in found["reason"]
    assert [(seam["kind"], seam["layer"]) for seam in found["seams"]] == [
        (kind, layer) for layer in range(3) for kind in ("stream", "p")
    ]
    weights = dict(build().named_parameters())
    for seam in found["seams"]:
        stream = seam["kind"] == "stream"
        assert seam["blocked"] is None
        assert list(seam["matrices"]) == (["q", "k", "v"] if stream else ["p"])
        assert list(seam["ways"]) == (["q", "pivoted"] if stream else ["p"])
        assert list(seam["original"]) == ["float64", "float32", "bfloat16", "float16"]
        for letter, matrix in seam["matrices"].items():
            name = f"model.layers.{seam['layer']}.self_attn.{'o' if letter == 'p' else letter}_proj.weight"
            assert matrix["condition"] == pytest.approx(torch.linalg.cond(weights[name].detach()).item(), rel=1e-6)
            assert matrix["rank"] == min(matrix["shape"]) == min(weights[name].shape)
        for way in seam["ways"].values():
            for dtype, errors in way["errors"].items():
                assert list(errors) == (["q", "k", "v"] if stream else ["m"])
                assert max(errors.values()) > 0
                assert all(0 <= error < 10 * torch.finfo(getattr(torch, dtype)).eps for error in errors.values())
        if stream:
            assert 1 < seam["ways"]["pivoted"]["condition"] < 1e4
            assert 0 < seam["ways"]["pivoted"]["largest"] <= 1.05


def test_the_tables(source):
    result = run(source)
    assert result.exit_code == 0, result.output
    for text in ("condition numbers", "max|R|", "relative error of q, k, v", "bfloat16", "float16", "float32", "M's"):
        assert text in result.stdout
    assert "safe to remove" in result.stdout
    assert "not safe" not in result.stdout


def test_an_ill_conditioned_q_is_not_safe_in_half_precision(source):
    weaken(source)
    result = run(source, "--basis", "q", "--dtype", "bfloat16")
    assert result.exit_code == 1
    assert "not safe: layer 1 by q in bfloat16: " in result.stdout
    assert "safe instead: --basis pivoted" in result.stdout
    assert "layer 0" not in result.stdout
    for options in (
        ("--basis", "pivoted", "--dtype", "bfloat16"),
        ("--basis", "q", "--dtype", "float64"),
        ("--basis", "q", "--dtype", "bfloat16", "--layers-open", "1"),
        ("--remove", "p", "--dtype", "bfloat16"),
        ("--dtype", "bfloat16"),
    ):
        assert run(source, *options).exit_code == 0, options


def test_a_singular_q_is_not_safe_in_any(source):
    weaken(source, 0)
    result = run(source, "--basis", "q", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    (problem,) = found["problems"]
    assert problem.startswith("layer 1 cannot be rewritten by q: the condition number is ")
    assert found["alternatives"] == ["--basis pivoted", "--layers-open 1", "--remove p"]
    assert found["seams"][2]["matrices"]["q"]["rank"] == 31
    assert found["seams"][2]["ways"]["q"]["errors"]["float32"] == {"q": None, "k": None, "v": None}
    assert "(rank 31)" in run(source, "--basis", "q").stdout


def test_too_few_independent_columns_for_any_basis(source):
    widths = {"q": 32, "k": 16, "v": 16}
    edit_tensors(source, **{Q1.replace("q_proj", f"{name}_proj"): torch.ones(widths[name], 32) for name in widths})
    result = run(source)
    assert result.exit_code == 1
    assert "not safe: layer 1 cannot be rewritten by pivoted" in result.stdout
    assert "safe instead: --layers-open 1 or --remove p" in result.stdout
    assert "safe instead" not in run(source, "--remove", "stream", "--basis", "pivoted", "--layers-open", "0,2").stdout


def test_what_blocks_a_seam_is_said(source):
    edit_config(source, residual="both", norm_type="rms", norms=["model.norm"])
    edit_tensors(source, model__norm__weight=torch.ones(32))
    result = run(source)
    assert result.exit_code == 1
    assert "not safe: the stream seam of layer 0 is blocked by residual 'both' and norm_type 'rms'" in result.stdout
    assert "condition numbers" in result.stdout
    found = json.loads(run(source, "--json").stdout)
    assert len(found["problems"]) == 2
    assert not found["if_skipless"]
    assert all(seam["blocked"] and seam["ways"] for seam in found["seams"])
    assert "could be rewritten safely" in result.stdout


@pytest.mark.parametrize("residual", ["attention", "ffn", "both"])
def test_skips_alone_block_nothing(residual, tmp_path):
    """What is foretold is of the model as it is: P's weights, which stay, are no problem."""
    save(build(residual=residual), tmp_path / "source")
    found = skipless.audit(tmp_path / "source")
    assert found.safe
    asked = [(seam.kind, seam.layer) for seam in found.seams if seam.asked]
    assert asked == [("stream", layer) for layer in range(1 if residual == "both" else 3)]
    plan = skipless.fuse(tmp_path / "source", tmp_path / "fused")
    assert [(seam.kind, seam.layer) for task in plan.tasks for seam in task.seams] == asked


def test_a_seam_that_was_not_asked_for_may_be_blocked(tmp_path):
    experts = {"ffn_type": "moe", "num_local_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}
    source = save(build(attention_bias=True, **experts), tmp_path / "source")
    assert run(source).exit_code == 1
    result = run(source, "--remove", "values")
    assert result.exit_code == 0
    assert "not safe" not in result.stdout


def test_a_fused_model_has_nothing_left(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused")
    result = run(tmp_path / "fused")
    assert result.exit_code == 0
    assert "nothing to remove: every seam" in result.stdout
    skipless.fuse(source, tmp_path / "half", basis="pivoted", layers_open=[1], remove=["stream"])
    found = skipless.audit(tmp_path / "half")
    assert [(seam.kind, seam.layer) for seam in found.seams] == [("p", 0), ("stream", 1), ("p", 1), ("p", 2)]
    assert found.safe


@pytest.mark.parametrize(
    ("fields", "before", "asked", "code"),
    [
        ({"tie_word_embeddings": True}, None, "stream,p,head", 1),
        ({}, {"basis": "pivoted"}, "values", 1),
        ({"norm_type": "rms"}, {"remove": ["norms"]}, "values", 0),
    ],
    ids=str,
)
def test_seams_whose_matrices_are_gone(tmp_path, fields, before, asked, code):
    folder = save(build(**fields), tmp_path / "source")
    if before:
        skipless.fuse(folder, tmp_path / "fused", **before)
        folder = tmp_path / "fused"
    assert run(folder, "--remove", asked).exit_code == code


def test_alternatives_without_values(tmp_path):
    source = save(build(num_key_value_heads=4), tmp_path / "source")
    weight = build(num_key_value_heads=4).model.layers[1].self_attn.q_proj.weight.detach().clone()
    weight[0] = weight[1]
    edit_tensors(source, **{Q1: weight})
    result = run(source, "--remove", "stream,values", "--basis", "q")
    assert result.exit_code == 1
    assert "or --basis pivoted or --layers-open 1" in result.stdout


def test_weights_that_are_zero(source):
    """As W_K is where training begins."""
    edit_tensors(source, **{Q1.replace("q_proj", "k_proj"): torch.zeros(16, 32)})
    found = skipless.audit(source)
    assert found.safe
    assert found.seams[2].matrices["k"].rank == 0
    assert found.seams[2].ways["pivoted"].errors["bfloat16"]["k"] == 0


@pytest.mark.parametrize(
    ("fields", "ways"),
    [
        ({"num_key_value_heads": 4}, ("q", "k", "v", "pivoted")),
        ({"attention_bias": True, "tie_word_embeddings": True, "position_type": "learned"}, ("q", "pivoted")),
        ({"head_dim": 4}, ("pivoted",)),
        ({"head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}, ("pivoted",)),
    ],
    ids=str,
)
def test_other_architectures(fields, ways, tmp_path):
    source = save(build(**fields), tmp_path / "source")
    found = skipless.audit(source)
    assert found.safe
    assert all(set(seam.ways) == set(ways) for seam in found.seams if seam.kind == "stream")
    assert skipless.fuse(source, tmp_path / "fused").basis == found.basis


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", None])
def test_it_decides_as_fuse_does(dtype, tmp_path):
    for name, folder in (("bundled", BUNDLED), ("orthogonal", tmp_path / "source")):
        if name == "orthogonal":
            model = build()
            for layer in model.model.layers:
                torch.nn.init.orthogonal_(layer.self_attn.q_proj.weight)
            save(model, folder)
        audit = skipless.audit(folder, dtype=dtype)
        plan = skipless.fuse(folder, tmp_path / name, dtype=dtype)
        assert (audit.basis, audit.reason) == (plan.basis, plan.reason)
        assert plan.reason
        assert plan.basis == ("pivoted" if name == "bundled" else "q")


def lose_p(folder):
    """P and M whose products are sums of like signs: rounding M* once loses more than rounding both, which averages."""
    names = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    shapes = {name: dict(build().named_parameters())[f"model.layers.1.{name}.weight"].shape for name in names}
    edit_tensors(
        folder,
        **{f"model.layers.1.{name}.weight": 1 + 0.1 * torch.randn(shape) for name, shape in shapes.items()},
    )


@pytest.mark.parametrize(
    ("spoil", "options", "problem"),
    [
        (weaken, {"basis": "q", "dtype": "float16"}, "layer 1 by q in float16: the relative error of "),
        (lose_p, {"basis": "q", "dtype": "bfloat16"}, "layer 1 by p in bfloat16: the relative error of m is "),
    ],
    ids=["stream", "p"],
)
def test_fuse_warns_where_audit_says_it_is_not_safe(spoil, options, problem, source, tmp_path, caplog):
    skipless.fuse(source, tmp_path / "good", **options)
    assert not caplog.text
    assert skipless.audit(source, **options).safe
    spoil(source)
    (found,) = skipless.audit(source, **options).problems
    assert found.startswith(problem)
    skipless.fuse(source, tmp_path / "fused", **options)
    assert problem in caplog.text
    assert "more layers" not in caplog.text


def test_mixed_dtypes_are_judged_as_they_will_be_written(source, tmp_path, caplog):
    tensors = load_file(source / "model.safetensors")
    coarse = {name: value.bfloat16() for name, value in tensors.items() if "k_proj" in name or "v_proj" in name}
    edit_tensors(source, **coarse)
    weaken(source, 1e-3)
    found = skipless.audit(source, basis="q")
    assert {seam.stored["q"] for seam in found.seams if seam.kind == "stream"} == {"bfloat16"}
    assert {seam.stored["pivoted"] for seam in found.seams if seam.kind == "stream"} == {
        "float64"
    }  # Q's, as the rest's
    assert not found.safe
    skipless.fuse(source, tmp_path / "fused", basis="q")
    assert "layer 1 by q in bfloat16" in caplog.text
    caplog.clear()
    assert skipless.audit(source, basis="pivoted").safe
    skipless.fuse(source, tmp_path / "pivoted", basis="pivoted")
    assert not caplog.text
    assert skipless.verify(source, tmp_path / "pivoted", dtypes=("float64",), tokens=16).same


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"])
def test_a_stream_that_is_zero(name, source, tmp_path):
    edit_tensors(source, **{name: torch.zeros(dict(build().named_parameters())[name].shape)})
    result = run(source)
    assert result.exit_code == 0, result.output
    assert skipless.fuse(source, tmp_path / "fused").basis == skipless.audit(source).basis


@pytest.mark.parametrize("basis", ["auto", "q", "pivoted"])
def test_too_few_columns_in_all(basis, tmp_path):
    source = save(build(head_dim=2), tmp_path / "source")
    result = run(source, "--basis", basis)
    assert result.exit_code == 1
    assert "having 16 outputs together, fewer than hidden_size (32)" in result.stdout
    assert "safe instead" in result.stdout
    assert "--remove p" in result.stdout
    with pytest.raises(skipless.InputError, match="the stream seam of layer 0 is blocked by q, k and v_proj"):
        skipless.fuse(source, tmp_path / "fused", basis=basis)


def tie(folder, weak):
    """A tied model whose layer 0 is nearly blind to one direction of the embeddings."""
    model = build(tie_word_embeddings=True)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(model.model.layers[0].self_attn, name).weight[:, 3] *= weak
    return save(model, folder)


@pytest.mark.parametrize(
    ("weak", "dtype", "safe"), [(1, "bfloat16", True), (1e-5, "float32", False), (1e-9, None, False)]
)
def test_a_tied_head_must_not_lose_either(weak, dtype, safe, tmp_path, caplog):
    """S^-1 O^T grows with S's condition number although R does not."""
    source = tie(tmp_path / "source", weak)
    audit = skipless.audit(source, basis="pivoted", dtype=dtype)
    assert audit.safe == safe
    assert safe or audit.alternatives
    assert all(problem.startswith("layer 0 ") for problem in audit.problems)
    if weak == 1e-9:
        with pytest.raises(skipless.InputError, match="expected 32 linearly independent outputs"):
            skipless.fuse(source, tmp_path / "fused", basis="pivoted", dtype=dtype)
        return
    skipless.fuse(source, tmp_path / "fused", basis="pivoted", dtype=dtype)
    assert ("the relative error of logits is" in caplog.text) != safe
    assert skipless.verify(source, tmp_path / "fused", dtypes=("float64",), tokens=16).same == safe
    skipless.fuse(source, tmp_path / "open", basis="pivoted", dtype=dtype, layers_open=[0])
    assert skipless.verify(source, tmp_path / "open", dtypes=("float64",), tokens=16).same


def test_fp16_has_its_limits(source, tmp_path):
    edit_tensors(source, **{name: 3000 * value for name, value in load_file(source / "model.safetensors").items()})
    result = run(source, "--basis", "q", "--dtype", "float16")
    assert result.exit_code == 1
    assert "not safe: layer 0 by q: there are numbers larger than float16 can hold" in result.stdout
    with pytest.raises(skipless.InputError, match="can hold, found an overflow"):
        skipless.fuse(source, tmp_path / "fused", basis="q", dtype="float16")


def test_the_rest_in_fp32(source):
    errors = []
    for options in ([], ["--rest-dtype", "float32"]):
        found = json.loads(run(source, "--basis", "pivoted", "--dtype", "bfloat16", *options, "--json").stdout)
        errors.append(found["seams"][2]["ways"]["pivoted"]["errors"]["bfloat16"]["k"])
    assert errors[1] < 0.95 * errors[0]
    assert run(source, "--rest-dtype", "float32").exit_code == 0
    assert json.loads(run(source, "--rest-dtype", "float32", "--json").stdout)["basis"] == "pivoted"


def test_nothing_asked_for(source):
    result = run(source, "--remove", "stream", "--layers-open", "0,1,2")
    assert result.exit_code == 0
    assert "nothing to remove" in result.stdout
    assert "safe to remove" not in result.stdout


def test_bad_input_is_one_line_and_nothing_is_written(source, tmp_path):
    cases = [
        (("--basis", "k"), "basis: expected a square projection, found k_proj (16, 32) in layer 0"),
        (("--layers-open", "7"), "layers_open: expected layers 0..2, found 7"),
        (
            ("--remove", "bias"),
            "remove: expected some of norms, stream, values, queries, p, head, first_layer; found 'bias'",
        ),
    ]
    for options, message in cases:
        refused(run(source, *options), message)
    edit_tensors(source, **{Q1: torch.full((32, 32), float("nan"))})
    refused(run(source), f"{Q1}: expected finite numbers")
    edit_tensors(source, **{Q1: None})
    refused(run(source), f"{Q1}: expected (32, 32)")
    refused(run(tmp_path / "nothing"), "nothing: expected a model folder, found nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def refused(result, message):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("skipless: ")
    assert message in line


@pytest.mark.slow
def test_a_picture_of_condition_numbers(source, tmp_path):
    for name in ("found.png", "found.svg"):
        assert run(source, "--plot", tmp_path / name).exit_code == 0
        assert (tmp_path / name).stat().st_size > 1000
    again = tmp_path / "again.svg"
    run(source, "--plot", again)
    assert again.read_bytes() == (tmp_path / "found.svg").read_bytes()
    assert "bfloat16" in again.read_text()
    for name in ("found.pdf", "nowhere/found.png"):
        result = run(source, "--plot", tmp_path / name)
        assert result.exit_code == 2
        assert "--plot: expected a file named *.png or *.svg in a folder that exists" in result.stderr


def test_what_can_go_from_a_model_as_it_is(tmp_path):
    found = skipless.audit(save(build(position_type="learned", attention_bias=True), tmp_path / "source"))
    assert found.as_is == {
        "values": 3 * 2 * 8**2, "queries": 3 * 2 * 8**2, "norm_gains": 0, "norm_biases": 0, "k_bias": 3 * 16,
        "v_bias": 3 * 16,
    }  # fmt: skip
    rope = skipless.audit(save(build(attention_bias=True), tmp_path / "rope"))
    assert rope.as_is["k_bias"] == 0


def test_a_picture_without_the_package_that_draws_it(source, tmp_path, monkeypatch):
    monkeypatch.setattr("skipless.cli.plotting.find_spec", lambda name: None)
    result = run(source, "--plot", tmp_path / "found.png")
    assert result.exit_code == 2
    assert "needs the [report] extra" in result.stderr
    assert not (tmp_path / "found.png").exists()

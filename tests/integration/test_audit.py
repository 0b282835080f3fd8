"""skipless audit: says before fusing what fusing would lose, and whether what is asked for is safe."""

import json

import pytest
import torch
from click.testing import CliRunner

import skipless
from skipless import cli
from skipless.demo import BUNDLED
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
        assert list(seam["original"]) == ["bfloat16", "float16", "float32", "float64"]
        for letter, matrix in seam["matrices"].items():
            name = f"model.layers.{seam['layer']}.self_attn.{'o' if letter == 'p' else letter}_proj.weight"
            assert matrix["condition"] == pytest.approx(torch.linalg.cond(weights[name].detach()).item(), rel=1e-6)
            assert matrix["rank"] == min(matrix["shape"]) == min(weights[name].shape)
        for way in seam["ways"].values():
            for dtype, errors in way["errors"].items():
                assert list(errors) == (["q", "k", "v"] if stream else ["m"])
                assert all(0 < error < 10 * torch.finfo(getattr(torch, dtype)).eps for error in errors.values())
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
    assert found["alternatives"] == ["--basis pivoted"]
    assert found["seams"][2]["matrices"]["q"]["rank"] == 31
    assert found["seams"][2]["ways"]["q"]["errors"]["float32"] == {"q": None, "k": None, "v": None}
    assert "(rank 31)" in run(source, "--basis", "q").stdout


def test_too_few_independent_columns_for_any_basis(source):
    widths = {"q": 32, "k": 16, "v": 16}
    edit_tensors(source, **{Q1.replace("q_proj", f"{name}_proj"): torch.ones(widths[name], 32) for name in widths})
    result = run(source)
    assert result.exit_code == 1
    assert "not safe: layer 1 cannot be rewritten by pivoted" in result.stdout
    assert "safe instead" not in result.stdout


def test_what_blocks_a_seam_is_said(source):
    edit_config(source, residual="both")
    result = run(source)
    assert result.exit_code == 1
    assert "not safe: the stream seam of layer 0 is blocked by residual 'both'" in result.stdout
    assert "condition numbers" in result.stdout
    found = json.loads(run(source, "--json").stdout)
    assert len(found["problems"]) == 6
    assert all(seam["blocked"] and not seam["ways"] for seam in found["seams"])


def test_a_seam_that_was_not_asked_for_may_be_blocked(tmp_path):
    source = save(build(head_dim=16), tmp_path / "source")
    assert run(source).exit_code == 1
    result = run(source, "--remove", "stream")
    assert result.exit_code == 0
    assert "not safe" not in result.stdout


def test_a_fused_model_has_nothing_left(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused")
    result = run(tmp_path / "fused")
    assert result.exit_code == 0
    assert "nothing left to remove" in result.stdout
    skipless.fuse(source, tmp_path / "half", basis="pivoted", layers_open=[1], remove=["stream"])
    found = skipless.audit(tmp_path / "half")
    assert [(seam.kind, seam.layer) for seam in found.seams] == [("p", 0), ("stream", 1), ("p", 1), ("p", 2)]
    assert found.safe


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
        ({"num_key_value_heads": 4}, {"q", "k", "v", "pivoted"}),
        ({"attention_bias": True, "tie_word_embeddings": True, "position_type": "learned"}, {"q", "pivoted"}),
        ({"head_dim": 4}, {"pivoted"}),
        ({"head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}, {"pivoted"}),
    ],
    ids=str,
)
def test_other_architectures(fields, ways, tmp_path):
    source = save(build(**fields), tmp_path / "source")
    found = skipless.audit(source)
    assert found.safe
    assert all(set(seam.ways) == ways for seam in found.seams if seam.kind == "stream")
    assert skipless.fuse(source, tmp_path / "fused").basis == found.basis


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


def test_fuse_warns_where_audit_says_it_is_not_safe(source, tmp_path, caplog):
    weaken(source)
    options = {"basis": "q", "dtype": "float16"}
    audit = skipless.audit(source, **options)
    skipless.fuse(source, tmp_path / "fused", **options)
    assert len(audit.problems) == 1
    assert audit.problems[0] in caplog.text


def test_bad_input_is_one_line_and_nothing_is_written(source, tmp_path):
    cases = [
        (("--basis", "k"), "basis: expected a square projection, found k_proj (16, 32) in layer 0"),
        (("--layers-open", "7"), "layers_open: expected layers 0..2, found 7"),
        (("--remove", "values"), "remove: expected stream and p, or one of them; found 'values'"),
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

"""verify says yes to the same function and no to anything else."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import skipless
from skipless import cli, verification
from tests.models import build, edit_config, edit_tensors, save


@pytest.fixture
def source(tmp_path):
    return save(build(), tmp_path / "source")


def rows(report):
    return {row.dtype: row for row in report.rows}


def test_a_fused_model_is_the_same_function(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused")
    report = skipless.verify(source, tmp_path / "fused", tokens=16)
    assert report.same
    assert report.stored == "float64"
    row = rows(report)["float64"]
    assert 0 < row.logit_error <= row.tolerance == 1e-9
    assert (row.top1, row.greedy, row.judged, row.passed) == (1.0, 1.0, True, True)
    assert row.kl < 1e-15
    assert [row.dtype for row in report.rows] == ["float64", "float32", "bfloat16"]


def test_a_model_is_itself(source):
    report = skipless.verify(source, source, tokens=16)
    assert report.same
    assert all(row.logit_error == row.own_logit_error and row.greedy == row.own_greedy for row in report.rows)
    assert rows(report)["float64"].logit_error == 0
    assert rows(report)["bfloat16"].logit_error > 1e-4  # bf16 really ran in bf16


@pytest.mark.parametrize("change", [1e-7, 1e-3])
def test_a_spoiled_model_is_not(source, tmp_path, change):
    skipless.fuse(source, tmp_path / "fused")
    file = tmp_path / "fused" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 4] += change
    save_file(tensors, file, metadata={"format": "pt"})
    report = skipless.verify(source, tmp_path / "fused", tokens=16)
    assert not report.same
    assert "rounding cannot explain" in report.note
    if change == 1e-7:  # fp32 alone could not have told
        assert rows(report)["float32"].logit_error < rows(report)["float32"].tolerance


def test_fp32_storage_is_judged_as_fp32(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused", dtype="float32")
    report = skipless.verify(source, tmp_path / "fused", tokens=16)
    assert report.same
    assert report.stored == "float32"
    assert rows(report)["float64"].tolerance == rows(report)["float32"].tolerance == 1e-4
    assert not rows(report)["bfloat16"].judged


def test_bf16_storage_of_an_ill_conditioned_basis_is_refused_and_fp64_acquits_it(tmp_path, caplog):
    model = build(ffn_type="mlp", num_hidden_layers=2)
    q = model.model.layers[1].self_attn.q_proj.weight.detach()
    q[0] = q[1] + 1e-3 * q[0]
    source = save(model, tmp_path / "source")
    skipless.fuse(source, tmp_path / "half", basis="q", dtype="bfloat16")
    assert "layer 1 by q in bfloat16: the relative error of " in caplog.text
    caplog.clear()
    skipless.fuse(source, tmp_path / "exact", basis="q", dtype="float64")
    assert not caplog.text
    report = skipless.verify(source, tmp_path / "half", tokens=16)
    assert not report.same
    assert all(row.judged for row in report.rows)
    assert "fuse with --dtype float64 and verify that" in report.note
    exact = skipless.verify(source, tmp_path / "exact", tokens=16)
    assert exact.same
    assert "do not run it in bfloat16, where its error is" in exact.note


def test_fp16_storage_adds_a_row_in_fp16(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused", dtype="float16")
    report = skipless.verify(source, tmp_path / "fused", tokens=16, dtypes=("float32",))
    assert [row.dtype for row in report.rows] == ["float32", "float16"]
    assert report.stored == "float16"


def test_a_model_whose_cache_is_wrong_is_not_the_same(source, tmp_path, monkeypatch):
    from transformers.cache_utils import DynamicCache

    skipless.fuse(source, tmp_path / "fused")
    update, run, folders = DynamicCache.update, verification._run, []

    def noted(folder, *arguments):
        folders.append(folder)
        return run(folder, *arguments)

    def forgetful(cache, key, value, layer, *args, **kwargs):
        forget = folders[-1] == tmp_path / "fused" and key.shape[2] == 1
        return update(cache, key, 0 * value if forget else value, layer, *args, **kwargs)

    monkeypatch.setattr(verification, "_run", noted)
    monkeypatch.setattr(DynamicCache, "update", forgetful)
    report = skipless.verify(source, tmp_path / "fused", tokens=16, dtypes=("float64",))
    assert rows(report)["float64"].logit_error < 1e-9
    assert not report.same


def test_the_stored_dtype_is_always_judged(tmp_path):
    """Asked only about bf16, two unrelated models stored in fp32 are still not the same."""
    a, b = (save(build(seed, dtype=torch.float32), tmp_path / str(seed)) for seed in (1, 2))
    report = skipless.verify(a, b, tokens=16, dtypes=("bfloat16",))
    assert [row.dtype for row in report.rows if row.judged] == ["float32"]
    assert not report.same


def test_half_precision_does_not_excuse_another_model(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused", dtype="float16")
    edit_tensors(tmp_path / "fused", lm_head__weight=torch.zeros(61, 32, dtype=torch.float16))
    assert not skipless.verify(source, tmp_path / "fused", tokens=16).same


def test_where_the_original_itself_fails_nothing_can_be_judged(tmp_path):
    model = build(dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight *= 1e6  # infinite logits in fp16
    source = save(model, tmp_path / "source")
    with torch.no_grad():
        model.lm_head.weight /= 1e6
    skipless.fuse(save(model, tmp_path / "scaled"), tmp_path / "fused", dtype="float16")
    report = skipless.verify(source, tmp_path / "fused", tokens=16)
    assert not report.same
    assert "cannot be judged" in report.note


def test_every_token_and_every_position_counts(tmp_path):
    source = save(build(position_type="learned"), tmp_path / "source")
    assert skipless.verify(source, source, tokens=8).tokens_seen == 61
    for name in ("embed_tokens", "position_embeddings"):
        table = build(position_type="learned").model.get_submodule(name).weight.detach().clone()
        table[-3] *= 1.001
        spoiled = save(build(position_type="learned"), tmp_path / name)
        edit_tensors(spoiled, **{f"model__{name}__weight": table})
        assert not skipless.verify(source, spoiled, tokens=8).same


def test_code_in_the_folder_is_never_run(source, tmp_path):
    (source / "tokenizer.json").write_text("not json")
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (source / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    result = run(source, source)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "expected a tokenizer that transformers loads" in result.stderr
    assert not (tmp_path / "pwned").exists()


def test_json_has_no_nan(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused")
    edit_tensors(tmp_path / "fused", lm_head__weight=torch.full((61, 32), 1e308, dtype=torch.float64))
    result = run(source, tmp_path / "fused", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout, parse_constant=pytest.fail)["rows"][0]["logit_error"] is None


def run(*arguments):
    return CliRunner().invoke(cli.main, ["verify", *map(str, arguments), "--tokens", "8"])


def test_the_command_prints_a_table_or_json_and_exits_by_the_answer(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused")
    result = run(source, tmp_path / "fused")
    assert result.exit_code == 0, result.output
    assert "float64" in result.stdout
    assert "the same function as stored in float64" in result.stdout
    result = run(source, tmp_path / "fused", "--json", "--dtype", "float64")
    report = json.loads(result.stdout)
    assert report["same"] is True
    assert report["rows"][0]["logit_error"] < 1e-9
    edit_tensors(tmp_path / "fused", lm_head__weight=torch.randn(61, 32))
    result = run(source, tmp_path / "fused", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["same"] is False


def test_bad_input(source, tmp_path):
    def refused(b, message):
        result = run(source, b)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stdout == ""

    refused(tmp_path / "nothing", "nothing: expected a model folder, found nothing")
    save(build(vocab_size=60), tmp_path / "other")
    refused(tmp_path / "other", "vocab_size: expected 61 as in")
    skipless.fuse(source, tmp_path / "fused")
    edit_tensors(tmp_path / "fused", model__layers__0__mlp__up_proj__weight=None)
    refused(tmp_path / "fused", "found missing_keys model.layers.0.mlp.up_proj.weight")
    edit_config(tmp_path / "fused", model_type="unheard-of")
    refused(tmp_path / "fused", "expected a model that transformers loads")


def test_learned_positions_limit_the_sequences(tmp_path):
    save(build(position_type="learned", max_position_embeddings=24), tmp_path / "source")
    skipless.fuse(tmp_path / "source", tmp_path / "fused")
    assert skipless.verify(tmp_path / "source", tmp_path / "fused", tokens=16).same
    with pytest.raises(skipless.InputError, match="to fit in 24 positions; use fewer --tokens"):
        skipless.verify(tmp_path / "source", tmp_path / "fused", tokens=24)

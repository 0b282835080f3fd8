"""verify says yes to the same function and no to anything else."""

import json
import shutil
import time

import pytest
import torch
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

import skipless
from skipless import cli
from skipless.inference import load
from skipless.reports import routing, verification
from skipless.reports.comparing import read_config
from tests.families import LLAMA, MODELS, saved
from tests.models import build, edit_config, edit_tensors, save
from tests.other_functions import OTHERS
from tests.random_models import draw_fields, draw_runs, fuse_what_goes


@pytest.fixture
def source(tmp_path):
    return save(build(), tmp_path / "source")


def rows(report):
    return {row.dtype: row for row in report.rows}


def without_record(folder):
    """A folder as fuse has not left it: what it says must then be seen from what it does."""
    (folder / "skipless.json").unlink()
    return folder


def test_a_fused_model_is_the_same_function(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused")
    report = skipless.verify(source, tmp_path / "fused", tokens=16)
    assert report.same
    assert report.proved
    assert report.stored == "float64"
    assert (report.data.function, report.data.generation, report.data.notes, report.tensors) == ((), (), (), ())
    assert [found.name for found in report.maps][2] == "a row of model.embed_tokens"
    assert all(0 < found.error <= found.limit for found in report.maps)
    row = rows(report)["float64"]
    assert 0 < row.b.error <= row.limit == 1e-9
    assert row.b.error <= row.b.worst
    assert (row.b.top1, row.b.greedy, row.judged, row.passed) == (1.0, 1.0, True, True)
    assert row.b.kl < 1e-15
    assert [row.dtype for row in report.rows] == ["float64", "float32", "bfloat16"]


def test_a_model_is_itself(source):
    report = skipless.verify(source, source, tokens=16)
    assert report.same
    assert report.maps == ()
    for row in report.rows:
        assert row.b == row.a
    assert rows(report)["float64"].b.error == 0
    assert rows(report)["bfloat16"].b.error > 1e-4  # bf16 really ran in bf16


@pytest.mark.parametrize("change", [1e-7, 1e-3])
def test_a_spoiled_model_is_not(source, tmp_path, change):
    skipless.fuse(source, tmp_path / "fused")
    without_record(tmp_path / "fused")
    name = "model.layers.1.self_attn.k_proj.weight"
    weight = verification.CheckpointReader(tmp_path / "fused").tensor(name)
    weight[3, 4] += change
    edit_tensors(tmp_path / "fused", **{name: weight})
    report = skipless.verify(source, tmp_path / "fused", tokens=16)
    assert not report.same
    assert "1.k is off by" in report.note
    assert not rows(report)["float64"].passed
    if change == 1e-7:  # fp32 alone could not have told
        assert rows(report)["float32"].b.error < rows(report)["float32"].limit


def test_fp32_storage_is_judged_as_fp32(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused", dtype="float32")
    report = skipless.verify(source, tmp_path / "fused", tokens=16)
    assert report.same
    assert report.stored == "float32"
    assert rows(report)["float64"].limit == rows(report)["float32"].limit == 1e-4
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
    assert "where storing it in bfloat16 explains" in report.note
    exact = skipless.verify(source, tmp_path / "exact", tokens=16)
    assert exact.same
    assert "do not run it in bfloat16, where its error is" in exact.note


def test_fp16_storage_adds_a_row_in_fp16(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused", dtype="float16")
    report = skipless.verify(source, tmp_path / "fused", tokens=16, dtypes=("float32",))
    assert [row.dtype for row in report.rows] == ["float64", "float32", "float16"]
    assert report.stored == "float16"
    assert report.same


def test_what_half_precision_may_lose_follows_from_what_it_is(tmp_path):
    """Not one bound for all: that of bf16 is some eight times that of fp16."""
    source = save(build(dtype=torch.bfloat16), tmp_path / "source")
    limits = {}
    for dtype in ("bfloat16", "float16"):
        skipless.fuse(source, tmp_path / dtype, dtype=dtype)
        limits[dtype] = rows(skipless.verify(source, tmp_path / dtype, tokens=16))["float64"].limit
    assert 4 < limits["bfloat16"] / limits["float16"] < 16


# Functions that are not A's


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fused", [False, True], ids=["copy", "fused"])
@pytest.mark.parametrize("name", OTHERS)
def test_none_of_these_is_called_the_same(tmp_path, name, fused, dtype):
    other = OTHERS[name]
    if dtype != "bfloat16" and other.fields.get("vocab_size"):
        pytest.skip("6,000 tokens take long, and are the same in every dtype: benchmarks/verdicts.py has them all")
    source = save(other.model(dtype), tmp_path / "source")
    if fused:
        skipless.fuse(source, tmp_path / "other")
        without_record(tmp_path / "other")
    else:
        shutil.copytree(source, tmp_path / "other")
    assert skipless.verify(source, tmp_path / "other", tokens=8, dtypes=()).same
    other.change(tmp_path / "other")
    report = skipless.verify(source, tmp_path / "other", tokens=8, dtypes=())
    assert not report.same
    assert bool(report.data.generation) == other.generation
    assert ("the same function, but not the same generation" in report.note) == other.generation


@pytest.mark.slow
@settings(max_examples=15)
@given(data=st.data())
def test_no_fuse_is_called_another_function(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")

    def choose(options):
        return data.draw(st.sampled_from(options))

    fields, dtype = draw_fields(choose), choose(("float32", "bfloat16", "float16"))
    model = build(data.draw(st.integers(0, 2**16)), getattr(torch, dtype), **fields)
    source, run = save(model, folder / "source"), draw_runs(choose, fields["num_hidden_layers"])[0]
    assume(not fuse_what_goes({**run, "dtype": dtype}, source, folder / "fused"))
    record = json.loads((folder / "fused" / "skipless.json").read_text())
    assume(not record["losses"] and not any(seam["problem"] for seam in record["seams"]))  # fuse has said so itself
    report = skipless.verify(source, folder / "fused", tokens=8, dtypes=())
    assume(not report.note.startswith("cannot be judged: A itself gives NaN"))
    assume(rows(report)[dtype].a.error < 0.05)  # else a few tokens' luck decides (docs/verify.md)
    assert report.same, (report.note, fields, run)


@pytest.mark.parametrize("norm_type", ["rms", "layer"])
def test_gains_and_a_block_of_keys_that_went_together_are_no_other_function(tmp_path, norm_type):
    """What the rows of the table give as keys is judged by the same queries, before and after gains are folded."""
    norms = ["input_layernorm", "model.embed_norm"]
    source = save(
        build(norm_type=norm_type, norms=norms, position_type="learned", attention_bias=True), tmp_path / "source"
    )
    skipless.fuse(source, tmp_path / "fused", remove=("norms", "queries"))
    assert (report := skipless.verify(source, tmp_path / "fused", tokens=8, dtypes=())).same, report.note


@pytest.mark.parametrize("seed", [0, 1])
def test_experts_that_are_as_good_are_no_other_function(tmp_path, monkeypatch, seed):
    """Storing gains times a router in bf16 sends some tokens to other experts: what these compute has not changed."""
    fields = {"norm_type": "rms", "norms": ["input_layernorm", "post_attention_layernorm"], "ffn_type": "moe"}
    source = build(seed, **fields, num_local_experts=8, num_experts_per_tok=1)
    with torch.no_grad():
        for (
            layer
        ) in source.model.layers:  # the second half are hardly other than the first: each choice is nearly a tie
            layer.mlp.router.weight[4:] = layer.mlp.router.weight[:4] * (1 + 1e-3 * torch.randn(4, 1))
    save(source.bfloat16(), tmp_path / "source")
    skipless.fuse(tmp_path / "source", without := tmp_path / "fused", remove=("norms",))
    report = skipless.verify(tmp_path / "source", without, tokens=16)
    assert report.same, report.note
    assert rows(report)["float64"].b.worst < 0.1
    monkeypatch.setattr(routing, "follows", lambda model, noted: False)
    monkeypatch.setattr(verification, "follows", lambda model, noted: False)
    assert (
        rows(skipless.verify(tmp_path / "source", without, tokens=16))["float64"].b.worst > 0.5
    )  # of those sent elsewhere


# What is not run


def test_a_row_that_no_sample_reads_is_not_run_and_full_runs_it(tmp_path, monkeypatch):
    """Of models that fuse does not know, nothing is known but what was run."""
    source = save(build(vocab_size=200, max_position_embeddings=128), tmp_path / "source")
    shutil.copytree(source, tmp_path / "other")
    monkeypatch.setattr(verification, "relation", lambda a, b: None)
    monkeypatch.setattr(verification, "MAX_POSITIONS", 64)
    options = {"tokens": 8, "dtypes": ()}
    report = skipless.verify(source, tmp_path / "other", **options)
    assert not report.same
    assert report.tokens_seen < 200
    assert report.not_run == (f"{200 - report.tokens_seen} of 200 tokens of the vocabulary", "96 of 128 positions")
    assert "--full runs it" in report.note
    full = skipless.verify(source, tmp_path / "other", full=True, **options)
    assert full.same
    assert (full.tokens_seen, full.positions_seen, full.not_run) == (200, 128, ())
    table = build(vocab_size=200).model.embed_tokens.weight.detach().clone()
    unread = (set(range(200)) - set(_seen(source, monkeypatch))).pop()
    table[unread] *= 1.001
    edit_tensors(tmp_path / "other", model__embed_tokens__weight=table)
    assert rows(skipless.verify(source, tmp_path / "other", **options))["float64"].b.error == 0
    assert not skipless.verify(source, tmp_path / "other", full=True, **options).same


def _seen(source, monkeypatch):
    inputs = verification._inputs(source, [read_config(source)] * 2, "", 8, 0, False)
    return torch.cat([ids.flatten() for ids, _ in inputs.sequences]).tolist()


def test_a_sample_passes_the_window(tmp_path):
    source = save(build(sliding_window=40, max_position_embeddings=128), tmp_path / "source")
    assert verification._inputs(source, [read_config(source)] * 2, "", 8, 0, False).positions_seen >= 72


def test_many_logits_are_not_all_kept(source, tmp_path, monkeypatch):
    skipless.fuse(source, tmp_path / "fused")
    expected = skipless.verify(source, tmp_path / "fused", tokens=16)
    monkeypatch.setattr(verification, "MAX_LOGITS", 61 * 4096 - 1)
    monkeypatch.setattr(verification, "LOGITS", 61 * 100)
    found = skipless.verify(source, tmp_path / "fused", tokens=16)
    assert found.same
    assert rows(found)["bfloat16"].b.worst == pytest.approx(rows(expected)["bfloat16"].b.worst, rel=0.5)


# Another basis, and other models


def test_the_same_function_in_another_basis(source, tmp_path):
    """FFN units in another order: the tensors differ, the function does not, as fp64 can tell."""
    model = build()
    with torch.no_grad():
        for layer in model.model.layers:
            order = torch.randperm(48)
            for name in ("gate_proj", "up_proj"):
                linear = getattr(layer.mlp, name)
                linear.weight.copy_(linear.weight[order])
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
    report = skipless.verify(source, save(model, tmp_path / "other"), tokens=16)
    assert report.tensors
    assert report.same
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1 + 1e-6)
    assert not skipless.verify(source, save(model, tmp_path / "off"), tokens=16).same


def test_the_stored_dtype_is_always_judged(tmp_path):
    """Asked only about bf16, two unrelated models stored in fp32 are still not the same."""
    a, b = (save(build(seed, dtype=torch.float32), tmp_path / str(seed)) for seed in (1, 2))
    report = skipless.verify(a, b, tokens=16, dtypes=("bfloat16",))
    assert [row.dtype for row in report.rows if row.judged] == ["float64", "float32"]
    assert not report.same


def test_half_precision_does_not_excuse_another_model(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused", dtype="float16")
    edit_tensors(tmp_path / "fused", lm_head__weight=torch.zeros(61, 32, dtype=torch.float16))
    assert not skipless.verify(source, without_record(tmp_path / "fused").parent / "fused", tokens=16).same


def test_where_the_original_itself_gives_no_numbers_nothing_can_be_judged(tmp_path):
    model = build(dtype=torch.float64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(1e160)
    source = save(model, tmp_path / "source")
    report = skipless.verify(source, source, tokens=16)
    assert not report.same
    assert "cannot be judged: A itself gives NaN or infinity" in report.note


# Caches


def test_a_model_whose_cache_is_wrong_is_told_apart(source, tmp_path, monkeypatch):
    """B's alone, while its function is A's: a verdict of its own."""
    skipless.fuse(source, tmp_path / "fused")
    update, run, folders = DynamicCache.update, verification._run, []

    def noted(folder, *arguments):
        folders.append(folder)
        return run(folder, *arguments)

    def forgetful(cache, key, value, layer, *args, **kwargs):
        forget = folders[-1:] == [tmp_path / "fused"] and key.shape[2] == 1
        return update(cache, key, 0 * value if forget else value, layer, *args, **kwargs)

    monkeypatch.setattr(verification, "_run", noted)
    monkeypatch.setattr(DynamicCache, "update", forgetful)
    report = skipless.verify(source, tmp_path / "fused", tokens=16, dtypes=("float64",))
    assert rows(report)["float64"].b.error < 1e-9
    assert not report.same
    assert "a broken cache, whatever the function: B's cache" in report.note
    assert not any(problem.startswith("A's") for problem in report.caches)


# Records


def test_a_folder_is_checked_by_its_record_alone(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused", max_shard_size=20_000)
    assert run(tmp_path / "fused").exit_code == 0
    shard = next((tmp_path / "fused").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (tmp_path / "fused" / "evil.py").write_text("")
    (tmp_path / "fused" / "generation_config.json").unlink()
    result = run(tmp_path / "fused", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["differences"] == [
        "generation_config.json: expected as it was written, found no such file",
        f"{shard.name}: expected the bytes that were written, found others",
        "evil.py: expected no file that was not written with it, found one",
    ]
    assert not skipless.verify(source, tmp_path / "fused", tokens=8).same
    result = run(source)
    assert result.exit_code == 2
    assert "expected skipless.json, which fuse leaves in what it writes, found none" in result.stderr


def test_a_file_that_says_nothing_of_the_function_is_a_note(source, tmp_path):
    (source / "README.md").write_text("# a model")
    skipless.fuse(source, tmp_path / "fused")
    (tmp_path / "fused" / "README.md").write_text("# another model")
    (tmp_path / "fused" / "LICENSE").write_text("")
    report = skipless.verify(source, tmp_path / "fused", tokens=8)
    assert report.same
    assert [note.split(":")[0] for note in report.data.notes] == ["B's README.md", "B's LICENSE"]
    assert run(tmp_path / "fused").exit_code == 1


def test_the_record_says_of_what_it_was_made(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused")
    record = json.loads((tmp_path / "fused" / "skipless.json").read_text())
    assert set(record["source"]["tensors"]) == set(verification.CheckpointReader(source).tensors)
    table = build().model.embed_tokens.weight.detach().clone()
    edit_tensors(source, model__embed_tokens__weight=table * (1 + 1e-15))
    report = skipless.verify(source, tmp_path / "fused", tokens=8)
    assert "B was made of another source than A: model.embed_tokens.weight" in report.data.notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: expected 1"),
        ({"source": []}, "source: expected an object"),
        ({"files": {"a": 3}}, "files: expected objects"),
        ({"files": {"../a": {"bytes": 1, "sha256": "0" * 64}}}, "files: expected names of files in this folder"),
        ({"files": {"a": {"bytes": 1, "sha256": "0"}}}, "files: expected names and their SHA-256"),
        ({"files": {"a": {"bytes": "1", "sha256": "0" * 64}}}, "files: expected their sizes in bytes"),
    ],
)
def test_a_record_that_fuse_has_not_written(source, tmp_path, change, message):
    skipless.fuse(source, tmp_path / "fused")
    file = tmp_path / "fused" / "skipless.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    result = run(tmp_path / "fused")
    assert result.exit_code == 2
    assert message in result.stderr


def test_code_in_the_folder_is_never_run(source, tmp_path):
    (source / "tokenizer.json").write_text("not json")
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (source / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    result = run(source, source)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "expected a tokenizer that transformers loads" in result.stderr
    assert not (tmp_path / "pwned").exists()


# The command


def run(*arguments):
    return CliRunner().invoke(cli.main, ["verify", *map(str, arguments), "--tokens", "8"])


def test_json_has_no_nan(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused")
    edit_tensors(tmp_path / "fused", lm_head__weight=torch.full((61, 32), 1e308, dtype=torch.float64))
    result = run(source, tmp_path / "fused", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout, parse_constant=pytest.fail)["rows"][0]["b"]["error"] is None


def test_the_command_prints_a_table_or_json_and_exits_by_the_answer(source, tmp_path):
    skipless.fuse(source, tmp_path / "fused")
    result = run(source, tmp_path / "fused")
    assert result.exit_code == 0, result.output
    assert "float64" in result.stdout
    assert "all 61 tokens, all positions and experts are covered by comparing tensors" in result.stdout
    assert result.stdout.endswith("the same function as stored in float64\n")
    result = run(source, tmp_path / "fused", "--json", "--dtype", "float64")
    report = json.loads(result.stdout)
    assert report["same"] is True
    assert report["rows"][0]["b"]["error"] < 1e-9
    edit_tensors(tmp_path / "fused", lm_head__weight=torch.randn(61, 32))
    result = run(source, tmp_path / "fused", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["same"] is False


def test_steps_are_told(source):
    seen = []
    skipless.verify(source, source, tokens=8, progress=lambda *step: seen.append(step))
    assert [step for step, _, _ in seen][:3] == ["comparing files", "comparing tensors", "running A in float64"]
    assert [done for _, done, _ in seen] == list(range(len(seen)))
    assert all(done < total for _, done, total in seen)


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
    refused(tmp_path / "fused", "expected a config that transformers reads")


def test_few_positions(tmp_path):
    """Half of them for the prompt, half for what is generated."""
    save(build(position_type="learned", max_position_embeddings=24), tmp_path / "source")
    skipless.fuse(tmp_path / "source", tmp_path / "fused")
    assert skipless.verify(tmp_path / "source", tmp_path / "fused").same


@pytest.mark.alone
def test_the_bundled_pair_takes_less_than_a_minute(tmp_path):
    """20 s on two quiet cores (benchmarks/verdicts.py); one core of a busy machine takes longer."""
    from skipless.bundled import BUNDLED

    skipless.fuse(BUNDLED, tmp_path / "fused")
    start = time.monotonic()
    assert skipless.verify(BUNDLED, tmp_path / "fused").same
    assert time.monotonic() - start < 60


def test_another_expert_of_another_family_is_no_same_function(tmp_path, monkeypatch):
    """Its router cannot be told where to send tokens, and only a quarter of these ever goes to that expert."""
    monkeypatch.setitem(MODELS, "many", ("Mixtral", {**LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2}))
    saved("many", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    names = [f"model.layers.1.block_sparse_moe.experts.2.w{number}.weight" for number in (1, 2, 3)]
    reader = verification.CheckpointReader(tmp_path / "b")
    edit_tensors(tmp_path / "b", **{name: torch.randn_like(reader.tensor(name)) for name in names})
    assert skipless.verify(tmp_path / "a", tmp_path / "a", full=True, tokens=8).same
    report = skipless.verify(tmp_path / "a", tmp_path / "b", full=True, tokens=8)
    assert not report.same
    assert not rows(report)["float64"].passed


@pytest.mark.parametrize("name", ["gpt2", "mpt", "bloom"])
def test_sizes_have_the_names_that_a_family_gives_them(tmp_path, monkeypatch, name):
    asked = []
    monkeypatch.setattr(verification, "chance", lambda width: asked.append(width) or 1.0)
    saved(name, tmp_path / "a")
    report = skipless.verify(tmp_path / "a", tmp_path / "a", dtypes=(), tokens=4)
    assert asked == [32]
    assert name == "bloom" or report.positions_seen == 24  # which has no limit


def test_a_window_that_is_not_used_is_none(tmp_path, monkeypatch):
    window = {"sliding_window": 5000, "max_position_embeddings": 10_000}
    for used in (False, True):
        name = f"qwen2-{used}"
        monkeypatch.setitem(
            MODELS, name, ("Qwen2", {**LLAMA, **window, "use_sliding_window": used, "max_window_layers": 0})
        )
        saved(name, tmp_path / name)
        edit_config(tmp_path / name, sliding_window=5000)
    monkeypatch.setattr(verification, "MAX_POSITIONS", 200)
    monkeypatch.setattr(verification, "_longest", lambda config: 6000)
    seen = [
        skipless.verify(tmp_path / name, tmp_path / name, dtypes=(), tokens=4).positions_seen
        for name in ("qwen2-False", "qwen2-True")
    ]
    assert seen == [100, 5032]


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"num_beams": 4},
        {"stop_strings": ["a"]},
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_a_folder_says_of_generation_changes_no_verdict(source, tmp_path, monkeypatch, settings):
    (source / "generation_config.json").write_text(json.dumps(settings))
    skipless.fuse(source, tmp_path / "fused")
    assert skipless.verify(source, tmp_path / "fused", dtypes=(), tokens=8).same
    update = DynamicCache.update

    def forgetful(cache, key, value, layer, *args, **kwargs):
        return update(cache, key, 0 * value if key.shape[2] == 1 else value, layer, *args, **kwargs)

    monkeypatch.setattr(DynamicCache, "update", forgetful)
    assert "cache" in skipless.verify(source, tmp_path / "fused", dtypes=(), tokens=8).note


@pytest.mark.parametrize("family", [False, True])
def test_other_code_is_another_function(source, tmp_path, family):
    if family:
        saved("llama", source := tmp_path / "llama")
    other = tmp_path / "other"
    shutil.copytree(source, other)
    assert skipless.verify(source, other, dtypes=(), tokens=4).same
    edit_config(other, auto_map={"AutoModelForCausalLM": "other.Model"})
    (other / "other.py").write_text("")
    report = skipless.verify(source, other, dtypes=(), tokens=4)
    assert not report.same
    assert "auto_map" in report.note
    if family:
        edit_config(source, auto_map={"AutoModelForCausalLM": "other.Model"})
        (source / "other.py").write_text("")
        assert skipless.verify(source, other, dtypes=(), tokens=4).same
        (other / "other.py").write_text("pass")
        assert "B's other.py" in skipless.verify(source, other, dtypes=(), tokens=4).note


def test_a_prompt_that_is_left_out_is_told(source, tmp_path):
    report = skipless.verify(source, source, dtypes=(), tokens=4, prompt="hello")
    assert report.same
    assert "the prompt was left out" in report.data.notes[-1]
    assert skipless.verify(source, source, dtypes=(), tokens=4).data.notes == ()
    result = CliRunner().invoke(cli.main, ["verify", str(source), str(source), "--seed", str(2**64)])
    assert result.exit_code == 2
    assert "--seed" in result.stderr


def test_a_model_that_another_package_would_load(tmp_path):
    saved("llama", tmp_path / "a")
    edit_config(tmp_path / "a", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(skipless.InputError, match="expected a model that transformers loads, found"):
        load(tmp_path / "a", torch.float32)

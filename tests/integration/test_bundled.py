"""The model that comes with the package: real, trained, small, and fusible."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

import skipless
from skipless import cli
from skipless.bundled import BUNDLED
from skipless.checkpoint.reader import CheckpointReader
from skipless.cli import demo
from skipless.cli.demo import PROMPT
from skipless.inference import greedy_config
from skipless.rewrite.model_files import MODEL_FILES
from tests.models import edit_tensors, load
from tests.tolerances import FP32, FP64


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundled")
    for dtype in ("float64", "float32"):
        skipless.fuse(BUNDLED, folder / dtype, dtype=dtype)
    skipless.fuse(BUNDLED, folder / "by q", basis="q", dtype="float32")
    return folder


def test_it_is_small_bf16_and_whole():
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) <= 12_000_000
    assert {info.dtype for info in CheckpointReader(BUNDLED).tensors.values()} == {torch.bfloat16}
    assert (BUNDLED / "README.md").exists()


def test_it_has_this_versions_model_files():
    """If not: skipless refresh src/skipless/bundled/stdlib."""
    assert all((BUNDLED / file.name).read_text() == file.read_text() for file in MODEL_FILES)


def test_its_tokenizer_round_trips_python():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    text = "def f(x):\n    return {'ü': x}  # ok\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == CheckpointReader(BUNDLED).config["vocab_size"]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", FP64), ("float32", FP32), ("by q", FP32)])
def test_fused_it_is_the_same_function(fused, dtype, tolerance):
    dtypes = ("float64", "float32" if dtype == "by q" else dtype)
    report = skipless.verify(BUNDLED, fused / dtype, dtypes=dtypes, prompt=PROMPT)
    assert report.same
    assert all(row.b.error <= tolerance and row.b.greedy == 1 for row in report.rows)


@pytest.mark.slow
def test_in_bf16_it_holds_up_and_by_q_fuse_warns(fused, tmp_path, caplog):
    """A layer's Q has a condition number of 27,000."""
    for basis, warnings in (("auto", 0), ("q", 1)):
        caplog.clear()
        skipless.fuse(BUNDLED, tmp_path / basis, basis=basis)
        tensors = CheckpointReader(tmp_path / basis).tensors.values()
        assert {info.dtype for info in tensors if not info.is_index} == {torch.bfloat16}
        assert sum("by q in bfloat16: the relative error of" in record.message for record in caplog.records) == warnings
    assert skipless.verify(BUNDLED, tmp_path / "auto", dtypes=()).same
    assert not skipless.verify(BUNDLED, tmp_path / "q", dtypes=()).same
    assert skipless.verify(BUNDLED, fused / "by q", dtypes=()).same
    load(fused / "by q", torch.bfloat16).save_pretrained(tmp_path / "cast")
    assert not skipless.verify(BUNDLED, tmp_path / "cast", dtypes=()).same


@pytest.fixture(scope="module")
def spoiled(fused, tmp_path_factory):
    folder = shutil.copytree(fused / "float32", tmp_path_factory.mktemp("spoiled") / "float32")
    rest = "model.layers.3.self_attn.rest_proj.weight"
    edit_tensors(folder, **{rest: 1.05 * CheckpointReader(folder).tensor(rest)})
    return folder


@pytest.mark.slow
def test_spoiled_it_is_not(spoiled):
    assert not skipless.verify(BUNDLED, spoiled, dtypes=("float32",)).same


@pytest.mark.slow
def test_256_greedy_tokens_are_equal_in_fp32(fused, spoiled):
    ids = AutoTokenizer.from_pretrained(BUNDLED)(PROMPT, return_tensors="pt").input_ids
    original, rewritten = (
        load(folder, torch.float32).generate(ids, generation_config=greedy_config(256)).sequences
        for folder in (BUNDLED, fused / "float32")
    )
    assert original.shape[1] == ids.shape[1] + 256
    assert torch.equal(original, rewritten)
    other = load(spoiled, torch.float32).generate(ids, generation_config=greedy_config(256)).sequences
    assert not torch.equal(original, other)


def test_its_text_looks_like_python():
    """Of sampled text, most lines end as lines of Python do, and blocks are indented by four."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    ids = tokenizer("class Stack:\n", return_tensors="pt").input_ids.repeat(8, 1)
    model = load(BUNDLED, torch.float32)
    output = model.generate(ids, max_new_tokens=160, do_sample=True, temperature=0.6, top_k=0, pad_token_id=0)
    text = "\n".join(tokenizer.batch_decode(output, skip_special_tokens=True))
    lines = [line for line in text.splitlines() if line.strip()]
    assert sum("def " in line or "class " in line for line in lines) >= 8
    assert sum("self" in line for line in lines) >= 8
    indents = [len(line) - len(line.lstrip(" ")) for line in lines]
    assert sum(indent % 4 == 0 for indent in indents) > 0.7 * len(lines)


@pytest.fixture(scope="module")
def finished_demo():
    said = []
    return demo.demo(said.append), said


@pytest.fixture
def _demo_already_run(finished_demo, monkeypatch):
    def tell_again(say):
        result, said = finished_demo
        for line in said:
            say(line)
        return result

    monkeypatch.setattr(demo, "demo", tell_again)


@pytest.mark.slow
@pytest.mark.usefixtures("_demo_already_run")
def test_the_demo_in_json():
    result = CliRunner().invoke(cli.main, ["demo", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["same_tokens"]
    assert found["verify"]["same"]
    assert found["parameters_before"] - found["parameters_after"] == 6 * 2 * 256**2


@pytest.mark.slow
@pytest.mark.usefixtures("_demo_already_run")
def test_the_demo_prints_tables():
    result = CliRunner().invoke(cli.main, ["demo"])
    assert result.exit_code == 0
    assert "the same function with fewer weights" in result.stdout
    assert "-16.8%" in result.stdout
    assert PROMPT.splitlines()[0] in result.stderr


@pytest.mark.slow
def test_bench_prints_both_models(fused):
    result = CliRunner().invoke(
        cli.main,
        ["bench", str(BUNDLED), str(fused / "float32"), "--rounds", "1", "--tokens", "4", "--prefill", "20", "--json"],
    )
    assert result.exit_code == 0
    original, rewritten = json.loads(result.stdout)["speeds"]
    assert original["bytes_per_token"] - rewritten["bytes_per_token"] == 4 * 6 * 2 * 256**2
    for speed in (original, rewritten):
        assert min(speed["decoding"][0]["rounds"]) > 0
        assert speed["first_token"] > 0
        assert speed["prefill"] > 0
        assert speed["peak_memory"] > speed["bytes_per_token"]

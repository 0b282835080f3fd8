import csv
import json
import re
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner

import skipless
from skipless.checkpoint import family
from skipless.cli import main
from skipless.model.modeling_skipless import rotary_cos_sin
from skipless.reports.counting import Conditions, count_architecture, table
from tests.models import build

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
NEOX = {**LLAMA, "model_type": "gpt_neox"}


def run(*arguments):
    return CliRunner().invoke(main, ["count", *map(str, arguments)])


def counted(config, **conditions):
    return count_architecture("test", "test", family.read(config), config, Conditions(**conditions))


def test_the_papers_table_to_the_digit():
    result = run("--paper")
    assert result.exit_code == 0, result.output
    found = {name: values for name, *values in (re.split(" {2,}", line.strip()) for line in result.stdout.splitlines())}
    assert found["d, layers"] == ["4096, 32", "4096, 32"]
    assert found["heads, kv heads"] == ["32, 32", "32, 8"]
    assert found["e"] == ["4096", "1024"]
    assert found["f, vocab"] == ["16384, 50400", "14336, 32000"]
    assert found["Q+P a layer"] == ["33,554,432", "33,554,432"]
    assert found["K+V a layer"] == ["33,554,432", "8,388,608"]
    assert found["FFN a layer"] == ["134,217,728", "176,160,768"]
    assert found["embeddings (in + out)"] == ["412,876,800", "262,144,000"]
    assert found["total"] == ["6.9B", "7.2B"]
    assert found["total without Q+P"] == ["5.8B", "6.2B"]
    assert found["saved"] == ["16%", "15%"]
    assert found["possible batch-1 decode speed-up"] == ["1.19x", "1.17x"]
    assert "the paper's vocabulary is 50,400, the published config's 50,432" in " ".join(result.stdout.split())


def test_the_tables_of_the_first_layers_paper_to_the_digit():
    """arXiv:2402.13388, section 3."""
    result = run("--paper", "2402.13388", "--csv")
    assert result.exit_code == 0, result.output
    shapes, savings = (list(csv.reader(part.splitlines())) for part in result.stdout.split("\n\n"))
    assert shapes[0] == ["", "pythia-6.9b", "mistral-7b", "mixtral-8x7b"]
    found = {name: values for name, *values in shapes}
    assert found["e"] == ["4096", "1024", "1024"]
    assert found["experts"] == ["1", "1", "8"]
    assert found["f, vocab"] == ["16384, 50400", "14336, 32000", "14336, 32000"]
    assert found["Q+P a layer"] == ["33,554,432"] * 3
    assert found["K+V a layer"] == ["33,554,432", "8,388,608", "8,388,608"]
    assert found["FFN a layer"] == ["134,217,728", "176,160,768", "1,409,286,144"]
    assert found["embeddings (in + out)"] == ["412,876,800", "262,144,000", "262,144,000"]
    assert found["total"] == ["6.9B", "7.2B", "46.7B"]
    assert savings == [
        ["", "pythia-6.9b", "mistral-7b", "mixtral-8x7b, parallel"],
        ["weights that go", "184,549,376", "25,165,824", "1,434,451,968"],
        ["reads before, batch 1", "184,553,472", "25,169,920", "1,434,456,064"],
        ["reads after, batch 1", "16,384", "10,240", "10,240"],
        ["fewer, batch 1", "11,264x", "2,458x", "140,084x"],
        ["fewer, batch 16", "704x", "154x", "8,756x"],
        ["fewer, batch 256", "44x", "10x", "548x"],
        ["fewer, batch 1,024", "11x", "3x", "137x"],
        ["embeddings grow by", "619,315,200", "196,608,000", "196,608,000"],
        ["memory grows by", "434,765,824", "171,442,176", "-1,237,843,968"],
        ["of all weights", "6%", "2%", "-3%"],
    ]
    (model, *_) = json.loads(run("--paper", "2402.13388", "--json").stdout)["models"]
    assert model["first_layer"] == {"removed": 184549376, "added": 619315200, "width": 4096, "row": 16384}
    assert run("--paper", "2402.13389").exit_code == 2


def test_mistral_by_name():
    (found,) = json.loads(run("mistral-7b", "--json").stdout)["models"]
    assert (found["name"], found["family"]) == ("mistral-7b", "mistral")
    assert found["parameters"] == 7_241_732_096
    assert found["weights"] == 7_241_465_856
    assert found["per_layer"] == {
        "q": 16777216, "k": 4194304, "v": 4194304, "p": 16777216, "m": 117440512, "o": 58720256,
    }  # fmt: skip
    assert found["embeddings"] == 262_144_000
    assert found["nominal"]["qp"]["removed"] == found["exact"]["removed"] == 32 * 33_554_432
    assert found["nominal"]["qp"]["saving"] == pytest.approx(0.148, abs=5e-4)
    # the input table's one row aside, every weight is read
    read = 7_241_465_856 - 131_072_000 + 4096
    assert found["nominal"]["qp"]["speedup"] == pytest.approx(read / (read - 32 * 33_554_432), rel=1e-12)
    assert found["nominal"]["kp"] is None
    assert found["nominal"]["vp"] is None
    assert found["exact"]["basis"] == "q"
    assert found["exact"]["blocked"] == []
    d, e, size, f = 4096, 1024, 128, 14336
    limit = 32 * d * d + 33 * d * d + 32 * 8 * (size**2 + size) + 32 * f
    assert found["limit"]["removable"] == limit
    assert found["as_is"]["values"] == 32 * e * size
    assert found["as_is"]["norm_gains"] == 65 * d


def test_parallel_layers_lose_half_exactly():
    found = counted(NEOX)
    assert found.nominal["qp"].removed == 3 * 2 * 32**2
    assert found.nominal["kp"].removed == 3 * 2 * 32**2
    assert found.exact.removed == 3 * 32**2
    assert "block_type 'parallel'" in found.exact.blocked[0]
    assert counted({**NEOX, "use_parallel_residual": False}).exact.removed == 3 * 2 * 32**2


@pytest.mark.parametrize("head_dim", [4, 8, 12])
def test_heads_of_another_width(head_dim):
    wide = 4 * head_dim
    found = counted({**LLAMA, "head_dim": head_dim})
    p = {4: wide * 32 + (32 - wide) * 2 * 48, 8: 32**2, 12: 32**2}[head_dim]
    assert found.exact.removed == 3 * (32**2 + p)
    assert found.exact.basis == ("q" if head_dim == 8 else "pivoted")


def test_too_few_outputs_for_a_basis():
    found = counted({**LLAMA, "head_dim": 2})
    assert found.exact.basis is None
    assert "fewer than hidden_size" in found.exact.blocked[0]


def test_a_tied_embedding_is_counted_once_and_read_as_the_head():
    tied, untied = counted({**LLAMA, "tie_word_embeddings": True}), counted(LLAMA)
    assert untied.weights - tied.weights == 96 * 32
    assert untied.limit - tied.limit == 32**2
    assert tied.exact.removed == untied.exact.removed
    assert tied.exact.speedup == untied.exact.speedup


def test_only_active_experts_are_read():
    found = counted(MIXTRAL)
    experts = 3 * 3 * 32 * 48
    assert found.parts["m"] + found.parts["o"] == 4 * experts
    assert found.parts["other"] == 3 * 32 * 4
    read = found.weights - 96 * 32 + 32 - 2 * experts
    assert found.nominal["qp"].speedup == pytest.approx(read / (read - found.nominal["qp"].removed))
    assert counted(MIXTRAL, batch=100).nominal["qp"].speedup < found.nominal["qp"].speedup


def test_the_cache_and_arithmetic_take_time_too():
    plain, cached = counted(LLAMA), counted(LLAMA, context=10_000)
    assert cached.exact.speedup < plain.exact.speedup
    assert counted(LLAMA, context=10_000, dtype="int4").exact.speedup < cached.exact.speedup
    assert counted(LLAMA, dtype="float32").exact.speedup == plain.exact.speedup
    # bound by reading, then by arithmetic, where the table's lookup is free in both
    reading = counted(LLAMA, bandwidth=1e9, peak=1e15).exact.speedup
    computing = counted(LLAMA, bandwidth=1e15, peak=1e9).exact.speedup
    weights, gone = plain.weights - 96 * 32, plain.exact.removed
    assert reading == plain.exact.speedup
    assert computing == pytest.approx(weights / (weights - gone))


def test_biases_that_mean_nothing():
    gpt2 = {"model_type": "gpt2", "vocab_size": 96, "n_positions": 8, "n_embd": 32, "n_layer": 3, "n_head": 4}
    assert counted(gpt2).as_is == {
        "values": 3 * 32 * 8, "queries": 3 * 32 * 8, "norm_gains": 3 * 2 * 32, "norm_biases": 3 * 2 * 32, "k_bias": 96,
        "v_bias": 96,
    }  # fmt: skip
    assert counted({**LLAMA, "model_type": "qwen2"}).as_is["queries"] == 0
    assert counted({**LLAMA, "model_type": "qwen2"}).as_is["k_bias"] == 0  # RoPE stands between


def test_side_by_side_in_every_format():
    names = ("gpt2", "mixtral-8x7b", "gemma-2b")
    assert json.loads(run(*names, "--json").stdout)["models"][1]["name"] == "mixtral-8x7b"
    lines = run(*names, "--csv").stdout.splitlines()
    assert lines[0] == ",gpt2,mixtral-8x7b,gemma-2b"
    assert all(line.startswith("| ") for line in run(*names, "--markdown").stdout.splitlines() if "---" not in line)
    assert "gpt2" in run(*names).stdout
    assert "2.5" not in run("--list").stdout.split("as of")[0]


def test_a_name_that_is_not_known():
    result = run("mistral-7c")
    assert result.exit_code == 2
    assert "mistral-7c: expected a model folder, a config.json, a GGUF file or a known name" in result.stderr
    assert "mistral-7b" in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "config.json: hidden_size"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers: expected at most 100,000 layers and experts"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor"),
        ({"model_type": "other"}, "model_type: expected one of skipless, .*; found 'other'"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    with pytest.raises(skipless.InputError, match=message):
        skipless.count(tmp_path / "config.json")


def test_options_that_make_no_sense():
    assert run().exit_code == 2
    assert run("gpt2", "--paper").exit_code == 2
    for options in (
        ["--list", "--json"],
        ["--list", "--csv"],
        ["--paper", "--batch", "2"],
        ["--paper", "--context", "9"],
    ):
        assert run(*options).exit_code == 2
    assert "--bandwidth and --flops together" in run("gpt2", "--bandwidth", 10).stderr


@pytest.mark.alone
def test_counting_is_quick_and_light():
    code = """if True:
        import sys
        from skipless.cli import main
        try:
            main(["count", *sys.argv[1:], "--json"])
        except SystemExit as ended:
            assert not ended.code
        assert not {"torch", "transformers"} & sys.modules.keys()
    """
    times = []
    for name in ("mistral-7b", "qwen3-235b-a22b", "llama-3.1-405b"):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, name], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


@pytest.mark.parametrize("name", ["mistralai/Mistral-7B-v0.1", "MISTRALAI/mistral-7b-V0.1", "Mistral-7B"])
def test_what_a_hub_calls_a_model(name):
    assert skipless.count(name).name == "mistral-7b"


def test_every_model_has_a_name_on_a_hub_and_no_two_have_one():
    known = table()
    assert known["hub"].keys() == known["models"].keys()
    hub = [each.lower() for names in known["hub"].values() for each in names]
    assert len(hub) == len(set(hub)) >= len(known["models"])
    assert not set(hub) & known["models"].keys()
    with pytest.raises(skipless.InputError, match=r"the nearest names are mistral-7b-v0\.3"):
        skipless.count("mistralai/Mistral-7B-v0.4")


@pytest.mark.slow
def test_the_tables_totals_are_those_published():
    known = table()["models"]
    totals = {name: config["parameters"] for name, config in known.items() if "parameters" in config}
    assert len(known) >= 40
    assert len(totals) >= 30
    assert {name: skipless.count(name).parameters for name in totals} == totals


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("block_type", ["serial", "parallel"])
def test_how_much_of_its_own_state_a_token_keeps(heads, block_type):
    """By the rank of a layer's Jacobian for a token that has none but itself to attend to."""
    model = build(num_key_value_heads=heads, block_type=block_type)
    x = torch.randn(1, 1, 32, dtype=torch.float64)
    layer = model.model.layers[0]
    cos_sin = rotary_cos_sin(torch.zeros(1, 1, dtype=torch.long), model.config, x.dtype)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x, position_embeddings=cos_sin), x)
    found = counted(json.loads(model.config.to_json_string(use_diff=False)))
    assert found.architecture.own_state == torch.linalg.matrix_rank(jacobian.reshape(32, 32))
    assert found.architecture.own_state == (32 if block_type == "parallel" else 8 * heads)
    assert found.to_json()["own_state"] == found.architecture.own_state


def test_count_says_how_much_of_its_own_state_a_token_keeps(tmp_path):
    for heads, says in ((2, True), (4, False)):
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "num_key_value_heads": heads}))
        text = " ".join(run(tmp_path / "config.json").stdout.split())
        assert ("of a token's own state, V passes 16 of 32 dimensions a layer" in text) == says

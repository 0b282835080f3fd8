"""MLX says what transformers says, of every form, in mlx_lm's own loops."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("mlx.core", reason="needs MLX: `make test-mlx` installs it")
pytest.importorskip("mlx_lm", reason="needs mlx-lm: `make test-mlx` installs it")

import mlx.core as mx
from mlx_lm import batch_generate, convert, generate, load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

import skipless
from skipless import InputError, cli
from skipless.bundled import BUNDLED
from skipless.cli.demo import PROMPT
from skipless.inference import load_tokenizer
from skipless.serving.decoding import bytes_per_token
from skipless.serving.export import export
from skipless.serving.mlx import Runner
from tests.exports import documented, greedy, relative_error
from tests.gguf_forms import BIASES, BY_V, FORMS, MHA, PARALLEL, PIVOTED, SIZES, form, with_another
from tests.models import build, edit_config, random_ids, save
from tests.models import load as load_torch
from tests.pages import blocks, commands, page, run, shape
from tests.tolerances import FP32

pytestmark = pytest.mark.slow
LENGTH, TOKENS = 13, 11
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# What llama.cpp cannot run.
MORE = {
    "fully shaped": {**MHA, **BY_V, "attention_shaping": "full"},
    "window": {"sliding_window": 4, **PIVOTED},
    "windows in some layers": {
        "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": LINEAR, "full_attention": YARN},
    },
    "alibi, fully shaped, window": {
        "position_type": "alibi", "attention_shaping": "full", "sliding_window": 4, **PIVOTED,
    },
    "gains of branches": {"residual": "both", "residual_gains": True},
    "factors": {
        "embedding_multiplier": 1.7, "attention_multiplier": 0.3, "logit_scale": 0.5, "head_bias": True,
        "position_type": "learned", "position_offset": 2,
    },
    "norms of all kinds": {
        "norm_type": "rms", "norm_bias": True, "gain_offset": 1.0, "qk_norm": "heads",
        "norms": ["input_layernorm", "attention_output_norm", "ffn_output_norm", "model.norm"],
    },
}  # fmt: skip
# What `fuse --remove first_layer` makes of these: a table of what layer 0 gives.
TABLES = {
    "a table": {},
    "a table, parallel": {**PARALLEL, **BIASES},
    "a table, pivoted, skips": {**PIVOTED, "p_removed": False, "residual": "both"},
}


def source_of(name, folder):
    if name in FORMS:
        return form(name, folder)
    source = save(build(dtype=torch.float32, **{**SIZES, **{**MORE, **TABLES}[name]}), folder / "source")
    if name in TABLES:
        skipless.fuse(source, folder / "fused", remove=("first_layer",))
        return folder / "fused"
    return source


def compared(source, folder):
    """By how much mlx_lm's logits, given in steps, differ from transformers', relative to a token's largest; its greedy
    tokens; and transformers'.
    """
    model, _ = load_model(folder, trust_remote_code=True)
    expected = load_torch(source, torch.float32)
    ids = random_ids(expected, batch=1, length=LENGTH)
    cache = make_prompt_cache(model)
    found = [
        model(mx.array(step.numpy()), cache=cache) for step in (ids[:, :5], ids[:, 5:11], ids[:, 11:12], ids[:, 12:])
    ]
    with torch.no_grad():
        logits = expected(ids).logits[0]
    error = relative_error(torch.tensor(mx.concatenate(found, 1)[0].tolist()), logits).max().item()
    tokens = [token for token, _ in generate_step(mx.array(ids[0].numpy()), model, max_tokens=TOKENS)]
    return error, tokens, greedy(source, ids, TOKENS)


@pytest.mark.parametrize("name", [*FORMS, *MORE, *TABLES])
def test_it_says_what_transformers_says(name, tmp_path):
    source = source_of(name, tmp_path)
    export(source, tmp_path / "out", to="mlx")
    error, tokens, expected = compared(source, tmp_path / "out")
    assert tokens == expected
    assert error < FP32


@pytest.mark.parametrize(
    ("name", "spoilt"),
    [
        ("values and head", "0.self_attn.column_order"),
        ("values and head", "lm_head.column_order"),
        ("values and head", "1.self_attn.value_order"),
        ("queries", "1.self_attn.key_order"),
        ("queries, a part rotated", "1.self_attn.k_rope_proj.weight"),
        ("wide heads", "1.self_attn.row_order"),
        ("shaped", "1.self_attn.alpha"),
        ("tied, folded biases", "embed_tokens.bias"),
        ("experts, folded biases, all removed", "1.mlp.router.bias"),
        ("gains of branches", "1.ffn_gain"),
        ("a table", "model.embed_tokens.weight"),
    ],
)
def test_it_would_not_if_a_tensor_were_another(name, spoilt, tmp_path):
    source = source_of(name, tmp_path)
    export(with_another(spoilt, source, tmp_path / "other"), tmp_path / "out", to="mlx")
    assert compared(source, tmp_path / "out")[0] > 10 * FP32


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """The bundled model, original and fused, exported."""
    folder = tmp_path_factory.mktemp("bundled")
    skipless.fuse(BUNDLED, folder / "source", dtype="float32")
    export(BUNDLED, folder / "original", to="mlx", weights="bf16")
    export(folder / "source", folder / "fused", to="mlx")
    return folder


@pytest.mark.parametrize("name", ["original", "fused"])
def test_text_in_text_out(bundled, name):
    """Tokenizer and model together, stored in bf16 and in fp32."""
    model, tokenizer = load(str(bundled / name), trust_remote_code=True)
    expected = greedy(BUNDLED, torch.tensor([tokenizer.encode(PROMPT)]), 24)
    assert generate(model, tokenizer, PROMPT, max_tokens=24) == load_tokenizer(BUNDLED).decode(expected)


def test_what_the_docs_show(bundled, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (console,) = blocks(page("serving").partition("## MLX\n")[2].partition("\n## ")[0], "console")
    (tmp_path / "fused").symlink_to(bundled / "source")
    (wrote, said), (generates, _) = commands(console.text)
    assert shape(CliRunner().invoke(cli.main, wrote.split()[1:]).stdout) == shape(said)
    assert len(run(["bash", "-c", generates], tmp_path).split()) > 3
    (block,) = documented("serving", "MLX", tmp_path / "fused-mlx")
    exec(block, {})
    tokenizer = load_tokenizer(BUNDLED)
    expected = tokenizer.decode(greedy(BUNDLED, tokenizer(PROMPT, return_tensors="pt").input_ids, 64))
    assert capsys.readouterr().out == expected + "\n"


def test_prompts_of_different_lengths_at_once(bundled):
    model, tokenizer = load(str(bundled / "fused"), trust_remote_code=True)
    prompts = [tokenizer.encode(prompt) for prompt in (PROMPT, "def f(x):\n", "import")]
    found = batch_generate(model, tokenizer, prompts, max_tokens=TOKENS, return_token_ids=True).token_ids
    assert found == [greedy(BUNDLED, torch.tensor([prompt]), TOKENS) for prompt in prompts]


def lost(exact, folder):
    """The error of the logits of a quantized model, relative."""
    ids = mx.array([load_tokenizer(BUNDLED).encode(PROMPT)])
    expected, found = (load_model(each, trust_remote_code=True)[0](ids) for each in (exact, folder))
    return (mx.linalg.norm(found - expected) / mx.linalg.norm(expected)).item()


def test_what_it_quantizes(bundled, tmp_path):
    """To 8 bits it loses little, but something."""
    convert(str(bundled / "fused"), str(tmp_path / "q8"), quantize=True, q_bits=8, trust_remote_code=True)
    size = (tmp_path / "q8" / "model.safetensors").stat().st_size
    assert size < (bundled / "fused" / "model.safetensors").stat().st_size / 3
    assert 1e-5 < lost(bundled / "fused", tmp_path / "q8") < 0.1


def test_4_bits_leave_the_rest_8(bundled, tmp_path):
    asked = {"quantize": True, "q_bits": 4, "trust_remote_code": True}
    convert(str(bundled / "fused"), str(tmp_path / "ours"), **asked)
    convert(str(bundled / "fused"), str(tmp_path / "plain"), **asked, quant_predicate=lambda *_: True)
    bits = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization"]
    assert {each["bits"] for name, each in bits.items() if name.endswith("rest_proj")} == {8}
    ours, plain = (lost(bundled / "fused", tmp_path / name) for name in ("ours", "plain"))
    assert ours < plain / 1.5


def test_bench_times_it(bundled):
    runner = Runner(bundled / "fused", "float32")
    ids = load_tokenizer(BUNDLED).encode(PROMPT)
    expected = greedy(BUNDLED, torch.tensor([ids]), TOKENS)
    assert list(runner.decode(ids, 2, TOKENS)) == [[token] * 2 for token in expected]
    times = runner.generate(1, 7, 5)
    assert len(times) == 5
    assert 0 < times[0] < times[-1]
    assert runner.broken_cache(7, 5) is None
    assert runner.bytes_per_token == bytes_per_token(load_torch(bundled / "source", torch.float32))
    half = Runner(BUNDLED, "bfloat16")
    assert half.bytes_per_token == bytes_per_token(load_torch(BUNDLED, torch.bfloat16))


def test_it_is_stored_as_asked(bundled):
    assert mx.load(str(bundled / "original" / "model.safetensors"))["lm_head.weight"].dtype == mx.bfloat16
    config = json.loads((bundled / "fused" / "config.json").read_text())
    assert config["model_file"] == "mlx_model.py"
    assert (bundled / "fused" / "tokenizer.json").exists()


def test_others_can_read_it(bundled):
    modes = {file.name: file.stat().st_mode & 0o777 for file in (bundled / "fused").iterdir()}
    assert set(modes.values()) == {modes["config.json"]}


@pytest.mark.parametrize("spoil", ["code", "name"])
def test_other_code_in_its_folder_is_not_run(bundled, tmp_path, spoil):
    shutil.copytree(bundled / "fused", folder := tmp_path / "fused")
    if spoil == "code":
        (folder / "mlx_model.py").write_text("raise SystemExit")
    else:
        edit_config(folder, model_file="other.py")
        (folder / "other.py").write_text("raise SystemExit")
    with pytest.raises(
        InputError, match=r"mlx_model\.py: expected this version's, which mlx_lm runs, found other code"
    ):
        Runner(folder, "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "tanh"}, "hidden_act: expected one of silu, swish, relu, gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type: expected one"),
    ],
    ids=str,
)
def test_what_it_cannot_run_is_refused(changes, message, tmp_path):
    source = save(build(**changes), tmp_path / "source")
    with pytest.raises(InputError, match=message) as error:
        export(source, tmp_path / "out", to="mlx")
    assert "\n" not in str(error.value)
    assert {file.name for file in tmp_path.iterdir()} == {"source"}

"""Ordinary models in GGUF files as sources of fuse: judged by what transformers itself makes of the file."""

import json
import shutil

import gguf
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import skipless
from skipless import cli
from skipless.checkpoint import gguf_folder
from skipless.inference import arithmetic, load, load_tokenizer
from skipless.serving.export import export
from tests import gguf_files
from tests.families import LLAMA, MODELS, build
from tests.integration.test_gguf import TOKENIZERS
from tests.models import build as build_skipless
from tests.models import edit_tensors, save, stop_fuse
from tests.tolerances import TOLERANCES

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPES = {"grouped": {}, "one head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True}}
SHAPES |= {"wide heads": {"head_dim": 24, "rms_norm_eps": 1e-2, "rope_parameters": {"rope_theta": 500.0}}}


def model(monkeypatch, shape="grouped"):
    monkeypatch.setitem(MODELS, "gguf", ("Llama", {**LLAMA, **SIZES, **SHAPES[shape]}))
    return build("gguf").float()


@pytest.fixture
def file(tmp_path, monkeypatch):
    return gguf_files.write(model(monkeypatch), tmp_path / "tiny.gguf")


def logits(loaded):
    ids = torch.arange(5, 17)[None]
    with torch.no_grad(), arithmetic(loaded):
        return loaded.double()(input_ids=ids, use_cache=False).logits


def judge(file):
    """transformers' own model of a file."""
    return logits(AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float64))


def off(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    "shape", ["grouped", *(pytest.param(shape, marks=pytest.mark.slow) for shape in [*SHAPES][1:])]
)
@pytest.mark.parametrize("layout", ["skipless", "family"])
def test_a_gguf_file_is_the_same_function(layout, shape, tmp_path, monkeypatch):
    file = gguf_files.write(model(monkeypatch, shape), tmp_path / "tiny.gguf")
    plan = skipless.fuse(file, tmp_path / "fused", layout=layout, dtype="float64")
    fused = load(tmp_path / "fused", torch.float64)
    assert fused.config.model_type == ("llama" if layout == "family" else "skipless")
    assert off(logits(fused), judge(file)) < TOLERANCES[torch.float64]
    promised, audited = skipless.count(file), skipless.audit(file)
    before, after = plan.parameters
    if layout == "skipless":
        assert before - after == promised.left_out == audited.left_out > 0
    else:
        assert plan.neutral == promised.by_fuse == audited.by_fuse > 0
    found = skipless.verify(file, tmp_path / "fused", dtypes=(), tokens=4)
    assert found.same
    assert found.proved


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_types(kind, tmp_path, monkeypatch):
    """Of 16 bits as they are; of fewer, by the package gguf, in fp32."""
    file = gguf_files.write(model(monkeypatch), tmp_path / "tiny.gguf", kind)
    reader = gguf_folder.GGUFFolder(file)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert reader.tensors["model.layers.0.mlp.up_proj.weight"].dtype == dtype
    assert json.loads((reader.folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    skipless.fuse(file, tmp_path / "fused", layout="skipless", dtype="float64")
    assert off(logits(load(tmp_path / "fused", torch.float64)), judge(file)) < 1e-6  # which dequantizes in fp32
    skipless.fuse(file, tmp_path / "stored", layout="skipless", dtype="bfloat16")
    assert skipless.verify(file, tmp_path / "stored", dtypes=("bfloat16",), tokens=4).same


def test_rows_of_another_order_are_another_function(tmp_path, monkeypatch):
    tiny = model(monkeypatch)
    right, wrong = (gguf_files.write(tiny, tmp_path / f"{rotated}.gguf", rotated=rotated) for rotated in (True, False))
    skipless.fuse(wrong, tmp_path / "fused", layout="skipless", dtype="float64")
    assert off(logits(load(tmp_path / "fused", torch.float64)), judge(right)) > 1e-3
    assert not skipless.verify(right, tmp_path / "fused", dtypes=(), tokens=4).same


def test_rows_alone(file):
    reader = gguf_folder.GGUFFolder(file)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "input_layernorm"):
        tensor = f"model.layers.1.{name}.weight"
        for rows in (slice(0, 5), slice(7, 8), slice(30, 32)):
            assert torch.equal(reader.tensor(tensor, rows), reader.tensor(tensor)[rows])


def test_a_wrong_tensor_shows(file, tmp_path):
    skipless.fuse(file, tmp_path / "fused", layout="skipless")
    (tmp_path / "fused" / "skipless.json").unlink()
    name = "model.layers.1.self_attn.v_proj.weight"
    right = load(tmp_path / "fused", torch.float32).state_dict()[name]
    edit_tensors(tmp_path / "fused", **{name.replace(".", "__"): right.roll(1, -1)})
    assert not skipless.verify(file, tmp_path / "fused", dtypes=(), tokens=4).same


@pytest.mark.slow
def test_a_stopped_fuse_goes_on(file, tmp_path):
    skipless.fuse(file, tmp_path / "whole", layout="skipless")
    stop_fuse(file, tmp_path / "fused", 3, layout="skipless")
    skipless.fuse(file, tmp_path / "fused", layout="skipless", resume=True)
    names = ("model.safetensors", "config.json", "skipless.json")
    assert all((tmp_path / "fused" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


def test_a_file_that_changes_meanwhile_is_noticed(file):
    reader = gguf_folder.GGUFFolder(file)
    shutil.copy(file, file.with_suffix(".other"))
    file.with_suffix(".other").replace(file)
    with pytest.raises(skipless.InputError, match=r"tiny\.gguf: expected the file as it was when its header was read"):
        reader.tensor("model.norm.weight")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rope.scaling.type: expected none"),
        (lambda writer: writer.add_expert_count(3), "llama.expert_count: expected none, or what says nothing, found 3"),
        (lambda writer: writer.add_sliding_window(5), "llama.attention.sliding_window: expected none"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", torch.ones(8).numpy()), "rope_freqs.weight: expected"),
    ],
    ids=["yarn", "experts", "window", "factors"],
)
def test_what_no_llama_config_says_is_refused_by_name(edit, message, tmp_path, monkeypatch):
    file = gguf_files.write(model(monkeypatch), tmp_path / "tiny.gguf", edit=edit)
    result = CliRunner().invoke(cli.main, ["fuse", str(file), str(tmp_path / "fused")])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "fused").exists()


def test_a_skipless_file_is_refused(tmp_path):
    export(save(build_skipless(), tmp_path / "source"), tmp_path / "out", to="gguf")
    with pytest.raises(skipless.InputError, match=r"general\.architecture: expected 'llama', found 'skipless'"):
        skipless.fuse(tmp_path / "out" / "model.gguf", tmp_path / "fused")


TEXTS = ("Hello world", "def f(x12345): return  x\n\n  # it's 3.14", " a  b", "été 你好", "12 1234567")


@pytest.mark.parametrize(
    "name", [name if name == "smollm" else pytest.param(name, marks=pytest.mark.slow) for name in TOKENIZERS]
)
def test_tokenizers_come_back(name, tmp_path, monkeypatch):
    source = TOKENIZERS[name](save(build_skipless(vocab_size=700), tmp_path / "source"))
    export(source, tmp_path / "out", to="gguf")
    metadata = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields

    def edit(writer):
        for field in (field for each, field in metadata.items() if each.startswith("tokenizer.")):
            inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)

    monkeypatch.setitem(MODELS, "gguf", ("Llama", {**LLAMA, **SIZES, "vocab_size": 700}))
    file = gguf_files.write(build("gguf").float(), tmp_path / "tiny.gguf", edit=edit)
    skipless.fuse(file, tmp_path / "fused", layout="skipless")
    expected, found = (load_tokenizer(folder) for folder in (source, tmp_path / "fused"))
    for text in TEXTS:
        ids = found(text).input_ids
        assert ids == expected(text).input_ids, text
        assert found.decode(ids) == expected.decode(ids)
    assert (found.bos_token, found.eos_token) == (expected.bos_token, expected.eos_token)
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert config["eos_token_id"] == expected.eos_token_id


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda writer: None, "tokenizer.ggml.model: expected gpt2 or llama, found None"),
        (lambda writer: writer.add_tokenizer_model("rwkv"), "tokenizer.ggml.model: expected gpt2 or llama"),
        (
            lambda writer: (writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("tekken")),
            "tokenizer.ggml.pre: expected one of gpt-2, smollm, llama-bpe, qwen2; found 'tekken'",
        ),
    ],
    ids=["none", "another model", "another split"],
)
def test_a_tokenizer_that_is_not_converted_is_said(edit, message, tmp_path, monkeypatch, caplog):
    file = gguf_files.write(model(monkeypatch), tmp_path / "tiny.gguf", edit=edit)
    skipless.fuse(file, tmp_path / "fused", layout="skipless")
    assert f"its tokenizer is not converted: {message}" in caplog.text
    assert not list((tmp_path / "fused").glob("tokenizer*"))

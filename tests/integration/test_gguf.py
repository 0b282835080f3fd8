"""What export writes for llama.cpp: every tensor, every field and the tokenizer, read back through the package gguf."""

import copy
import json

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import skipless
from skipless import InputError, cli
from skipless.bundled import BUNDLED
from skipless.checkpoint import opening, reader
from skipless.checkpoint.gguf_tokens import CONTRACTIONS, OTHERS, SPACE
from skipless.reports.counting import count
from skipless.serving import gguf as room
from skipless.serving import gguf_grids
from skipless.serving.export import export
from skipless.serving.gguf_grids import RANGES
from tests.gguf_forms import BIASES, EXPERTS, FORMS, PARALLEL, SIZES, form
from tests.models import build, edit_tensors, load, relative_error, save


def exported(source, folder, weights="f32"):
    export(source, folder, to="gguf", weights=weights)
    return folder / "model.gguf"


def fields(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


VALUES = [name for name, fields in FORMS.items() if fields.get("values_removed")]


def test_a_norm_without_a_gain_has_one_of_1(tmp_path):
    """llama.cpp knows a norm by its gain."""
    file = exported(form("norms without gains", tmp_path), tmp_path / "out")
    stored = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    for name in ("blk.0.attn_norm", "blk.1.ffn_norm", "output_norm"):
        assert (stored[f"{name}.weight"] == np.ones(64)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FORMS if name not in VALUES])
def test_every_tensor_comes_back(name, tmp_path):
    source = form(name, tmp_path)
    written = reader.CheckpointReader(source)
    found = opening.open_source(exported(source, tmp_path / "out"))
    assert found.family == "gguf-skipless"
    assert found.architecture == opening.read_architecture(written)
    assert found.reader.tensors.keys() == written.tensors.keys()
    for tensor in written.tensors:
        assert torch.equal(found.reader.tensor(tensor), written.tensor(tensor)), tensor


@pytest.mark.parametrize("name", VALUES)
def test_values_have_their_identity_back(name, tmp_path):
    source = form(name, tmp_path)
    file = exported(source, tmp_path / "out")
    model = skipless.inference.load(source, torch.float32)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    x = torch.randn(5, model.config.hidden_size)
    for number, layer in enumerate(model.model.layers):
        whole = torch.from_numpy(np.array(stored[f"blk.{number}.attn_v.weight"]))
        expected = layer.self_attn.project(x[None])[2][0]
        torch.testing.assert_close(x @ whole.T, expected, rtol=1e-5, atol=1e-5)
        if model.config.keys_removed:
            keys = torch.from_numpy(np.array(stored[f"blk.{number}.attn_k.weight"]))
            keys = x @ keys.T + torch.from_numpy(np.array(stored.get(f"blk.{number}.attn_k.bias", 0)))
            torch.testing.assert_close(keys, layer.self_attn.project(x[None])[1][0], rtol=1e-5, atol=1e-5)
        assert (x.roll(1, -1) @ whole.T - expected).abs().max() > 0.1
    assert count(file).parameters == count(source).parameters
    with pytest.raises(InputError, match="use the model folder that it was exported from"):
        skipless.audit(file)


def test_fields_and_types(tmp_path):
    rope = {"rope_theta": 500.0, "partial_rotary_factor": 0.5}
    model = build(**{**SIZES, **EXPERTS, "rope_parameters": rope, "max_position_embeddings": 77, "qk_norm": "head_dim"})
    source = save(model.to(torch.bfloat16), tmp_path / "source")
    file = exported(source, tmp_path / "out", "q8_0")
    found = {name.removeprefix("skipless."): value for name, value in fields(file).items()}
    expected = {
        "general.architecture": "skipless", "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0, "vocab_size": 2048,
        "general.quantization_version": 2, "context_length": 77, "embedding_length": 64, "feed_forward_length": 96,
        "block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
        "attention.value_length": 16, "use_parallel_residual": False, "residual": "none", "hidden_activation": "silu",
        "rope.dimension_count": 8, "rope.freq_base": 500.0, "rope.interleaved": False, "expert_count": 4,
        "expert_used_count": 2, "expert_weights_norm": True, "tokenizer.ggml.model": "none",
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert found["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert json.loads(found["config"]) == json.loads((source / "config.json").read_text())
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert types["token_embd.weight"] == types["blk.1.ffn_up_exps.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.1.ffn_gate_inp.weight"] == types["blk.0.attn_q_norm.weight"] == "F32"


@pytest.mark.parametrize("weights", ["bf16", "f16", "q8_0", "q4_0"])
def test_fewer_bits(weights, tmp_path):
    source = form("pivoted", tmp_path)
    file = exported(source, tmp_path / "out", weights)
    written, found = reader.CheckpointReader(source), opening.open_source(file).reader
    # of a block's largest; a block's scale is in fp16
    steps = {"bf16": 2**-8, "f16": 2**-11, "q8_0": 1 / 254 + 2**-11, "q4_0": 1 / 8 + 2**-11}
    alone = ("gate_proj.weight", "up_proj.weight")  # P is gone: they write and read no space
    for name in written.tensors:
        expected, values = written.tensor(name), found.tensor(name)
        if expected.dim() > 1 and weights.upper() in RANGES and not name.endswith(alone):
            assert not torch.equal(values, expected), name
        elif expected.dim() > 1:
            assert 0 < (values - expected).abs().max() <= steps[weights] * expected.abs().max(), name
        else:
            assert torch.equal(values, expected), name


@pytest.mark.parametrize("kind", RANGES)
def test_a_grid_is_llama_cpps(kind):
    """What is on the grid comes back from the file's bytes, and is as near as what gguf rounds to."""
    kind = gguf.GGMLQuantizationType[kind]
    matrix = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    matrix[0, :32], matrix[1, :32] = 0, 0.3
    grid = gguf_grids.fitted(matrix, kind)
    stored = grid.nearest(matrix)
    found = gguf.dequantize(gguf_grids.on_grid(stored, grid, kind), kind)
    assert (found == stored.numpy()).all()
    plain = gguf.dequantize(gguf.quantize(matrix.numpy(), kind), kind)
    assert (abs(found - matrix.numpy()) <= abs(plain - matrix.numpy()) + 1e-6).all()
    moved = grid.nearest(stored + grid.step)
    assert (moved != stored).any()
    assert (gguf.dequantize(gguf_grids.on_grid(moved, grid, kind), kind) == moved.numpy()).all()


# Models, and how many of their spaces are rounded together.
WHOLE = {
    "original": ({}, 5),
    "biases": (BIASES, 5),
    "learned": ({"position_type": "learned"}, 5),
    "tied": ({"tie_word_embeddings": True}, 3),
    "parallel": (PARALLEL, 3),
    "parallel, p": ({**PARALLEL, "p_removed": True, "head_dim": 32}, 1),
    "experts": (EXPERTS, 1),
    "norms and skips": ({"norm_type": "rms", "residual": "both"}, 0),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_space_has_all_that_writes_and_reads_it(name, tmp_path, monkeypatch):
    """In another basis of each space the model is the same function."""
    changed = []

    def turned(writers, readers, passed):
        generator = torch.Generator().manual_seed(len(changed))
        width = writers[0].matrix.shape[1]
        basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        changed.append(passed)
        return [[each.encode(each.matrix[slice(0, len(each.matrix))] @ basis, None)] for each in (*writers, *readers)]

    monkeypatch.setattr(gguf_grids, "round_space", turned)
    monkeypatch.setattr(room, "RANGES", {"F32": (0, 0)})
    fields, spaces = WHOLE[name]
    model = build(dtype=torch.float32, **{**SIZES, **fields})
    file = exported(save(model, tmp_path / "source"), tmp_path / "out")
    stored, found = opening.open_source(file).reader, copy.deepcopy(model)
    found.load_state_dict({tensor: stored.tensor(tensor) for tensor in stored.tensors}, strict=False)
    assert len(changed) == spaces
    assert not any(changed)
    assert relative_error(found, model) < 1e-4
    if spaces:
        found.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
        found.model.layers[1].load_state_dict(model.model.layers[1].state_dict())
        assert relative_error(found, model) > 0.01


@pytest.mark.parametrize("weights", ["q8_0", "f16"])
def test_numbers_that_fp16_cannot_hold_are_refused(weights, tmp_path):
    source = save(build(), tmp_path / "source")
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(source, model__layers__0__mlp__up_proj__weight=torch.full_like(load(source).state_dict()[name], 1e5))
    with pytest.raises(InputError, match=rf"ffn_up.weight: expected numbers of at most 65,504.0 for {weights.upper()}"):
        exported(source, tmp_path / "out", weights)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "factor"), [("q8_0", 4), ("q4_0", 2)])
def test_rounded_together_the_bundled_model_loses_less(weights, factor, tmp_path, monkeypatch):
    """By so much, in Kullback-Leibler divergence, than with each number rounded to the nearest, the rest's, too."""
    monkeypatch.setattr(room, "REST", {"q8_0": "q8_0", "q4_0": "q8_0"})
    skipless.fuse(BUNDLED, tmp_path / "fused", basis="pivoted", dtype="float32")
    model = load(tmp_path / "fused", torch.float32)
    ids = skipless.inference.load_tokenizer(BUNDLED)(TEXT, return_tensors="pt").input_ids[:, :512]

    def divergence(folder):
        stored, other = opening.open_source(exported(tmp_path / "fused", folder, weights)).reader, copy.deepcopy(model)
        other.load_state_dict({tensor: stored.tensor(tensor) for tensor in stored.tensors})
        with torch.no_grad():
            expected, found = (each(ids).logits[0].log_softmax(-1) for each in (model, other))
        return (expected.exp() * (expected - found)).sum(-1).mean()

    together = divergence(tmp_path / "together")
    monkeypatch.setattr(room, "spaces", lambda layout: ())
    assert together < divergence(tmp_path / "alone") / factor


@pytest.mark.parametrize(("weights", "rest"), [("q8_0", "F16"), ("q5_1", "Q8_0"), ("q4_0", "Q8_0"), ("bf16", "BF16")])
def test_the_rest_has_more_bits(weights, rest, tmp_path):
    file = exported(form("pivoted", tmp_path), tmp_path / "out", weights)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert (types["blk.1.attn_qkv.weight"], types["blk.1.ffn_up.weight"]) == (rest, weights.upper())


def test_rows_that_are_no_whole_blocks_stay_in_half_precision(tmp_path):
    source = save(build(intermediate_size=40), tmp_path / "source")
    file = exported(source, tmp_path / "out", "q4_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F16", "Q4_0")


def test_a_rest_in_fp32_stays(tmp_path):
    source = save(build(), tmp_path / "source")
    skipless.fuse(source, tmp_path / "fused", basis="pivoted", dtype="bfloat16", rest_dtype="float32")
    file = exported(tmp_path / "fused", tmp_path / "out", "bf16")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert (types["blk.0.attn_qkv.weight"], types["blk.0.ffn_up.weight"]) == ("F32", "BF16")
    written, found = reader.CheckpointReader(tmp_path / "fused"), opening.open_source(file).reader
    for name, info in found.tensors.items():
        assert torch.equal(found.tensor(name), written.tensor(name).to(info.dtype)), name


@pytest.mark.slow
def test_the_commands(tmp_path):
    arguments = ["export", str(BUNDLED), str(tmp_path / "out"), "--to", "gguf", "--weights", "q8_0", "--json"]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["weights"] == "q8_0"
    assert (tmp_path / "out" / "config.json").exists()
    counted, expected = count(tmp_path / "out" / "model.gguf"), count(BUNDLED)
    assert (counted.parameters, counted.exact, counted.family) == (expected.parameters, expected.exact, "gguf-skipless")
    assert CliRunner().invoke(cli.main, ["audit", str(tmp_path / "out" / "model.gguf")]).exit_code == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_shaping": "full"}, "attention_shaping: expected null or 'value' for gguf, found 'full'"),
        ({"residual_gains": True}, "residual_gains: expected false for gguf, found True"),
        ({"sliding_window": 4}, "sliding_window: expected null for gguf, found 4"),
        ({"head_bias": True}, "head_bias: expected false for gguf, found True"),
        ({"position_type": "learned", "position_offset": 2}, "position_offset: expected 0 for gguf, found 2"),
        ({"embedding_multiplier": 2.0}, "embedding_multiplier: expected null for gguf, found 2.0"),
        ({"norm_type": "rms", "gain_offset": 1.0}, "gain_offset: expected 0 for gguf, found 1.0"),
        ({"norm_type": "rms", "norms": ["ffn_output_norm"]}, "norms: expected none of what P and O give"),
        ({"qk_norm": "heads"}, "qk_norm: expected null or 'head_dim' for gguf, found 'heads'"),
        ({"logit_scale": 0.5}, "logit_scale: expected 1 for gguf, found 0.5"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters: expected"),
        ({"hidden_act": "tanh"}, "hidden_act: expected one of silu, swish, relu, gelu"),
        ({"hidden_act": "gelu", **EXPERTS}, "hidden_act: expected another than 'gelu' for experts"),
        ({"p_removed": True, "head_dim": 4, **EXPERTS}, "p_removed: expected false with experts, unless the heads"),
    ],
    ids=str,
)
def test_what_llama_cpp_cannot_run_is_refused(changes, message, tmp_path):
    source = save(build(**changes), tmp_path / "source")
    with pytest.raises(InputError, match=message) as error:
        exported(source, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert {file.name for file in tmp_path.iterdir()} == {"source"}


def test_a_file_that_contradicts_itself(tmp_path):
    """The config in the metadata, and the tensors, must be of one model."""
    source = save(build(), tmp_path / "source")
    file = exported(source, tmp_path / "out")
    bad = file.read_bytes().replace(b'"head_dim": 8', b'"head_dim": 4')
    assert bad != file.read_bytes()
    file.write_bytes(bad)
    with pytest.raises(InputError, match=r"blk\.0\.attn_q\.weight: expected \(16, 32\), as the metadata says"):
        count(file)
    file.write_bytes(bad.replace(b"skipless.config", b"skipless.konfig"))
    with pytest.raises(InputError, match=r"skipless.config: expected the text of a config.json"):
        count(file)


def test_damaged_weights_leave_nothing(tmp_path):
    source = save(build(), tmp_path / "source")
    edit_tensors(source, model__norm__weight=None, lm_head__weight=torch.full((61, 32), torch.nan))
    with pytest.raises(InputError, match=r"lm_head\.weight: expected finite numbers"):
        exported(source, tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(
    ("fields", "order"),
    [
        ({"stream_basis": "pivoted", "p_removed": True}, "column_order"),
        ({"values_removed": True}, "value_order"),
        ({"keys_removed": True, "position_type": "none"}, "key_order"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("damage", ["twice", "beyond"])
def test_a_damaged_order_is_refused(fields, order, damage, tmp_path):
    source = save(build(**fields), tmp_path / "source")
    name = f"model.layers.1.self_attn.{order}"
    indices = reader.CheckpointReader(source).tensor(name)
    indices.flatten()[0] = indices.flatten()[1] if damage == "twice" else 10_000
    edit_tensors(source, **{name: indices})
    with pytest.raises(InputError, match=f"{order}: expected each index of its source once"):
        exported(source, tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"source"}


def test_ropes_that_are_named_by_kind_of_layer(tmp_path):
    own = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    found = [
        fields(exported(save(build(rope_parameters=each), tmp_path / f"source{number}"), tmp_path / f"out{number}"))
        for number, each in enumerate((own, {"full_attention": own}))
    ]
    for values in found:
        assert values["skipless.rope.freq_base"] == 5e5
        assert values["skipless.rope.dimension_count"] == 4
    scaled = {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    source = save(build(rope_parameters=scaled), tmp_path / "scaled")
    with pytest.raises(InputError, match="rope_parameters: expected null or those of default RoPE"):
        exported(source, tmp_path / "out")


TEXT = (BUNDLED / "README.md").read_text()


def byte_level(folder, splits, ignore_merges=False):
    """A tokenizer of bytes, trained on a text."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits) if len(splits) > 1 else splits[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    return saved(tokenizer, folder)


def sentencepiece(folder):
    """One as Llama 2 has it: spaces become a mark, bytes to fall back on, and a token that begins a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        TEXT.splitlines(), trainers.BpeTrainer(vocab_size=600, special_tokens=special, max_token_length=8)
    )
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return saved(tokenizer, folder, unk_token="<unk>")


def saved(tokenizer, folder, **special):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def split(pattern):
    pattern = pre_tokenizers.Split(Regex(pattern), "isolated")
    return [pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
TOKENIZERS = {
    "gpt-2": lambda folder: byte_level(folder, [BYTES]),
    "smollm": lambda folder: byte_level(folder, [pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "llama-bpe": lambda folder: byte_level(folder, split(CONTRACTIONS + r"\p{N}{1,3}" + OTHERS), ignore_merges=True),
    "qwen2": lambda folder: byte_level(folder, split(CONTRACTIONS + r"\p{N}" + OTHERS)),
    "default": sentencepiece,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(name, tmp_path):
    source = TOKENIZERS[name](save(build(vocab_size=700), tmp_path / "source"))
    found = fields(exported(source, tmp_path / "out"))
    tokenizer = skipless.inference.load_tokenizer(source)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert found["tokenizer.ggml.pre"] == name
    assert found["tokenizer.ggml.model"] == ("llama" if name == "default" else "gpt2")
    assert len(tokens) == len(types) == 700
    assert {token: tokens[number] for token, number in tokenizer.get_vocab().items() if tokens[number] != token} == {}
    assert types[-1] == gguf.TokenType.UNUSED
    assert types[tokenizer.eos_token_id] == gguf.TokenType.CONTROL
    assert found["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert found["tokenizer.ggml.add_bos_token"] is (name == "default")
    merges = json.loads((source / "tokenizer.json").read_text())["model"]["merges"]
    if name == "default":
        assert types[3:259] == [gguf.TokenType.BYTE] * 256
        assert found["tokenizer.ggml.add_space_prefix"] is True
        first, last = ("".join(merges[place]) for place in (0, -1))
        scores = dict(zip(tokens, found["tokenizer.ggml.scores"], strict=True))
        assert scores[first] == 0 > scores[last]
    else:
        assert found["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"model": {"type": "Unigram"}}, "model.type: expected 'BPE', for llama.cpp knows no other; found 'Unigram'"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer: expected a way to split text that is one of gpt-2"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
            "pre_tokenizer.add_prefix_space: expected false",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer: expected none, or NFC"),
        ({"model": {"ignore_merges": True}}, "model.ignore_merges: expected False with the split gpt-2"),
        ({"model": {"byte_fallback": True}}, "normalizer: expected one that replaces spaces"),
    ],
    ids=str,
)
def test_a_tokenizer_that_llama_cpp_cannot_run_is_refused(edit, message, tmp_path):
    source = TOKENIZERS["gpt-2"](save(build(vocab_size=700), tmp_path / "source"))
    described = json.loads((source / "tokenizer.json").read_text())
    for name, value in edit.items():
        described[name] = {**described["model"], **value} if name == "model" else value
    (source / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=f"tokenizer.json: {message}") as error:
        exported(source, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    source = TOKENIZERS["gpt-2"](save(build(vocab_size=300), tmp_path / "source"))
    with pytest.raises(InputError, match=r"model\.vocab: expected tokens below config\.json's vocab_size, 300"):
        exported(source, tmp_path / "out")

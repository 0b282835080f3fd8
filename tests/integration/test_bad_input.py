"""Bad input: one clear line, exit code 2, nothing half-written, the source untouched."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner

import skipless
from skipless import InputError, cli, fuse
from skipless.architecture.config import Architecture
from skipless.architecture.limit import limit
from skipless.checkpoint.headers import read_json_object
from skipless.checkpoint.reader import CheckpointReader
from skipless.reports.counting import Conditions
from tests.models import build, edit_config, edit_tensors, save

Q1 = "model.layers.1.self_attn.q_proj.weight"


def refuse(tmp_path, *arguments, message, destination="fused"):
    """Run `skipless fuse` and require a refusal that leaves nothing behind."""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = CliRunner().invoke(cli.main, ["fuse", str(tmp_path / "source"), str(tmp_path / destination), *arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("skipless: ")
    for part in [message] if isinstance(message, str) else message:
        assert part in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    return line


def header(source):
    """The safetensors header of the only shard, and the offset of the data."""
    data = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(source, fields, data, length=None):
    encoded = json.dumps(fields).encode()
    prefix = (len(encoded) if length is None else length).to_bytes(8, "little")
    (source / "model.safetensors").write_bytes(prefix + encoded + data)


def test_missing_tensor(source, tmp_path):
    edit_tensors(source, **{Q1: None})
    refuse(tmp_path, message=[f"{Q1}: expected (32, 32), as config.json says", "no such tensor"])


def test_extra_tensor(source, tmp_path):
    edit_tensors(source, model__layers__0__mlp__up_proj__bias=torch.zeros(48))
    refuse(tmp_path, message=["model.layers.0.mlp.up_proj.bias: expected no such tensor", "found (48,)"])


def test_wrong_shape(source, tmp_path):
    edit_tensors(source, **{Q1: torch.zeros(32, 16)})
    refuse(tmp_path, message=f"{Q1}: expected (32, 32), as config.json says; found (32, 16)")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool], ids=str)
def test_wrong_dtype(source, tmp_path, dtype):
    edit_tensors(source, **{Q1: torch.zeros(32, 32).to(dtype)})
    expected = f"{Q1}: expected a dtype of F64, F32, BF16, F16 (weights) or I32 (indices), found "
    refuse(tmp_path, message=[expected, "dequantize or convert"])


def test_an_index_for_a_weight_and_a_weight_for_an_index(source, tmp_path):
    edit_tensors(source, **{Q1: torch.zeros(32, 32, dtype=torch.int32)})
    refuse(tmp_path, message=f"{Q1}: expected weights of dtype F64, F32, BF16, F16, found I32")
    shutil.rmtree(source)
    save(build(stream_basis="pivoted", layers_open=[1], dtype=torch.float32), source)
    order = "model.layers.2.self_attn.column_order"
    edit_tensors(source, **{order: torch.arange(64).float()})
    refuse(tmp_path, message=f"{order}: expected indices of dtype I32, found F32")


@pytest.mark.parametrize("kept", [0, 5, 100, -1], ids=str)
def test_truncated_file(source, tmp_path, kept):
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:kept])
    refuse(tmp_path, message=["model.safetensors: expected a whole safetensors file", "truncated or damaged"])


@pytest.mark.parametrize("length", [2**63, 10**9, 3], ids=str)
def test_a_header_that_lies_about_its_length(source, tmp_path, length):
    fields, data = header(source)
    write_header(source, fields, data, length)
    refuse(tmp_path, message="model.safetensors: expected a whole safetensors file")


@pytest.mark.parametrize("lie", ["beyond the end", "overlap", "shape", "negative"])
def test_a_header_that_lies_about_a_tensor(source, tmp_path, lie):
    fields, data = header(source)
    start, end = fields[Q1]["data_offsets"]
    fields[Q1] |= {
        "beyond the end": {"data_offsets": [start, end + 10**12]},
        "overlap": {"data_offsets": [0, end - start]},
        "shape": {"shape": [320, 32]},
        "negative": {"shape": [-32, -32]},
    }[lie]
    write_header(source, fields, data)
    refuse(tmp_path, message="model.safetensors: expected a whole safetensors file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [Q1, "lm_head.weight", "model.layers.0.mlp.down_proj.weight"])
def test_nan_or_infinity(source, tmp_path, value, name):
    tensor = torch.randn(*dict(build().named_parameters())[name].shape)
    tensor[1, 2] = value
    edit_tensors(source, **{name: tensor})
    refuse(tmp_path, message=f"{name}: expected finite numbers, found 1 of {tensor.numel()} NaN or infinite")


def test_singular(source, tmp_path):
    edit_tensors(source, **{Q1: torch.ones(32, 32)})
    refuse(
        tmp_path,
        "--basis",
        "q",
        message=[
            f"{Q1}: expected an invertible matrix",
            "condition number at most 4.5e+06",
            "found ",
            "use --basis pivoted (condition number ",
            "leave this seam open with --layers-open 1",
        ],
    )


def test_rank_deficient(source, tmp_path):
    widths = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    edit_tensors(source, **{Q1.replace("q_proj", name): torch.ones(width, 32) for name, width in widths.items()})
    refuse(
        tmp_path,
        message=[
            "model.layers.1.self_attn.q_proj, model.layers.1.self_attn.k_proj, model.layers.1.self_attn.v_proj: "
            "expected 32 linearly independent outputs",
            "use leave this seam open with --layers-open 1",
        ],
    )


def test_overflow_in_the_new_dtype(source, tmp_path):
    edit_tensors(source, model__embed_tokens__weight=torch.full((61, 32), 1e5))
    refuse(tmp_path, "--dtype", "float16", message=["model.embed_tokens.weight: expected numbers that", "float16"])


def test_the_destination_exists(source, tmp_path):
    (tmp_path / "fused").mkdir()
    refuse(tmp_path, message="fused: expected a new folder, found one that exists")
    shutil.rmtree(tmp_path / "fused")
    (tmp_path / "fused").write_text("a file")
    refuse(tmp_path, message="fused: expected a new folder")


def test_the_destination_is_looked_at_before_the_weights_are(source, tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointReader, "tensor", lambda *_: pytest.fail("a tensor was read"))
    (tmp_path / "fused").mkdir()
    refuse(tmp_path, message="fused: expected a new folder, found one that exists")


def test_the_destination_is_the_source(source, tmp_path):
    refuse(tmp_path, destination="source", message="expected a folder outside the source")
    (tmp_path / "link").symlink_to(source)
    refuse(tmp_path, destination="link", message="expected a folder outside the source")


def test_the_destination_is_inside_the_source(source, tmp_path):
    refuse(tmp_path, destination="source/fused", message="expected a folder outside the source")


def test_the_destination_has_no_parent(source, tmp_path):
    refuse(tmp_path, destination="no/such/place", message="no/such: expected an existing folder to write into")


def test_too_little_space(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    refuse(tmp_path, message=["fused: expected ", "bytes of free disk space, found 1,000"])


@pytest.mark.parametrize(
    "field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "model_type"]
)
def test_a_config_field_is_missing(source, tmp_path, field):
    edit_config(source, **{field: None})
    refuse(tmp_path, message=[f"config.json: {field}: expected ", "found "])


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"hidden_size": 64, "head_dim": 16}, "model.embed_tokens.weight"),
        ({"vocab_size": 62}, "model.embed_tokens.weight"),
        ({"num_hidden_layers": 4}, "model.layers.3.self_attn.q_proj.weight"),
        ({"num_hidden_layers": 2}, "model.layers.2."),
        ({"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj.weight"),
        ({"intermediate_size": 50}, "model.layers.0.mlp.gate_proj.weight"),
        ({"ffn_type": "mlp"}, "model.layers.0.mlp.gate_proj.weight"),
        ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias"),
        ({"tie_word_embeddings": True}, "lm_head.weight"),
        ({"stream_basis": "q"}, "model.layers.0.self_attn.q_proj.weight"),
        ({"attention_shaping": "value"}, "model.layers.0.self_attn.alpha"),
    ],
    ids=str,
)
def test_the_config_contradicts_the_tensors(source, tmp_path, changes, tensor):
    edit_config(source, **changes)
    refuse(tmp_path, message=[tensor, "expected", "config.json"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters.rope_type"),
        ({"rope_parameters": "x"}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta"),
        ({"hidden_act": "nonsense"}, "hidden_act: expected an activation"),
        (
            {"head_dim": 8, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}},
            "partial_rotary_factor",
        ),
        ({"num_hidden_layers": 1000}, "num_hidden_layers: expected at most 23, the number of tensors"),
        ({"model_type": ["skipless"]}, "model_type: expected one of skipless, "),
    ],
    ids=str,
)
def test_a_config_that_the_model_would_refuse(source, tmp_path, changes, message):
    edit_config(source, **changes)
    refuse(tmp_path, message=["config.json: ", message])


def test_unknown_engine(source, tmp_path):
    with pytest.raises(InputError, match="engine: expected one of local, ray, found 'other'"):
        fuse(source, tmp_path / "fused", engine="other")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_symlink_loop_and_a_folder_that_cannot_be_read(source, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    refuse(tmp_path, destination="loop", message="loop: expected a new folder")
    (tmp_path / "loop").unlink()
    (source / "LICENSE").symlink_to("nowhere")
    refuse(tmp_path, message="LICENSE: expected a file to copy, found a symlink to nowhere, which does not exist")


def test_unknown_field_and_unknown_value(source, tmp_path):
    edit_config(source, attention_sinks=3)
    refuse(tmp_path, message="config.json: attention_sinks: not a field of a skipless model")
    edit_config(source, attention_sinks=None, qk_norm="all")
    refuse(tmp_path, message="config.json: qk_norm: expected one of null, head_dim, heads; found 'all', not supported")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": ' * 100_000, "\xff"])
def test_config_is_not_a_json_object(source, tmp_path, text):
    (source / "config.json").write_text(text, encoding="latin-1")
    refuse(tmp_path, message=["config.json: expected ", "JSON"])


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"norm_type": "rms"}, ["the stream seam of layer 0 is blocked by norm_type 'rms'", "input_layernorm"]),
        (
            {"norm_type": "rms", "residual": "both"},
            ["the stream seam of layer 0 is blocked by residual 'both' and norm_type 'rms'", "skip connections join"],
        ),
    ],
    ids=str,
)
def test_norms_and_skips(source, tmp_path, changes, parts):
    edit_config(source, **changes)
    norms = [
        "model__norm",
        *(f"model__layers__{i}__{n}_layernorm" for i in range(3) for n in ("input", "post_attention")),
    ]
    edit_tensors(source, **{f"{norm}__weight": torch.ones(32) for norm in norms})
    refuse(tmp_path, message=parts)


def test_another_model_type(source, tmp_path):
    edit_config(source, model_type="t5")
    refuse(tmp_path, message=["model_type: expected one of skipless, ", "found 't5'", "docs/add-a-family.md"])


def test_q_and_p_of_a_parallel_model(tmp_path):
    save(build(block_type="parallel"), tmp_path / "source")
    both = ["ach of the 4 stream seams gives up hidden_size^2 = 1,024 weights", "not of both", "--parallel-removes"]
    refuse(tmp_path, "--remove", "p", message=["the p seam of layer 0 is blocked by block_type 'parallel'", *both])
    fused = CliRunner().invoke(cli.main, ["fuse", str(tmp_path / "source"), str(tmp_path / "fused")])
    assert fused.exit_code == 0
    assert all(part in fused.stdout.replace("\n", " ") for part in ("P stay", *both))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--remove", "stream,head,bias"),
            "remove: expected some of norms, stream, values, queries, p, head, first_layer; found 'bias'",
        ),
        (("--remove", "stream,values", "--basis", "v"), "basis: expected one without v with --remove stream,values"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(source, tmp_path, options, message):
    refuse(tmp_path, *options, message=message)


VALUE_ORDER = "model.layers.0.self_attn.value_order: expected at most the 4 bytes of the weights that it replaces"
COLUMN_ORDER = "lm_head.column_order: expected at most the 200 bytes of the weights that it replaces, found 320"


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"head_dim": 1, "position_type": "none"}, "values", VALUE_ORDER),
        ({"hidden_size": 10, "head_dim": 8, "vocab_size": 80}, "head", COLUMN_ORDER),
    ],
    ids=["values", "head"],
)
def test_a_result_that_would_be_larger(tmp_path, fields, kind, message):
    """It is refused by fuse, is not safe by audit, and is not counted by limit and count."""
    source = save(build(**fields), tmp_path / "source")
    refuse(tmp_path, "--remove", kind, "--dtype", "float16", message=message)
    audited = skipless.audit(source, remove=(kind,), dtype="float16")
    assert not audited.safe
    assert message in audited.problems[0]
    found = limit(Architecture.from_config(read_json_object(source / "config.json")))
    assert kind not in found.removed
    assert any(message in line for line in found.blocked)
    fp32, fp16 = (skipless.count(source, Conditions(dtype)).everything for dtype in ("float32", "float16"))
    plan = skipless.fuse(source, tmp_path / "fused", remove=(kind,), dtype="float32")
    assert fp32 - fp16 == plan.parameters[0] - plan.parameters[1]


def test_biases_that_would_be_more_than_p(tmp_path):
    experts = {"ffn_type": "moe", "num_local_experts": 16, "num_experts_per_tok": 2}
    save(build(**experts, attention_bias=True), tmp_path / "source")
    refuse(tmp_path, "--remove", "p", message=["expected fewer than 236,128 weights without p, found", "leave p out"])


def test_p_and_head_of_a_parallel_model(tmp_path):
    save(build(block_type="parallel", head_dim=12), tmp_path / "source")
    options = ("--remove", "p,head", "--parallel-removes", "p")
    refuse(tmp_path, *options, message="the head seam of layer 3 is blocked by --parallel-removes p")


def test_a_norm_named_twice(source, tmp_path):
    edit_config(source, norm_type="rms", norms=["model.norm", "model.norm"])
    refuse(tmp_path, message="norms: expected each norm once")


def test_rows_that_depend_on_each_other(source, tmp_path):
    edit_tensors(source, model__layers__1__self_attn__v_proj__weight=torch.ones(16, 32))
    message = ["model.layers.1.self_attn.v_proj.weight: expected 8 linearly independent inputs of head 0", "found inf"]
    refuse(tmp_path, "--remove", "values", message=message)


def test_a_basis_that_is_not_square(source, tmp_path):
    refuse(tmp_path, "--basis", "k", message=["expected a square projection, found k_proj (16, 32)", "--basis q"])


def test_nothing_left_to_remove(source, tmp_path):
    arguments = ["fuse", str(source), str(tmp_path / "once")]
    assert CliRunner().invoke(cli.main, arguments).exit_code == 0
    shutil.rmtree(source)
    (tmp_path / "once").rename(source)
    refuse(tmp_path, message="nothing to remove")
    refuse(tmp_path, "--basis", "k", message="basis: expected 'q', in which this model is already fused; found 'k'")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pth", "model.ckpt"])
def test_a_pickle_file_is_not_opened(source, tmp_path, name):
    (source / "model.safetensors").unlink()
    (source / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    refuse(tmp_path, message=[f"{name}: expected safetensors, found a pickle file", "save_pretrained"])


def test_no_weights_and_no_folder(source, tmp_path):
    (source / "model.safetensors").unlink()
    refuse(tmp_path, message="expected model.safetensors or model.safetensors.index.json, found neither")
    shutil.rmtree(source)
    refuse(tmp_path, message="source: expected a model folder, found nothing")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../outside.safetensors"}, "weight_map: expected safetensors files in this folder, found '../outside"),
        ({"a": "/etc/passwd"}, "weight_map: expected safetensors files in this folder"),
        ({"a": "model-00002-of-00002.safetensors"}, "expected a shard that model.safetensors.index.json names"),
        (
            {"a": "model-00001-of-00002.safetensors"},
            "a: expected in model-00001-of-00002.safetensors, as model.safetensors.index.json says",
        ),
        ({"a": 3}, "weight_map: expected safetensors files"),
        ([], "weight_map: expected tensor names and their files, found none"),
    ],
    ids=str,
)
def test_a_bad_index(source, tmp_path, weight_map, message):
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refuse(tmp_path, message=message)


def test_an_index_beside_a_whole_file(source, tmp_path):
    (source / "model.safetensors.index.json").write_text("{}")
    refuse(tmp_path, message="expected one of model.safetensors and model.safetensors.index.json, found both")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers-open", "x"], "--layers-open: expected layer numbers with commas between them, found 'x'"),
        (["--layers-open", "9"], "layers_open: expected layers 0..2, found 9"),
        (["--rest-dtype", "float32", "--basis", "q"], "rest_dtype: expected 'float32' with basis 'pivoted', found"),
        (["--device", "cuda:99"], "device: expected cpu or one of the CUDA devices that torch finds ("),
        (["--device", "tpu"], "found 'tpu'"),
        (["--device", "meta"], "found 'meta'"),
        (["--device", "cpu", "--layers-open", "9"], "layers_open: expected layers 0..2, found 9"),
        (["--max-shard-size", "5"], "--max-shard-size: expected a number and MB or GB, such as 5GB; found '5'"),
        (["--max-shard-size", "²GB"], "--max-shard-size: expected a number and MB or GB"),
        (["--max-shard-size", "9" * 400 + "GB"], "--max-shard-size: expected a number and MB or GB"),
        (["--max-shard-size", "0MB"], "--max-shard-size: expected a number and MB or GB"),
        (["--max-shard-size", "-1GB"], "--max-shard-size: expected a number and MB or GB"),
    ],
    ids=str,
)
def test_bad_options(source, tmp_path, arguments, message):
    refuse(tmp_path, *arguments, message=message)


def test_dry_run_refuses_the_same_and_writes_nothing(source, tmp_path):
    edit_tensors(source, **{Q1: None})
    refuse(tmp_path, "--dry-run", message=f"{Q1}: expected (32, 32)")

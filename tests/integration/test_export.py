"""What export refuses, in one line, and that DST appears whole or not at all."""

import json
import subprocess
import sys
import types

import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from safetensors import SafetensorError
from transformers import LlamaConfig, LlamaForCausalLM

import skipless
from skipless import InputError, cli
from skipless.errors import StorageError
from skipless.inference import save as save_model
from skipless.serving import export as room
from skipless.serving.decoder import load_decoder
from tests.models import build, contents, save


@pytest.fixture
def engine(monkeypatch):
    """A format that needs nothing installed: its `write` may be replaced."""
    engine = types.ModuleType("engine")
    engine.WEIGHTS = ("f32", "bf16")
    engine.write = lambda source, folder, weights: (folder / "model.bin").write_bytes(b"model")
    monkeypatch.setitem(sys.modules, "skipless.serving.engine", engine)
    monkeypatch.setitem(room.FORMATS, "openvino", "engine")
    return engine


def test_it_copies_what_is_not_weights(engine, source, tmp_path):
    (source / "tokenizer.json").write_text("{}")
    (source / "sub").mkdir()
    (source / "sub" / "LICENSE").write_text("free")
    found = room.export(source, tmp_path / "out", to="openvino")
    assert set(contents(tmp_path / "out" / "sub")) == {"LICENSE"}
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"model.bin", "config.json", "generation_config.json", "tokenizer.json", "sub"}
    assert found.bytes == sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.*")) + len("free")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_what_killed_processes_have_left_goes(engine, source, tmp_path):
    """And what living ones hold, or what is not ours, stays."""
    left, held, other = (tmp_path / f".out{name}" for name in (".export-a", ".export-b", ".export-c"))
    for folder in (left, held, other):
        folder.mkdir()
        (folder / "file").write_text("something")
    (left / "lock").touch()
    with FileLock(held / "lock"):
        room.export(source, tmp_path / "out", to="openvino")
        assert not left.exists()
        assert (held / "file").exists()
        assert (other / "file").exists()


def test_the_command(engine, source, tmp_path):
    arguments = ["export", str(source), str(tmp_path / "a"), "--to", "openvino", "--weights", "bf16"]
    result = CliRunner().invoke(cli.main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["to"], found["weights"], found["destination"]) == ("openvino", "bf16", str(tmp_path / "a"))
    arguments[2] = str(tmp_path / "b")
    assert "wrote" in CliRunner().invoke(cli.main, arguments).stdout
    again = CliRunner().invoke(cli.main, arguments)
    assert again.exit_code == 2
    assert again.stderr.count("\n") == 1
    assert "expected a new folder, found one that exists" in again.stderr


@pytest.mark.parametrize(
    ("basis", "dtype", "weights", "advice"),
    [
        ("q", "float32", "int8", "--basis pivoted"),
        ("q", "bfloat16", "int8", "--basis pivoted"),
        ("q", "float32", "bf16", "--dtype, which makes up for rounding, or with --basis pivoted"),
        ("q", "bfloat16", "bf16", None),
        ("q", "float32", "f32", None),
        ("pivoted", "float32", "int8", None),
    ],
)
def test_it_warns_where_rounding_would_be_multiplied(engine, source, tmp_path, caplog, basis, dtype, weights, advice):
    engine.WEIGHTS = ("f32", "bf16", "int8")
    skipless.fuse(source, tmp_path / "fused", basis=basis, dtype=dtype)
    caplog.clear()
    room.export(tmp_path / "fused", tmp_path / "out", to="openvino", weights=weights)
    messages = [record.getMessage() for record in caplog.records]
    expected = f"stream_basis: fused by q, this model may multiply what rounding to {weights} adds until it is lost"
    assert messages == ([f"{expected}; fuse the original with {advice}"] if advice else [])


@pytest.mark.parametrize("error", [InputError("no"), KeyboardInterrupt(), OSError("no space"), ZeroDivisionError()])
def test_whatever_comes_between_nothing_is_left(engine, source, tmp_path, error):
    def write(source, folder, weights):
        (folder / "model.bin").write_bytes(b"half")
        raise error

    engine.write = write
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(type(error)):
        room.export(source, tmp_path / "out", to="openvino")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "tflite"}, "to: expected one of openvino, onnx, gguf, mlx, executorch, found 'tflite'"),
        ({"weights": "int2"}, "weights: expected one of f32, bf16 for openvino, found 'int2'"),
        ({"source": "none"}, "none: expected a model folder, found nothing"),
        ({"destination": "source/out"}, "expected a folder outside the source"),
        ({"destination": "no/out"}, "expected an existing folder to write into, found none; create it"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line(engine, source, tmp_path, options, message):
    options = {"source": "source", "destination": "out", "to": "openvino", "weights": "f32", **options}
    source, destination = (tmp_path / options.pop(name) for name in ("source", "destination"))
    with pytest.raises(InputError, match=message) as error:
        room.export(source, destination, **options)
    assert "\n" not in str(error.value)
    assert not destination.exists()


@pytest.mark.parametrize(("to", "package"), [("openvino", "openvino"), ("onnx", "onnxscript"), ("gguf", "gguf")])
def test_what_is_not_installed_is_named(source, tmp_path, monkeypatch, to, package):
    monkeypatch.delitem(sys.modules, f"skipless.serving.{room.FORMATS[to]}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"expected the \[{to}\] extra, found no {package}; pip install 'skipless\[{to}\]'"
    with pytest.raises(InputError, match=message):
        room.export(source, tmp_path / "out", to=to)


def test_other_models_are_refused(tmp_path):
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(InputError, match="expected a skipless model, found model_type 'llama'"):
        load_decoder(tmp_path / "llama", torch.float32)


@pytest.mark.slow
def test_no_engine_is_imported_before_it_is_used():
    code = "import sys, skipless.cli, skipless.serving.export, skipless.serving.decoder; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"openvino", "nncf", "onnx", "onnxscript", "onnxruntime", "gguf", "mlx", "executorch"} & set(
        found.stdout.split()
    )


@pytest.mark.parametrize("number", [1e5, float("nan")])
def test_numbers_that_do_not_fit_are_refused(tmp_path, number):
    model = build(dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[3, 4] = number
    source = save(model, tmp_path / "source")
    with pytest.raises(
        InputError, match=r"lm_head\.weight: expected numbers that float16 holds, found NaN or infinity"
    ):
        load_decoder(source, torch.float16)
    if number == 1e5:
        load_decoder(source, torch.bfloat16)


def test_a_full_disk_is_no_bug(tmp_path, monkeypatch):
    model = build(dtype=torch.float32)

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(StorageError, match="could not be written: I/O error: No space left"):
        save_model(model, tmp_path)


def test_what_export_cannot_copy_it_does_not_advise_on(engine, source, tmp_path, caplog):
    (source / "notes.xyz").write_text("mine")
    room.export(source, tmp_path / "out", to="openvino")
    assert "not copied: notes.xyz" in caplog.text
    assert "--copy" not in caplog.text

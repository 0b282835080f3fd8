"""An engine, and a format to export to, are a module and an entry each: those that the page about it shows."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import skipless
from skipless.serving import engines
from skipless.serving.bench import Work, measure
from skipless.serving.export import export
from skipless.serving.worker import runner
from tests.models import build, save
from tests.pages import module


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An original and what fuse makes of it."""
    folder = tmp_path_factory.mktemp("models")
    source = save(build(dtype=torch.float32), folder / "original")
    skipless.fuse(source, folder / "fused")
    return source, folder / "fused"


@pytest.fixture(autouse=True)
def _added(monkeypatch):
    """The page's modules and its entries, while a test runs."""
    for name in ("cacheless", "numpy_archive"):
        shown = module("add-an-engine", f"serving/{name}.py")
        monkeypatch.setitem(sys.modules, f"skipless.serving.{name}", shown)
    monkeypatch.setitem(engines.ENGINES, "cacheless", None)
    monkeypatch.setitem(engines.FORMATS, "numpy", None)
    module("add-an-engine", "serving/engines.py", **vars(engines))


def test_an_engine_is_one_module_and_its_entry(folders):
    models = [(folder.name, runner("cacheless", folder, "float32", False)) for folder in folders]
    found = measure(models, Work(context=5, tokens=3, prefill=8), rounds=2)
    assert [speed.name for speed in found.speeds] == ["original", "fused"]
    assert found.broken_caches == {}
    for (_, model), folder in zip(models, folders, strict=True):
        assert model.bytes_per_token == runner("torch", folder, "float32", False).bytes_per_token
    with pytest.raises(skipless.InputError, match="at most 64 together"):
        models[0][1].generate(1, 63, 2)


def test_a_format_is_one_module_and_its_entry(folders, tmp_path):
    source, fused = folders
    assert export(fused, tmp_path / "exported", to="numpy").weights == "f32"
    with np.load(tmp_path / "exported" / "model.npz") as found:
        expected = load_file(fused / "model.safetensors")
        assert {name: array.shape for name, array in found.items()} == {
            name: tuple(tensor.shape) for name, tensor in expected.items()
        }
        assert all(np.array_equal(found[name], tensor.numpy()) for name, tensor in expected.items())
    assert (tmp_path / "exported" / "config.json").read_bytes() == (fused / "config.json").read_bytes()
    with pytest.raises(skipless.InputError, match="weights: expected one of f32 for numpy, found 'int8'"):
        export(source, tmp_path / "other", to="numpy", weights="int8")
    assert not (tmp_path / "other").exists()

"""An exported ONNX graph is the same function in ONNX Runtime."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import skipless
from skipless.bundled import BUNDLED
from skipless.cli.demo import PROMPT
from skipless.serving.export import export
from tests.exports import Padded, case, documented, greedy
from tests.models import edit_tensors, load
from tests.tolerances import FP32

onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install 'skipless[onnx]'")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'skipless[onnx]'")

from skipless.serving import onnx as room  # noqa: E402


class Session:
    """A graph and its cache."""

    def __init__(self, folder, cache):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / room.MODEL, options)
        self.cache = cache

    def step(self, inputs):
        logits, *cache = self.session.run(None, {**inputs, **self.cache})
        self.cache = dict(zip(self.cache, cache, strict=True))
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parallel, learned positions", "experts, everything"])
def test_the_same_logits_step_by_step(name, tmp_path):
    source = case(name, tmp_path)
    export(source, tmp_path / "exported", to="onnx")
    padded = Padded(source)
    session = Session(tmp_path / "exported", padded.cache())
    found = [session.step(padded.inputs(*step)) for step in [(0, 6), (6, 7), (7, 9)]]
    assert padded.error(np.concatenate(found, 1)) <= FP32


@pytest.mark.slow
def test_what_the_docs_show_and_not_with_a_spoiled_weight(tmp_path, capsys):
    """Stored in bf16: exactly the bundled model's weights, at half the size."""
    export(BUNDLED, tmp_path / "exported", to="onnx", weights="bf16")
    assert (tmp_path / "exported" / "model.onnx.data").stat().st_size < 9.3e6
    assert (tmp_path / "exported" / "tokenizer.json").exists()
    exec(documented("serving", "ONNX", tmp_path / "exported"), {})
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    text = tokenizer.decode([*ids[0].tolist(), *greedy(BUNDLED, ids, 64)])
    assert capsys.readouterr().out == text + "\n"

    skipless.fuse(BUNDLED, tmp_path / "spoiled", dtype="float32")
    weights = load(BUNDLED, torch.float32).lm_head.weight
    edit_tensors(tmp_path / "spoiled", lm_head__weight=1.05 * weights.detach())
    padded = Padded(tmp_path / "spoiled")
    session = Session(tmp_path / "exported", padded.cache())
    assert padded.error(session.step(padded.inputs(0, 9))) > 10 * FP32

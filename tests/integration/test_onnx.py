"""An exported ONNX graph is the same function in ONNX Runtime, and in onnxruntime-genai."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import skipless
from skipless.bundled import BUNDLED
from skipless.cli.demo import PROMPT
from skipless.serving.decoder import cache_names
from skipless.serving.decoding import bytes_per_token
from skipless.serving.export import export
from tests.exports import Padded, case, documented, greedy
from tests.models import build, edit_tensors, load
from tests.tolerances import FP32

onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install 'skipless[onnx]'")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'skipless[onnx]'")
genai = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai: pip install 'skipless[onnx]'")

from skipless.serving import onnx as room  # noqa: E402
from skipless.serving.onnx_genai import Runner  # noqa: E402


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


def genai_tokens(folder, prompts, tokens):
    """What onnxruntime-genai's own search adds to prompts of ids, the shorter of which are padded on the right."""
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    length = prompts.shape[1] + tokens
    params.set_search_options(batch_size=len(prompts), min_length=length, max_length=length)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompts.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[prompts.shape[1] :].tolist() for row in range(len(prompts))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parallel, learned positions", "experts, everything"])
def test_the_same_logits_step_by_step_and_the_same_tokens(name, tmp_path):
    source = case(name, tmp_path)
    export(source, tmp_path / "exported", to="onnx")
    padded = Padded(source)
    session = Session(tmp_path / "exported", padded.cache())
    found = [session.step(padded.inputs(*step)) for step in [(0, 6), (6, 7), (7, 9)]]
    assert padded.error(np.concatenate(found, 1)) <= FP32
    expected = [greedy(source, row[None], 12) for row in padded.ids]
    assert genai_tokens(tmp_path / "exported", padded.ids, 12) == expected
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    names = cache_names(padded.model.config, "past_key_values")  # as transformers.js makes them, of config.json
    assert len(names) == 2 * config["num_hidden_layers"]
    shapes = {port.name: port.shape for port in session.session.get_inputs()}
    cached = ["batch_size", config["num_key_value_heads"], "past_sequence_length", config["head_dim"]]
    assert all(shapes[name] == cached for name in names)


@pytest.mark.slow
def test_what_the_docs_show_and_not_with_a_spoiled_weight(tmp_path, capsys):
    """Stored in bf16: exactly the bundled model's weights, at half the size."""
    exported = tmp_path / "exported"
    export(BUNDLED, exported, to="onnx", weights="bf16")
    assert (exported / "onnx" / "model.onnx_data").stat().st_size < 9.4e6
    assert (exported / "tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    tokens = greedy(BUNDLED, ids, 64)
    for block in documented("serving", "ONNX", exported):
        exec(block, {})
        assert capsys.readouterr().out == tokenizer.decode([*ids[0].tolist(), *tokens]) + "\n"

    other = tokenizer("def f(x):\n", return_tensors="pt").input_ids
    prompts = torch.cat((ids, torch.nn.functional.pad(other, (0, ids.shape[1] - other.shape[1]))))
    assert genai_tokens(exported, prompts, 20) == [tokens[:20], greedy(BUNDLED, other, 20)]
    runner = Runner(exported)
    assert [batch.tolist() for batch in runner.decode(ids[0].tolist(), 2, 12)] == [[token] * 2 for token in tokens[:12]]
    times = runner.generate(1, 7, 5)
    assert len(times) == 5
    assert 0 < times[0] < times[-1]
    assert runner.broken_cache(7, 5) is None
    weights = bytes_per_token(load(BUNDLED, torch.float32))
    assert weights <= runner.bytes_per_token < 1.01 * weights  # widened, and constants such as RoPE's frequencies

    skipless.fuse(BUNDLED, tmp_path / "spoiled", dtype="float32")
    weights = load(BUNDLED, torch.float32).lm_head.weight
    edit_tensors(tmp_path / "spoiled", lm_head__weight=1.05 * weights.detach())
    padded = Padded(tmp_path / "spoiled")
    session = Session(exported, padded.cache())
    assert padded.error(session.step(padded.inputs(0, 9))) > 10 * FP32


def test_what_genai_is_told_of_tokens():
    """It takes 0 for what it is not told; of several ends of a text, the first pads."""
    model = build()
    assert "eos_token_id" not in room.genai(model)["model"]
    model.generation_config.eos_token_id = [7, 5]
    assert room.genai(model)["model"]["eos_token_id"] == [7, 5]
    assert room.genai(model)["model"]["pad_token_id"] == 7
    model.generation_config.pad_token_id = 3
    assert room.genai(model)["model"]["pad_token_id"] == 3
    assert "bos_token_id" not in room.genai(model)["model"]

"""An exported IR is the same function, in OpenVINO's runtime and in openvino-genai's pipeline."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import skipless
from skipless.bundled import BUNDLED
from skipless.checkpoint.reader import CheckpointReader
from skipless.cli.demo import PROMPT
from skipless.errors import InputError, StorageError
from skipless.serving.decoding import bytes_per_token
from skipless.serving.export import export
from tests.exports import CASES, Padded, case, documented, greedy, relative_error
from tests.models import edit_tensors, load
from tests.tolerances import FP32, HALF

openvino = pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'skipless[openvino]'")
genai = pytest.importorskip("openvino_genai", reason="needs openvino-genai: pip install 'skipless[openvino]'")

from skipless.serving import openvino as room  # noqa: E402

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
TOKENS = 48


def compiled(model, **options):
    return openvino.Core().compile_model(model, "CPU", {**EXACT, **options}).create_infer_request()


def pipeline_tokens(folder, ids, tokens, **options):
    pipeline = genai.LLMPipeline(str(folder), "CPU", **EXACT, **options)
    config = genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
    return list(pipeline.generate(openvino.Tensor(ids.numpy()), config).tokens[0])


@pytest.fixture(scope="module")
def prompt():
    return AutoTokenizer.from_pretrained(BUNDLED)(PROMPT, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    """The bundled model without Q and P, in fp32."""
    folder = tmp_path_factory.mktemp("openvino") / "fused"
    skipless.fuse(BUNDLED, folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def exported(fused):
    export(fused, fused.parent / "exported", to="openvino")
    return fused.parent / "exported"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer_gives_the_same_logits_and_tokens(name, tmp_path):
    source = case(name, tmp_path)
    export(source, tmp_path / "exported", to="openvino")
    padded, request = Padded(source), compiled(tmp_path / "exported" / room.MODEL)
    rows = {"beam_idx": np.arange(3, dtype=np.int32)}
    steps = [(0, 6), (6, 7), (7, 9)]
    found = [request.infer({**padded.inputs(*step), **rows})["logits"].copy() for step in steps]
    assert padded.error(np.concatenate(found, 1)) <= FP32
    ids = padded.ids[:1]
    assert pipeline_tokens(tmp_path / "exported", ids, 12) == greedy(source, ids, 12)


@pytest.mark.slow
def test_the_pipeline_writes_what_huggingface_does(exported, prompt):
    tokens = greedy(BUNDLED, prompt, TOKENS)
    text = AutoTokenizer.from_pretrained(BUNDLED).decode(tokens)
    pipeline = genai.LLMPipeline(str(exported), "CPU", **EXACT)
    assert str(pipeline.generate(PROMPT, max_new_tokens=TOKENS, ignore_eos=True)) == text
    assert pipeline_tokens(exported, prompt, TOKENS, ATTENTION_BACKEND="SDPA") == tokens


@pytest.mark.slow
def test_what_the_docs_show(exported, prompt, capsys):
    (block,) = documented("serving", "OpenVINO", exported)
    exec(block, {})
    text = AutoTokenizer.from_pretrained(BUNDLED).decode(greedy(BUNDLED, prompt, 64))
    assert capsys.readouterr().out.strip() == text.strip()


@pytest.mark.slow
def test_a_spoiled_weight_is_noticed(fused, tmp_path):
    skipless.fuse(BUNDLED, tmp_path / "spoiled", dtype="float32")
    name = "model.layers.3.self_attn.rest_proj.weight"
    edit_tensors(tmp_path / "spoiled", **{name: 1.05 * CheckpointReader(fused).tensor(name)})
    padded, request = Padded(fused), compiled(room.convert(tmp_path / "spoiled"))
    found = request.infer({**padded.inputs(0, 9), "beam_idx": np.arange(3, dtype=np.int32)})["logits"]
    assert padded.error(found) > 10 * FP32


@pytest.mark.slow
def test_beam_idx_takes_the_rows_of_the_cache(exported, fused):
    padded, request = Padded(fused), compiled(exported / room.MODEL)
    order = np.array([2, 2, 0], dtype=np.int32)
    request.infer({**padded.inputs(0, 5), "beam_idx": np.arange(3, dtype=np.int32)})
    step = padded.inputs(5, 6)
    step = {name: values[order] for name, values in step.items()}
    found = request.infer({**step, "beam_idx": order})["logits"]
    expected = padded.logits[order.tolist(), 5:6]
    assert relative_error(torch.from_numpy(found), expected).max() <= FP32
    request.reset_state()
    request.infer({**padded.inputs(0, 5), "beam_idx": np.arange(3, dtype=np.int32)})
    unordered = request.infer({**step, "beam_idx": np.arange(3, dtype=np.int32)})["logits"]
    assert relative_error(torch.from_numpy(unordered), expected).max() > 10 * FP32


@pytest.mark.slow
def test_bf16_loses_what_bf16_loses(tmp_path):
    skipless.fuse(BUNDLED, tmp_path / "fused")
    padded = Padded(tmp_path / "fused")
    with torch.no_grad():
        half = load(tmp_path / "fused", torch.bfloat16)
        own = padded.error(half(padded.ids, padded.mask, padded.positions).logits.float().numpy())
    model = room.convert(tmp_path / "fused", "bf16")
    inputs = {**padded.inputs(0, 9), "beam_idx": np.arange(3, dtype=np.int32)}
    assert padded.error(compiled(model).infer(inputs)["logits"]) <= FP32  # stored so, and nothing else
    found = compiled(model, INFERENCE_PRECISION_HINT="bf16").infer(inputs)["logits"]
    assert FP32 < padded.error(found) <= HALF * own
    stored = [
        CheckpointReader(tmp_path / "fused").tensor(name) for name in CheckpointReader(tmp_path / "fused").tensors
    ]
    stored = {tensor.view(torch.uint8).numpy().tobytes() for tensor in stored}
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    weights = [node for node in constants if node.get_element_type() == openvino.Type.bf16]
    assert len(weights) >= 40
    assert all(np.array(node.data).tobytes() in stored for node in weights)  # although torch's memory has gone
    halved = room.bytes_per_token(model) / bytes_per_token(load(tmp_path / "fused", torch.float32))
    assert 0.5 <= halved < 0.51


def rounded(model, bits, group):
    """Each `group` of a row (None: all of it; fewer, if they must divide it) of each matrix rounded to multiples of a
    scale, plainly.
    """
    tables = (model.model.embed_tokens, model.lm_head)
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            continue
        whole = group is None or module in tables
        size = module.weight.shape[1] if whole else math.gcd(module.weight.shape[1], group)
        weight = module.weight.data.unflatten(1, (-1, size))
        levels = 2 ** (8 if whole else bits) - 1
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
        if not whole:  # symmetric
            high = weight.abs().amax(-1, keepdim=True)
            low = -high
        scale = (high - low) / levels
        module.weight.data = (((weight - low) / scale).round() * scale + low).flatten(1)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "bits", "group"), [("int8", 8, None), ("int4", 4, 128)])
def test_integers_lose_what_rounding_loses(weights, bits, group):
    padded, model = Padded(BUNDLED), room.convert(BUNDLED, weights)
    with torch.no_grad():
        plain = rounded(load(BUNDLED, torch.float32), bits, group)
        own = padded.error(plain(padded.ids, padded.mask, padded.positions).logits.numpy())
    exact = {"KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    inputs = {**padded.inputs(0, 9), "beam_idx": np.arange(3, dtype=np.int32)}
    found = padded.error(compiled(model, **exact).infer(inputs)["logits"])
    assert own / HALF <= found <= HALF * own


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "rest", "others"), [("int8", "bf16", "u8"), ("int4", "u8", "i4")])
def test_the_rest_has_twice_the_bits(weights, rest, others, fused):
    constants = [node for node in room.convert(fused, weights).get_ops() if node.get_type_name() == "Constant"]
    for name, expected in (("rest_proj", rest), ("down_proj", others)):
        found = [node for node in constants if name in node.get_friendly_name()]
        largest = max(np.prod(node.shape) for node in found)
        assert {n.get_element_type().get_type_name() for n in found if np.prod(n.shape) == largest} == {expected}, name


@pytest.mark.slow
def test_the_runner_decodes_and_counts(fused, exported, prompt):
    """Also batches, an exported folder, and what a token reads."""
    expected = greedy(BUNDLED, prompt, 12)
    read = {}
    for folder in (BUNDLED, fused, exported):
        runner = room.Runner(folder, "float32")
        found = [token.tolist() for token in runner.decode(prompt[0].tolist(), 2, 12)]
        assert found == [[token, token] for token in expected]
        times = runner.generate(1, 7, 5)
        assert len(times) == 5
        assert 0 < times[0] < times[-1]
        assert runner.broken_cache(7, 5) is None
        read[folder] = runner.bytes_per_token
    assert read[fused] == read[exported]
    for folder in (BUNDLED, fused):  # besides constants such as RoPE's frequencies
        weights = bytes_per_token(load(folder, torch.float32))
        assert weights <= read[folder] < 1.01 * weights
    with pytest.raises(skipless.InputError, match="precision: expected one of float32, bfloat16, int8, int4 for"):
        room.Runner(BUNDLED, "float64")


@pytest.mark.slow
def test_the_runner_computes_as_decoding_asks():
    hint, group = "INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE"

    def found(precision, name):
        return room.Runner(BUNDLED, precision)._request.get_compiled_model().get_property(name)

    assert found("bfloat16", hint) == openvino.Type.f32
    assert found("int8", group) == 0
    assert found("int4", group) != 0


@pytest.mark.slow
def test_a_full_disk_is_said_in_one_line(exported, tmp_path):
    model = openvino.Core().read_model(exported / room.MODEL)
    with pytest.raises(StorageError, match=r"model.xml: could not be written: .*; nothing was left behind"):
        room.save(model, tmp_path / "none\0" / "model.xml")


def test_a_tokenizer_that_it_cannot_convert_is_named_before_the_model_is_converted(tmp_path, monkeypatch):
    import openvino_tokenizers

    def refuse(*_, **__):
        raise NotImplementedError("Nmt")

    monkeypatch.setattr(openvino_tokenizers, "convert_tokenizer", refuse)
    monkeypatch.setattr(room, "convert", None)
    with pytest.raises(InputError, match=r"expected a tokenizer that openvino_tokenizers converts, found .*: Nmt"):
        export(BUNDLED, tmp_path / "out", to="openvino")
    assert not (tmp_path / "out").exists()

"""llama.cpp, with the architecture of integrations/llama.cpp, says what transformers says, of every form."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

if "LLAMA_CPP" not in os.environ:
    pytest.skip("needs a llama.cpp of its own: `make test-llama-cpp` builds it", allow_module_level=True)

from llama_cpp import Llama

import skipless
from skipless.bundled import BUNDLED
from skipless.inference import load_tokenizer
from skipless.serving.export import export
from tests.exports import greedy, relative_error
from tests.gguf_forms import FORMS, form, with_another
from tests.integration.test_gguf import TOKENIZERS
from tests.models import build, load, random_ids, save

PROGRAMS = Path(os.environ["LLAMA_CPP"]).absolute()
PROMPT, TOKENS = 13, 11
# By how much logits differ, relative to the largest of a token: the order of sums in fp32; and GELU by tanh, which
# llama.cpp looks up in a table in fp16.
NEAR, TABLE = 3e-5, 1e-2
# What rounds by default: the cache, and flash attention, which keeps values in fp16.
IN_FP32 = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
TEXT = Path(skipless.inference.__file__).read_text()


def exported(source, folder):
    export(source, folder, to="gguf")
    return folder / "model.gguf"


def run(program, *arguments):
    command = [str(PROGRAMS / program), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert found.returncode == 0, found.stderr[-3000:]
    return found


def logits(file, ids):
    """Of each of these tokens (T,): a prompt, 8 at a time, then the others one by one."""
    model = Llama(
        str(file), n_ctx=64, n_batch=8, n_threads=1, n_threads_batch=1, logits_all=True, flash_attn=False, type_k=0,
        type_v=0, verbose=False,
    )  # fmt: skip
    for given in (ids[:PROMPT], *ids[PROMPT:].split(1)):
        model.eval(given.tolist())
    found = torch.from_numpy(model._scores.copy())
    model.close()
    return found


def compared(source, file):
    """transformers' greedy tokens after a prompt, what llama.cpp would have said for each of them, and the largest
    error of its logits.
    """
    ids = random_ids(load(source, torch.float32), batch=1, length=PROMPT)
    tokens = greedy(source, ids, TOKENS)
    ids = torch.cat((ids[0], torch.tensor(tokens)))
    found = logits(file, ids)
    with torch.no_grad():
        expected = load(source, torch.float32)(ids[None]).logits[0]
    return tokens, found[PROMPT - 1 : -1].argmax(-1).tolist(), relative_error(found, expected).max().item()


@pytest.mark.parametrize("name", FORMS)
def test_it_says_what_transformers_says(name, tmp_path):
    source = form(name, tmp_path)
    tokens, found, error = compared(source, exported(source, tmp_path / "out"))
    assert found == tokens
    assert error < (TABLE if name == "gelu by tanh" else NEAR)


@pytest.mark.parametrize(
    ("name", "spoilt"),
    [
        ("values and head", "0.self_attn.column_order"),
        ("values and head", "lm_head.column_order"),
        ("values and head", "1.self_attn.value_order"),
        ("queries", "1.self_attn.key_order"),
        ("queries, a part rotated", "1.self_attn.k_rope_proj.weight"),
        ("wide heads", "1.self_attn.row_order"),
        ("pivoted", "0.self_attn.rest_proj.weight"),
        ("shaped", "1.self_attn.alpha"),
        ("tied, folded biases", "embed_tokens.bias"),
        ("experts, folded biases, all removed", "1.mlp.router.bias"),
    ],
)
def test_it_would_not_if_a_tensor_were_another(name, spoilt, tmp_path):
    source = form(name, tmp_path)
    other = with_another(spoilt, source, tmp_path / "other")
    assert compared(source, exported(other, tmp_path / "out"))[-1] > 100 * NEAR


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """The bundled model, original and fused, as f32 files."""
    folder = tmp_path_factory.mktemp("bundled")
    skipless.fuse(BUNDLED, folder / "fused", dtype="float32")
    sources = {"original": BUNDLED, "fused": folder / "fused"}
    return {name: exported(source, folder / f"{name}-gguf") for name, source in sources.items()}


def perplexity(file, text):
    """Of a text, as llama-perplexity says it; asked again where it ends before its log has said so."""
    for _ in range(5):
        found = run("llama-perplexity", "--model", file, "--file", text, "--ctx-size", 256, "--threads", 1, *IN_FP32)
        if said := re.search(r"PPL = ([\d.]+)", found.stdout + found.stderr):
            return float(said[1])
    raise AssertionError(found.stderr)


def test_perplexity_of_what_llama_quantize_makes(bundled, tmp_path):
    text = tmp_path / "text"
    text.write_text(TEXT)
    found = {name: perplexity(file, text) for name, file in bundled.items()}
    assert found["fused"] == pytest.approx(found["original"], rel=1e-3)
    for name, file in bundled.items():
        for kind, most in (("Q8_0", 1.02), ("Q4_K_M", 1.5)):
            quantized = tmp_path / f"{name}-{kind}.gguf"
            run("llama-quantize", file, quantized, kind, 1)
            assert quantized.stat().st_size < file.stat().st_size / 3
            assert 1e-5 < abs(perplexity(quantized, text) / found[name] - 1) < most - 1


@pytest.mark.parametrize("weights", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_perplexity_of_what_export_rounds(weights, bundled, tmp_path):
    text = tmp_path / "text"
    text.write_text(TEXT)
    most = 1.02 if weights == "q8_0" else 1.5
    export(bundled["fused"].parents[1] / "fused", tmp_path / "out", to="gguf", weights=weights)
    found = perplexity(tmp_path / "out" / "model.gguf", text) / perplexity(bundled["fused"], text)
    assert 1e-5 < abs(found - 1) < most - 1


def test_the_importance_matrix(bundled, tmp_path):
    text, matrix, quantized = (tmp_path / name for name in ("text", "matrix.gguf", "quantized.gguf"))
    text.write_text(TEXT)
    options = ("--file", text, "--output-file", matrix, "--ctx-size", 256, "--threads", 1)
    run("llama-imatrix", "--model", bundled["fused"], *options)
    found = run("llama-quantize", "--imatrix", matrix, bundled["fused"], quantized, "Q4_K_M", 1)
    without = set(re.findall(r"did not find weights for (\S+)", found.stdout + found.stderr))
    assert without <= {"token_embd.weight", "output.weight"}  # of any model
    assert perplexity(quantized, text) < 1.5 * perplexity(bundled["fused"], text)


def test_text_in_text_out(bundled):
    """The tokenizer and the model together: what transformers writes after a prompt."""
    prompt, tokenizer = "class Stack:\n    def get(self", load_tokenizer(BUNDLED)
    expected = tokenizer.decode(greedy(BUNDLED, tokenizer(prompt, return_tensors="pt").input_ids, 24))
    options = ("--no-conversation", "--no-display-prompt", "--temp", "0", "--predict", 32, "--threads", 1)
    for file in bundled.values():
        found = run("llama-completion", "--model", file, "--prompt", prompt, *options, *IN_FP32)
        assert found.stdout.startswith(expected)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(name, tmp_path):
    source = TOKENIZERS[name](save(build(vocab_size=700), tmp_path / "source"))
    file = exported(source, tmp_path / "out")
    tokenizer = load_tokenizer(source)
    for number, text in enumerate((TEXT, "Hello  world\n\n\t12345 it's déjà-vu… 日本語 🦙\r\n", " leading", "")):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(text.encode())
        found = run("llama-tokenize", "--model", file, "--file", path, "--ids", "--log-disable").stdout
        assert json.loads(found) == tokenizer(text).input_ids


def test_a_file_cut_short_is_refused(tmp_path):
    file = exported(form("q", tmp_path), tmp_path / "out")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="Failed to load model"):
        logits(file, torch.arange(20))

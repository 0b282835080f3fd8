"""ExecuTorch says what transformers says, step by step and in its own runner of language models."""

import shutil

import pytest
import torch

pytest.importorskip("executorch.runtime", reason="needs ExecuTorch: `make test-executorch` installs it")

from executorch.runtime import Runtime

import skipless
from skipless import InputError
from skipless.bundled import BUNDLED
from skipless.cli.demo import PROMPT
from skipless.inference import load_tokenizer
from skipless.serving.executorch import MODEL
from skipless.serving.export import export
from tests.exports import documented, greedy, relative_error
from tests.gguf_forms import EXPERTS, PIVOTED, SIZES, form
from tests.models import build, edit_tensors, load, random_ids, save
from tests.tolerances import FP32

pytestmark = pytest.mark.slow
LENGTH, TOKENS = 13, 11
FORMS = (
    "q", "parallel, pivoted, biases", "values and head", "wide heads", "tied, folded biases", "alibi, six heads",
    "shaped, pivoted", "norms and skips",
)  # fmt: skip


def said(folder, ids):
    """Logits of the last of each few tokens given, and the greedy tokens after all."""
    method = Runtime.get().load_program(folder / MODEL).load_method("forward")
    logits = []
    for start, stop in ((0, 5), (5, 11), (11, 12), (12, LENGTH)):
        logits.append(method.execute([ids[:, start:stop].contiguous(), torch.tensor([start])])[0][0].clone())
    last, tokens = logits[-1], []
    for place in range(LENGTH, LENGTH + TOKENS):
        tokens.append(last.argmax(-1))
        last = method.execute([tokens[-1][None], torch.tensor([place])])[0][0].clone()
    return torch.cat(logits), [token.item() for token in tokens]


def compared(source, folder):
    """By how much logits differ from transformers', relative to a token's largest; its greedy tokens; transformers'."""
    model = load(source, torch.float32)
    ids = random_ids(model, batch=1, length=LENGTH)
    logits, tokens = said(folder, ids)
    with torch.no_grad():
        expected = model(ids).logits[0, [4, 10, 11, 12]]
    return relative_error(logits, expected).max().item(), tokens, greedy(source, ids, TOKENS)


@pytest.mark.parametrize("name", [*FORMS, "a window"])
def test_it_says_what_transformers_says(name, tmp_path):
    if name == "a window":
        source = save(build(dtype=torch.float32, **SIZES, **PIVOTED, sliding_window=4), tmp_path / "source")
    else:
        source = form(name, tmp_path)
    export(source, tmp_path / "out", to="executorch")
    error, tokens, expected = compared(source, tmp_path / "out")
    assert tokens == expected
    assert error < FP32


def test_it_would_not_if_a_tensor_were_another(tmp_path):
    source = form("values and head", tmp_path)
    other = shutil.copytree(source, tmp_path / "other")
    order = load(source, torch.float32).lm_head.column_order
    edit_tensors(other, lm_head__column_order=order.roll(1))
    export(other, tmp_path / "out", to="executorch")
    assert compared(source, tmp_path / "out")[0] > 10 * FP32


def test_what_the_docs_show(tmp_path, capsys):
    skipless.fuse(BUNDLED, tmp_path / "fused", dtype="float32")
    export(tmp_path / "fused", tmp_path / "out", to="executorch")
    (block,) = documented("serving", "ExecuTorch", tmp_path / "out")
    exec(block, {})
    tokenizer = load_tokenizer(BUNDLED)
    expected = tokenizer.decode(greedy(BUNDLED, tokenizer(PROMPT, return_tensors="pt").input_ids, 24))
    assert capsys.readouterr().out == expected


def test_experts_are_refused(tmp_path):
    source = save(build(**EXPERTS), tmp_path / "source")
    with pytest.raises(InputError, match=r"config.json: ffn_type: expected 'mlp' or 'glu' for executorch") as error:
        export(source, tmp_path / "out", to="executorch")
    assert "\n" not in str(error.value)
    assert {file.name for file in tmp_path.iterdir()} == {"source"}

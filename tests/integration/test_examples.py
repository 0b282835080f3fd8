"""The figures of the paper and the simplified blocks of He & Hofmann, as configs: they run, generate and learn."""

import json
from pathlib import Path

import pytest
import torch

from skipless.architecture.config import Architecture
from skipless.architecture.limit import limit
from skipless.errors import InputError
from skipless.model import SkiplessConfig, SkiplessForCausalLM
from skipless.train.initialize import initialize

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.json"))
# What each figure leaves out (arXiv:2404.12362; sas, sas_p: arXiv:2311.01906, V and P).
ABSENT = {
    "fig1a": "", "fig1b": "qo", "fig1c": "ko", "fig1d": "vo", "fig2a": "o", "fig2b": "q", "fig3a": "qo", "fig3b": "ko",
    "fig3c": "vo", "fig4a": "qo", "fig4b": "qo", "sas": "vo", "sas_p": "vo",
}  # fmt: skip


def read(file: Path, **changes) -> SkiplessConfig:
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("model_type")
    return SkiplessConfig(**config | changes)


def test_there_is_one_for_every_figure():
    assert [file.stem for file in EXAMPLES] == sorted(ABSENT)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_it_has_the_matrices_of_its_figure(file):
    architecture = Architecture.from_config(json.loads(file.read_text(encoding="utf-8")))
    model = SkiplessForCausalLM(read(file))
    assert set(architecture.tensors()) == model.state_dict().keys()
    absent = {letter for letter in "qkvo" if f"model.layers.0.self_attn.{letter}_proj.weight" not in model.state_dict()}
    assert absent == set(ABSENT[file.stem])
    parallel = file.stem.startswith(("fig3", "fig4b", "sas_p"))
    assert architecture.block_type == ("parallel" if parallel else "serial")
    assert architecture.residual_gains == file.stem.startswith("sas")
    if absent:
        with pytest.raises(InputError, match="has not been fused"):
            limit(architecture)


@pytest.mark.slow
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_it_learns_and_generates(file):
    """One sequence by heart: the signal passes every layer, forwards and backwards."""
    torch.manual_seed(0)
    model = SkiplessForCausalLM(read(file))
    initialize(model)
    ids = torch.randint(model.config.vocab_size, (4, 24))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert all(0.2 < state.std() < 5 for state in states)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids[:, :4]),
    }
    found = model.generate(ids[:, :4], **options)
    assert torch.equal(found, model.generate(ids[:, :4], **options, use_cache=False))


def test_gains_are_tensors():
    names = SkiplessForCausalLM(read(EXAMPLES[-2])).state_dict().keys()
    gains = ("self_attn.alpha", "self_attn.beta", "self_attn.gamma", "attention_gain", "ffn_gain", "ffn_skip_gain")
    assert all(f"model.layers.0.{gain}" in names for gain in gains)


def test_what_a_model_is_not_trained_in_is_refused():
    config = read(EXAMPLES[0], stream_basis="pivoted")
    with pytest.raises(InputError, match="expected a model with whole matrices"):
        initialize(SkiplessForCausalLM(config))

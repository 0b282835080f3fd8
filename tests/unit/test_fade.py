"""Skips and norms that fade: at the start the same model, at the end the same as the one that has neither."""

import copy
from typing import Any

import pytest
import torch

from skipless.errors import InputError
from skipless.model import SkiplessConfig, SkiplessForCausalLM
from skipless.train.fade import Fade, final, share
from skipless.train.recipe import Recipe, Schedule, Start
from tests.models import build, random_ids, relative_error

BOTH = Schedule(skips=(0, 2), norms=(1, 4))
PRE_NORM: dict[str, Any] = {"residual": "both", "norm_type": "rms"}
ONE_NORM = {"norms": ["input_layernorm", "model.norm"], "block_type": "parallel"}
BIASES = {"attention_bias": True, "mlp_bias": True, "norm_type": "layer", "ffn_type": "mlp"}
EXPERTS = {"ffn_type": "moe", "num_local_experts": 3, "num_experts_per_tok": 2}
# Of each, how its norms go: into what reads them, or (where a reader is not there, is a table or has no bias) into
# what writes.
KINDS: dict[str, dict[str, Any]] = {
    "Llama's": {},
    "GPT-2's": {**BIASES, "position_type": "learned", "tie_word_embeddings": True},
    "NeoX's": {**BIASES, "block_type": "parallel"},
    "parallel, one norm": ONE_NORM,
    "BLOOM's, untied": {**BIASES, "position_type": "alibi", "norms": [
        "model.embed_norm", "input_layernorm", "post_attention_layernorm", "model.norm"
    ]},
    "layer norms without biases to take theirs in": {"norm_type": "layer", "ffn_type": "mlp"},
    "experts": EXPERTS,
    "experts, layer norms": {**EXPERTS, "norm_type": "layer"},
    "Fig. 4a": {"stream_basis": "q", "p_removed": True},
    "SAS": {"residual": "ffn", "residual_gains": True, "attention_shaping": "full", "stream_basis": "v",
            "p_removed": True, "num_key_value_heads": 4},
    "gains and values that fuse has removed": {
        "values_removed": True, "gains_removed": ["model.norm", "model.layers.1.input_layernorm"],
    },
    "one norm that fuse has removed": {"norms_removed": ["model.layers.1.post_attention_layernorm"]},
}  # fmt: skip


def faded(schedule: Schedule, **fields: Any) -> tuple[SkiplessForCausalLM, SkiplessForCausalLM, SkiplessForCausalLM]:
    """A model, the same with what fades in it, wholly faded, and what is saved of that."""
    original = build(**{**PRE_NORM, **fields})
    model = copy.deepcopy(original)
    fade = Fade(model, schedule)
    assert relative_error(model, original) < 1e-12
    for step in range(6):
        model.train()(random_ids(model, seed=step))
        for norm in fade.norms:
            norm.follow()
        fade.set(step + 1)
    state = model.state_dict()
    found = SkiplessForCausalLM(final(model.config, state, schedule)).double().eval()
    found.load_state_dict(state)
    return original, model.eval(), found


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_what_has_faded_is_a_model_without_it(fields: dict[str, Any]):
    original, model, found = faded(BOTH, **fields)
    assert (found.config.residual, found.config.norm_type) == ("none", "none")
    assert not any("norm" in name or "skip" in name for name in found.state_dict())
    assert relative_error(found, model) < 1e-9
    assert relative_error(model, original) > 1e-2
    with torch.no_grad():  # and a constant that is a little off is found
        norm = next(module for name, module in model.named_modules() if name.endswith("layernorm"))
        norm.log_rms += 1e-3
    assert relative_error(found, model) > 1e-7


def test_norms_alone_and_skips_alone():
    _, model, found = faded(Schedule(norms=(0, 3)))
    assert (found.config.residual, found.config.norm_type) == ("both", "none")
    assert relative_error(found, model) < 1e-9
    _, model, found = faded(Schedule(skips=(0, 3)), residual_gains=True)
    assert (found.config.residual, found.config.norm_type) == ("none", "rms")
    assert relative_error(found, model) < 1e-12


def test_what_a_model_without_them_needs_is_added():
    model = build(**PRE_NORM)
    Fade(model, BOTH)
    assert (model.config.attention_shaping, model.config.gate_bias) == ("value", True)
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {"model.layers.0.self_attn.alpha", "model.layers.0.mlp.gate_proj.bias"} <= names
    model = build(**PRE_NORM)
    Fade(model, Schedule(norms=(0, 1)))
    assert (model.config.attention_shaping, model.config.gate_bias) == (None, True)


def test_the_constant_is_the_running_rms():
    model = build(**PRE_NORM)
    fade = Fade(model, Schedule(norms=(50, 60)))
    seen = []
    for step in range(3):
        states = model.train()(random_ids(model, seed=step), output_hidden_states=True).hidden_states
        seen.append(states[0].square().mean(-1).sqrt().log().mean())
        for norm in fade.norms:
            norm.follow()
    first = next(norm for norm in fade.norms if norm is model.model.layers[0].input_layernorm)
    assert first.log_rms.item() == pytest.approx(torch.stack(seen).mean().item(), abs=1e-5)


def test_it_fades_from_step_to_step():
    assert [share((2, 4), step) for step in range(6)] == [0, 0, 0, 0.5, 1, 1]
    model = build(**PRE_NORM, residual_gains=True)
    layer = model.model.layers[0]
    start = layer.ffn_skip_gain.item()
    fade = Fade(model, Schedule(skips=(2, 4), norms=(0, 10)))
    fade.set(3)
    assert layer.ffn_skip_gain.item() == pytest.approx(start / 2)
    assert "ffn_skip_gain" not in dict(layer.named_parameters())  # no step changes it
    assert layer.input_layernorm.share == 0.3


@pytest.mark.parametrize(
    ("fields", "schedule", "message"),
    [
        ({"residual": "none"}, BOTH, "schedule.skips: expected a model with skip connections"),
        ({"norm_type": "none"}, BOTH, "schedule.norms: expected a model with norms"),
        ({"stream_basis": "q"}, Schedule(norms=(0, 1)), "schedule.norms: model.layers.0.input_layernorm: expected"),
        ({"stream_basis": "q", "tie_word_embeddings": True}, BOTH, "model.layers.0.input_layernorm: expected matrices"),
        ({**ONE_NORM, "stream_basis": "q", "p_removed": True}, BOTH, "model.layers.1.input_layernorm: expected matri"),
        ({**EXPERTS, "norm_type": "layer", "norm_topk_prob": False}, BOTH, "model.layers.1.input_layernorm: expected"),
    ],
)  # fmt: skip
def test_refuses_what_cannot_fade(fields: dict[str, Any], schedule: Schedule, message: str):
    model = SkiplessForCausalLM(SkiplessConfig(**build(**PRE_NORM | fields).config.to_diff_dict()))
    before = str(model)
    with pytest.raises(InputError, match=message):
        Fade(model, schedule)
    assert str(model) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": Schedule(skips=(2, 2))}, r"schedule.skips: expected two steps, .* at most 10, found \[2, 2\]"),
        ({"schedule": Schedule(norms=(2, 11))}, r"schedule.norms: expected two steps, .* found \[2, 11\]"),
        ({"schedule": Schedule(norms=(2,))}, r"schedule.norms: expected two steps, .* found \[2\]"),
        ({"schedule": BOTH, "start": Start()}, "schedule.skips: expected start.folder, .* found none"),
        ({"schedule": BOTH, "fsdp": True}, "schedule.skips: expected start.folder, .* found fsdp"),
    ],
)
def test_refuses_a_schedule_without_an_end_or_a_start(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        Recipe(**{"steps": 10, "batch_size": 1, "sequence_length": 8, "muon_lr": 0.1, "adamw_lr": 0.1,
                  "start": Start("model")} | changes)  # fmt: skip

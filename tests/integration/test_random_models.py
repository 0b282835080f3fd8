"""Whatever fuse does not refuse is the same function, over all switches (benchmarks/random_models.py tries more)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import build, edit_tensors, load, relative_error, save
from tests.random_models import draw_fields, draw_runs, judge
from tests.tolerances import FP64


@pytest.mark.slow
@settings(max_examples=150)
@given(data=st.data())
def test_fused_or_refused(data, tmp_path_factory):
    def choose(options):
        return data.draw(st.sampled_from(options))

    fields = draw_fields(choose)
    runs = draw_runs(choose, fields["num_hidden_layers"])
    refusal, error = judge(fields, runs, data.draw(st.integers(0, 2**16)), tmp_path_factory.mktemp("drawn"))
    assert refusal or error is not None
    assert error is None or error <= FP64, (fields, runs)


def test_every_tensor_of_a_random_model_is_random():
    """Nothing is 0 or 1 because nobody set it, so that nothing can be dropped unseen."""
    model = build(
        norm_type="rms",
        norms=["input_layernorm", "post_attention_layernorm", "model.norm", "model.embed_norm"],
        residual="both",
        residual_gains=True,
        attention_shaping="full",
        attention_bias=True,
        mlp_bias=True,
        qk_norm="head_dim",
        position_type="learned",
    )
    for name, weight in model.named_parameters():
        assert weight.unique().numel() == weight.numel(), name
        assert not torch.isin(weight, torch.tensor([0.0, 1.0], dtype=weight.dtype)).any(), name


def test_the_judge_sees_a_dropped_gain(tmp_path):
    model = build(norm_type="rms", norm_eps=0.0, hidden_act="relu")
    save(model, tmp_path)
    assert relative_error(load(tmp_path), model) <= FP64
    edit_tensors(tmp_path, model__layers__1__post_attention_layernorm__weight=torch.ones(32, dtype=torch.float64))
    assert relative_error(load(tmp_path), model) > 1e6 * FP64

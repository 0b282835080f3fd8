"""What carries no information, as a number: parameters less the rank of the Jacobian of all outputs, in fp64."""

import json

import pytest
import torch
from click.testing import CliRunner

from skipless import cli
from skipless.architecture.config import Architecture
from skipless.architecture.limit import limit
from skipless.errors import InputError
from skipless.reports import certificate
from skipless.reports.certificate import certify
from tests.models import SMALL, build

MQA = {
    "model_type": "skipless",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
}
PARALLEL = {"block_type": "parallel"}
BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True, **BIASES},
        {"hidden_act": "relu"},
        {"position_type": "alibi", "ffn_type": "mlp", "hidden_act": "gelu", "attention_shaping": "full"},
        {"head_dim": 16},
        {"qk_norm": "head_dim", "residual_gains": True},
        {**PARALLEL},
        {**PARALLEL, "tie_word_embeddings": True},
        {**PARALLEL, "residual": "both", "norm_type": "layer"},
        {"residual": "both", "norm_type": "rms"},
        {"residual": "both", "norm_type": "rms", "tie_word_embeddings": True},
        {"residual": "ffn", "norm_type": "rms", "attention_shaping": "full", "residual_gains": True},
        {"residual": "attention"},
        {"residual": "ffn"},
        {"residual": "both"},
        {**PARALLEL, "residual": "both"},
        {"residual": "attention", "attention_shaping": "full", "residual_gains": True},
        {"residual": "both", "attention_shaping": "value", "tie_word_embeddings": True},
        {"norm_type": "layer"},
        {"norm_type": "rms", "norms": ["model.norm"]},
    ],
    ids=str,
)
def test_the_limit_is_the_jacobians_before_and_after_fusing(fields):
    found = certify(Architecture.from_config({**MQA, **fields}))
    assert found.exact
    assert found.before.free == found.expected
    assert found.holds


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}], ids=str)
def test_where_the_formula_may_fall_short_it_says_so(fields):
    found = certify(Architecture.from_config({**MQA, "position_type": "learned", **fields}))
    assert not found.exact
    assert found.before.free > found.expected
    assert found.holds


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, PARALLEL], ids=str)
def test_experts(fields):
    experts = {"ffn_type": "moe", "num_local_experts": 8, "num_experts_per_tok": 2}
    found = certify(Architecture.from_config({**MQA, **experts, **fields}))
    assert found.exact
    assert found.holds


@pytest.mark.slow
def test_a_part_rotated():
    """Of each head, r + (h - r)^2 numbers of Q and K carry no information."""
    rope = {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}}
    found = certify(Architecture.from_config({**MQA, **rope}))
    assert found.exact
    assert found.holds


@pytest.mark.slow
def test_narrow_heads_with_biases():
    shape = {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    found = certify(Architecture.from_config({**MQA, **shape, **BIASES}))
    assert found.kinds == ("stream", "values", "p", "head")
    assert found.after.parameters == found.before.parameters - found.removed
    assert found.holds


@pytest.mark.slow
def test_a_wrong_formula_is_noticed():
    """A model that keeps its skips has fewer free parameters than the formula for one without them says."""
    with_skips = certify(Architecture.from_config({**MQA, "residual": "both"}))
    assert with_skips.before.free < certify(Architecture.from_config(MQA)).expected


def test_the_rank_is_that_by_singular_values():
    model = build(**SMALL, residual="both")
    jacobian = certificate._jacobian(model, torch.Generator().manual_seed(1), lambda done, total: None)
    values = torch.linalg.svdvals(jacobian / jacobian.norm(dim=0).clamp(min=1e-10))
    found = certificate.rank(model)
    assert found.parameters == jacobian.shape[1] == sum(weight.numel() for weight in model.parameters())
    assert found.rank == (values > 1e-10 * values[0]).sum() < found.parameters
    assert found.gap > certificate.GAP


@pytest.mark.parametrize("name", ["mistral-7b", "llama-3.1-8b"])
def test_a_skipless_mistral_loses_all_but_what_no_block_holds(name):
    result = CliRunner().invoke(cli.main, ["limit", name, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert 0.999 <= sum(found["removed"].values()) / found["removable"] < 1


def test_the_command_says_what_blocks_a_model_as_it_is(tmp_path):
    def printed(*arguments):
        result = CliRunner().invoke(cli.main, ["limit", *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    found = printed("llama-3.1-8b")
    assert "the numbers of a skipless llama-3.1-8b; as it is, these stay:\n" in found
    assert found.count("residual 'both' and norm_type 'rms'") == 1
    assert "the stream, p and head seams: " in found
    (reason,) = json.loads(printed("llama-3.1-8b", "--json"))["as_it_is"]
    assert reason in found
    (tmp_path / "config.json").write_text(json.dumps(MQA))
    assert "as it is" not in printed(str(tmp_path))
    assert json.loads(printed(str(tmp_path), "--json"))["as_it_is"] == []


@pytest.mark.slow
def test_the_command_counts():
    result = CliRunner().invoke(cli.main, ["limit", "mistral-7b", "--check"])
    assert result.exit_code == 0, result.output
    assert "the certificate holds" in result.stdout


def test_a_fused_model_has_no_formula():
    with pytest.raises(InputError, match="expected a model that has not been fused"):
        limit(Architecture.from_config({**MQA, "stream_basis": "q"}))

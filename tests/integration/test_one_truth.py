"""What one command says of a model, the others say, too: what is refused, and how much there is to remove."""

import pytest
import torch
from click.testing import CliRunner

import skipless
from skipless import cli
from skipless.architecture.config import Architecture
from skipless.architecture.limit import limit
from skipless.checkpoint.headers import read_json_object
from tests.models import build, edit_config, save

COMMANDS = (["count"], ["limit"], ["audit"], ["fuse", "--dry-run"], ["fuse"])
ROPE = {"rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rope_parameters": {"rope_type": "yarn", **ROPE}}, "rope_parameters.rope_type"),
        ({"rope_parameters": {"rope_type": "llama3", **ROPE}}, "rope_parameters"),
        ({"hidden_act": "swish9"}, "hidden_act"),
        ({"residual": "some"}, "residual"),
        ({"norms": ["model.embed_tokens"]}, "norms"),
        ({"qk_norm": "heads"}, "qk_norm"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"p_removd": True}, "p_removd"),
        ({"sliding_window": -1}, "sliding_window"),
    ],
    ids=str,
)
def test_a_config_is_refused_by_all_in_the_same_words(source, tmp_path, changes, field):
    edit_config(source, **changes)
    said = set()
    for command, *options in COMMANDS:
        places = [source, tmp_path / "out"] if command == "fuse" else [source]
        result = CliRunner().invoke(cli.main, [command, *map(str, places), *options])
        assert result.exit_code == 2, command
        said.add(result.stderr)
    assert len(said) == 1
    assert field in said.pop()
    assert not (tmp_path / "out").exists()


MODELS = {
    "serial": {},
    "MHA": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 12},
    "narrow heads": {"head_dim": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "experts": {"ffn_type": "moe", "num_local_experts": 4, "num_experts_per_tok": 2},
    "parallel": {"block_type": "parallel"},
    "shaped": {"attention_shaping": "full", "residual_gains": True},
    "skip past the attention": {"residual": "attention"},
    "skip past the FFN": {"residual": "ffn"},
}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_what_goes_is_the_same_to_the_weight(fields, tmp_path):
    """By the plan, the file, and, where no matrix gains a bias, by limit, count and what count says is left."""
    source = save(build(dtype=torch.float32, **fields), tmp_path / "source")
    architecture = Architecture.from_config(read_json_object(source / "config.json"))
    found = limit(architecture)
    kinds = tuple(kind for kind in found.removed if kind != "norms")
    plan = skipless.fuse(source, tmp_path / "fused", remove=kinds)
    before, after = skipless.count(source), skipless.count(tmp_path / "fused")
    assert plan.parameters == (before.parameters, after.parameters)
    saved = sum(seam.saves for task in plan.tasks for seam in task.seams)
    assert sum(found.removed.values()) == saved == before.weights - after.weights
    if fields.get("residual", "none") == "none":
        assert before.everything == saved
        assert before.limit - after.limit == saved
        assert before.limit == sum(count for name, count in found.terms.items() if name != "biases")

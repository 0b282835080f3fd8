"""What one command says of a model, the others say, too: what is refused, and how much there is to remove."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import skipless
from skipless import cli
from skipless.architecture.config import PRE_NORM, Architecture
from skipless.architecture.limit import limit
from skipless.checkpoint.headers import read_json_object
from skipless.rewrite.fusion import plan_fuse
from skipless.rewrite.request import Request
from tests.families import saved
from tests.models import build, edit_config, load, relative_error, save

COMMANDS = (["count"], ["limit"], ["audit"], ["fuse", "--dry-run"], ["fuse"])
ROPE = {"rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rope_parameters": {"rope_type": "ntk", **ROPE}}, "rope_parameters.rope_type"),
        ({"rope_parameters": {"rope_type": "llama3", **ROPE}}, "rope_parameters.low_freq_factor: expected a value"),
        ({"hidden_act": "swish9"}, "hidden_act"),
        ({"gain_offset": "x"}, "gain_offset: expected a number, found 'x'"),
        ({"residual": "some"}, "residual"),
        ({"norms": ["model.embed_tokens"]}, "norms"),
        ({"qk_norm": "all"}, "qk_norm"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"p_removd": True}, "p_removd"),
        ({"sliding_window": -1}, "sliding_window"),
        ({"qk_norm": False}, "qk_norm: expected one of null, head_dim, heads; found False"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok: expected null with ffn_type 'glu', found 2"),
        ({"ffn_type": "moe", "num_local_experts": 0}, "num_local_experts: expected a positive number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling: expected None"),
        ({"position_type": "none", "rope_parameters": {"rope_type": "linear"}}, "rope_parameters: expected null, or"),
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({}, {"initializer_range": 0.02, "attention_dropout": 0.0, "pretraining_tp": 1, "is_decoder": False}),
        ({}, {"use_sliding_window": False, "rope_scaling": None, "layer_types": ["full_attention"] * 3}),
        ({"sliding_window": 8}, {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}),
        ({}, {"num_local_experts": 0, "num_experts_per_tok": 0}),
        ({"attn_logit_softcapping": 30.0, "final_logit_softcapping": 20.0}, {"attn_logit_softcapping": 30}),
        ({"position_type": "alibi"}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ],
    ids=str,
)
def test_what_converters_leave_is_accepted_and_changes_nothing(fields, left, tmp_path):
    source = save(build(dtype=torch.float32, **fields), tmp_path / "source")
    assert fuse(source, tmp_path / "before") == 0
    config = read_json_object(source / "config.json")
    (source / "config.json").write_text(json.dumps({**config, **left}))
    assert fuse(source, tmp_path / "after") == 0
    for command, *options in COMMANDS[:-1]:
        places = [source, tmp_path / "none"] if command == "fuse" else [source]
        assert CliRunner().invoke(cli.main, [command, *map(str, places), *options]).exit_code == 0, command
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("before", "after")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    before, after = (load(tmp_path / name, torch.float32) for name in ("before", "after"))
    assert relative_error(after, before) == 0


def fuse(source, destination):
    return CliRunner().invoke(cli.main, ["fuse", str(source), str(destination)]).exit_code


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


QUICK = {"serial", "biases", "parallel", "shaped", "skip past the attention"}


@pytest.mark.parametrize(
    "fields",
    [pytest.param(fields, id=name, marks=[pytest.mark.slow] * (name not in QUICK)) for name, fields in MODELS.items()],
)
def test_what_goes_is_the_same_to_the_weight(fields, tmp_path):
    """By the plan, the file, and, where no matrix gains a bias, by limit, count and what count says is left."""
    source = save(build(dtype=torch.bfloat16, **fields), tmp_path / "source")
    architecture = Architecture.from_config(read_json_object(source / "config.json"))
    found = limit(architecture)
    kinds = tuple(kind for kind in found.removed if kind != "norms")
    plan = skipless.fuse(source, tmp_path / "fused", remove=kinds)
    before, after = skipless.count(source), skipless.count(tmp_path / "fused")
    assert plan.parameters == (before.parameters, after.parameters)
    gone = sum(seam.saves for task in plan.tasks for seam in task.seams)
    assert sum(found.removed.values()) == gone == before.weights - after.weights
    assert sum(before.as_is.values()) == gone == before.by_fuse
    assert sum(after.as_is.values()) == after.by_fuse == 0
    if fields.get("residual", "none") == "none":
        assert before.everything == gone
        assert before.limit - after.limit == gone
        assert before.limit == sum(count for name, count in found.terms.items() if name != "biases")


def weights(architecture):
    """Of its matrices and tables."""
    return sum(module.inputs * module.outputs for module in architecture.modules())


# Of each family one, and those that no skipless model computes.
DESCRIBED = (
    *(
        "llama",
        "mixtral",
        "qwen2",
        "qwen3_moe",
        "gemma2",
        "phi",
        "phi-normed",
        "phi3",
        "gpt2",
        "gptj",
        "gpt_neox",
        "opt",
    ),
    *(
        "opt-projected",
        "opt-bare",
        "bloom",
        "falcon-7b",
        "falcon-rw",
        "mpt",
        "gpt_bigcode",
        "stablelm",
        "cohere",
        "olmo2",
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", DESCRIBED)
def test_of_another_family_all_say_the_same(name, tmp_path):
    """In its own layout and in a skipless one: what can go, how much, and what is refused, in the same words."""
    saved(name, source := tmp_path / "source")
    counted, architecture = skipless.count(source), skipless.count(source).architecture

    def planned(**options):
        """The plan of a fuse, or why there is none."""
        try:
            return plan_fuse(source, tmp_path / "none", Request(**options), 10**9).plan
        except skipless.InputError as error:
            return str(error)

    plan = planned()
    if counted.by_fuse:
        assert plan.neutral == counted.by_fuse
        assert tuple(plan.note.splitlines()) == counted.stays
    else:
        nothing = (*counted.stays, "this model has no norms and no biases")[0]
        assert plan == f"nothing to move: {nothing}"

    plan = planned(layout="skipless")
    if counted.left_out is None:
        refusal = plan
        assert "that a skipless model can compute, for layout skipless" in refusal
    else:
        refusal = None
        assert plan.parameters[0] - plan.parameters[1] == counted.left_out

    assert limit(architecture).removed.get("values", 0) in (0, counted.as_is["values"])
    for kind in ("values", "queries", "first_layer"):
        audited = skipless.audit(source, remove=(kind,))
        assert (audited.by_fuse, audited.left_out, audited.stays) == (counted.by_fuse, counted.left_out, counted.stays)
        assert audited.as_is == counted.as_is
        assert "its layout has a place for every block" in planned(remove=(kind,))
        plan = planned(layout="skipless", remove=(kind,))
        if audited.safe:
            assert audited.layout == "skipless"
            fewer = weights(plan.source) - weights(plan.target)
            assert fewer == (-counted.first_layer.grows if kind == "first_layer" else counted.as_is[kind])
        else:
            assert audited.problems[0].startswith(plan)
            assert refusal in (None, plan)
    assert (counted.first_layer is None) == (architecture.first_layer_stays is not None)
    assert (architecture.first_layer_stays or "") in "".join(audited.problems)
    assert audited.safe == (counted.first_layer is not None and refusal is None)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_audit_says_of_norms_what_fuse_does(norm, tmp_path):
    norms = [*PRE_NORM, "model.embed_norm"]
    source = save(build(dtype=torch.float32, residual="both", norm_type=norm, norms=norms), tmp_path / "source")
    result = CliRunner().invoke(cli.main, ["audit", str(source), "--remove", "norms"])
    audited = skipless.audit(source, remove=("norms",))
    assert [seam.kind for seam in audited.seams if seam.asked] == ["norms"] * 8
    if norm == "rms":
        plan = skipless.fuse(source, tmp_path / "fused", remove=("norms",))
        assert sum(len(task.seams) for task in plan.tasks) == 8
        assert audited.safe
        assert result.exit_code == 0
        assert "norms: 8 gains or norms go" in result.stdout
    else:
        with pytest.raises(skipless.InputError) as error:
            skipless.fuse(source, tmp_path / "fused", remove=("norms",))
        assert audited.problems[0].startswith(str(error.value))
        assert result.exit_code == 1

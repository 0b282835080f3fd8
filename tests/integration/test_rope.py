"""RoPE of every type: the angles are those of transformers' own models, in a model and in what is made of it."""

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import skipless
from skipless import cli
from skipless.errors import InputError
from skipless.inference import generate
from skipless.model import SkiplessConfig, SkiplessForCausalLM
from skipless.model.configuration_skipless import ROPE_BY_LENGTH, ROPE_PARAMETERS
from skipless.model.modeling_skipless import rotary_cos_sin
from skipless.serving.decoder import load_decoder
from tests.models import TINY, build, edit_config, load, random_ids, relative_error, save
from tests.tolerances import FP64

LENGTH = 16  # of the original context
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": LENGTH}
TYPES = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": LENGTH},
    "yarn-scaled": {
        "factor": 4.0,
        "original_max_position_embeddings": LENGTH,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "longrope": {
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [1.5, 3.0, 5.0, 9.0],
        "original_max_position_embeddings": LENGTH,
        "factor": 4.0,
    },
    "llama3": LLAMA3,
}


def parameters(name, **changes):
    return {"rope_type": name.partition("-")[0], "rope_theta": 500.0, **TYPES[name], **changes}


def test_every_type_is_here():
    assert {name.partition("-")[0] for name in TYPES} == ROPE_PARAMETERS.keys()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("length", [LENGTH // 2, 4 * LENGTH])
def test_angles_are_bit_for_bit_those_of_transformers(name, length):
    most = LENGTH if name == "dynamic" else 4 * LENGTH
    sizes = {**TINY, "max_position_embeddings": most}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=parameters(name)))
    positions = torch.arange(length)[None]
    expected = theirs(torch.zeros(1), positions)
    config = SkiplessConfig(**sizes, rope_parameters=parameters(name))
    for found, whole in zip(rotary_cos_sin(positions, config, torch.float32), expected, strict=True):
        assert torch.equal(found[:, 0], whole[..., : config.rotary_dim // 2])
    if name != "default":
        plain = SkiplessConfig(**sizes, rope_parameters=parameters("default"))
        different = not torch.equal(rotary_cos_sin(positions, plain, torch.float32)[0][:, 0], expected[0][..., :4])
        assert different == (name != "dynamic" or length > most)


@pytest.mark.parametrize("name", ["llama3", pytest.param("longrope", marks=pytest.mark.slow)])
def test_a_model_is_fused_and_another_factor_shows(name, tmp_path):
    source = save(build(rope_parameters=parameters(name)), tmp_path / "source")
    skipless.fuse(source, tmp_path / "fused", dtype="float64")
    assert relative_error(load(tmp_path / "fused"), load(source), length=2 * LENGTH) < FP64
    assert skipless.verify(source, tmp_path / "fused", dtypes=(), tokens=8).same
    (tmp_path / "fused" / "skipless.json").unlink()
    changes = {"factor": 5.0} if name == "llama3" else {"long_factor": [1.5, 3.0, 5.0, 8.0]}
    edit_config(tmp_path / "fused", rope_parameters=parameters(name, **changes))
    assert relative_error(load(tmp_path / "fused"), load(source), length=2 * LENGTH) > 1e-6
    assert not skipless.verify(source, tmp_path / "fused", dtypes=(), tokens=8).same


def continued(name):
    """What a model generates of a prompt, and how many tokens still within the original context."""
    model = build(rope_parameters=parameters(name))
    return generate(model, random_ids(model, batch=1, length=LENGTH - 3), 7), 4


def test_a_cache_is_as_good_as_none_over_the_end_of_the_original_context():
    found, _ = continued("llama3")
    assert found.broken_cache() is None


def test_longrope_makes_its_cache_anew_where_it_changes(monkeypatch):
    found, within = continued("longrope")
    torch.testing.assert_close(found.logits[within:], found.uncached[within:], rtol=1e-6, atol=1e-9)
    monkeypatch.delattr(SkiplessForCausalLM, "prepare_inputs_for_generation")
    found, within = continued("longrope")
    assert (found.logits - found.uncached)[within:].abs().max() > 1e-3 * found.uncached.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yarn", "llama3"])
def test_it_compiles_whole(name):
    model = build(rope_parameters=parameters(name))
    ids = random_ids(model)
    assert model._can_compile_fullgraph
    found = torch.compile(model, backend="eager", fullgraph=True)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, model(input_ids=ids, use_cache=False).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", ROPE_BY_LENGTH)
def test_what_depends_on_the_length_is_no_fixed_graph(name, tmp_path):
    source = save(build(rope_parameters=parameters(name)), tmp_path)
    with pytest.raises(InputError, match=f"rope_parameters.rope_type: expected .*, found '{name}'"):
        load_decoder(source, torch.float32)


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("linear", {"factor": 0.5}, "factor: expected a number from 1.0 on, found 0.5"),
        ("linear", {"factor": "2"}, "factor: expected a number"),
        ("linear", {"beta_fast": 32}, "beta_fast: not a parameter of linear RoPE"),
        ("linear", {"factor": True}, "factor: expected a number"),
        ("yarn", {"truncate": 1}, "truncate: expected true or false, found 1"),
        ("yarn-scaled", {"beta_slow": 30.0}, "beta_slow: expected less than beta_fast"),
        ("longrope", {"long_factor": [1.0]}, "long_factor: expected 4 numbers, one for two rotated dimensions"),
        ("longrope", {"short_factor": [1.0, 0.0, 1.0, 1.0]}, "short_factor: expected a list of positive numbers"),
        ("longrope", {"long_factor": 2.0}, "long_factor: expected a list of positive numbers, found 2.0"),
        ("llama3", {"low_freq_factor": 4.0}, "low_freq_factor: expected less than high_freq_factor"),
        ("llama3", {"original_max_position_embeddings": 0}, "original_max_position_embeddings: expected a number"),
        ("llama3", {"factor": float("inf")}, "factor: expected a number"),
    ],
    ids=str,
)
def test_bad_parameters_are_refused_by_name(name, changes, field, tmp_path):
    source = save(build(num_hidden_layers=1), tmp_path / "source")
    edit_config(source, rope_parameters=parameters(name, **changes))
    result = CliRunner().invoke(cli.main, ["fuse", str(source), str(tmp_path / "fused")])
    assert result.exit_code == 2
    assert f"rope_parameters.{field}" in result.stderr
    assert not (tmp_path / "fused").exists()

import dataclasses
import json
import subprocess
import sys

import pytest

from skipless.architecture.config import BOOKKEEPING, FOREIGN, Architecture
from skipless.errors import InputError
from skipless.model import SkiplessConfig
from skipless.model.configuration_skipless import SUPPORTED
from tests.models import TINY, build

VARIANTS = [
    {},
    {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    {"ffn_type": "mlp", "position_type": "learned", "attention_shaping": "full"},
    {"gate_bias": True, "tie_word_embeddings": True, "attention_shaping": "value", "head_dim": 16},
    {"stream_basis": "q", "p_removed": True, "layers_open": [1]},
    {
        "stream_basis": "q",
        "attention_bias": True,
        "folded_biases": ["model.embed_tokens", "model.layers.0.mlp.down_proj"],
    },
    {"p_removed": True, "head_dim": 4},
    {"stream_basis": "pivoted", "attention_bias": True, "layers_open": [1], "rest_dtype": "float32"},
    {"stream_basis": "pivoted", "head_dim": 12, "attention_shaping": "full"},
    {"stream_basis": "pivoted", "head_dim": 4, "attention_bias": True},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_tensors_are_those_of_the_model(fields):
    model = build(**fields)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    assert Architecture.from_config(json.loads(model.config.to_json_string())).tensors() == shapes


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_index_tensors_are_the_integers_of_the_model(fields):
    model = build(**fields)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items() if not x.is_floating_point()}
    assert Architecture.from_config(json.loads(model.config.to_json_string())).index_tensors() == shapes


def test_pivoted_layers_have_a_rest_and_an_order_for_q_k_and_v():
    architecture = Architecture.from_config(config(stream_basis="pivoted", layers_open=[1], attention_bias=True))
    assert architecture.rest_width == 32  # 32 + 16 + 16 outputs, of which 32 are the stream
    attention = [
        {name.split(".")[-1]: shape for name, shape in architecture.tensors().items() if name.startswith(prefix)}
        for prefix in ("model.layers.0.self_attn.rest", "model.layers.0.self_attn.column")
    ]
    assert attention == [{"weight": (32, 32), "bias": (32,)}, {"column_order": (64,)}]
    assert set(architecture.index_tensors()) == {f"model.layers.{layer}.self_attn.column_order" for layer in (0, 2)}
    projections = {name.split(".")[2] for name in architecture.tensors() if name.split(".")[-2] in ("q_proj", "k_proj")}
    assert projections == {"1"}


@pytest.mark.parametrize(("norm", "parameters"), [("rms", 1), ("layer", 2)])
def test_norms_are_named_as_in_llama(norm, parameters):
    plain, normed = (Architecture.from_config({**config(), "norm_type": value}).tensors() for value in ("none", norm))
    added = {name: shape for name, shape in normed.items() if name not in plain}
    assert len(added) == parameters * (2 * TINY["num_hidden_layers"] + 1)
    assert added["model.layers.1.post_attention_layernorm.weight"] == added["model.norm.weight"] == (32,)


def test_optional_fields_are_derived():
    fields = config()
    del fields["num_key_value_heads"]
    architecture = Architecture.from_config(fields)
    assert (architecture.num_key_value_heads, architecture.head_dim) == (4, 8)


def config(**changes):
    return {"model_type": "skipless", **TINY, **changes}


@pytest.mark.parametrize("name", sorted(TINY.keys() - {"num_key_value_heads", "max_position_embeddings"}))
def test_a_missing_dimension_is_named(name):
    fields = config()
    del fields[name]
    with pytest.raises(InputError, match=f"config.json: {name}: expected .* found none"):
        Architecture.from_config(fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type: expected 'skipless', found 'llama'.*norms and skip connections block"),
        ({"hidden_size": "32"}, "hidden_size: expected a positive integer below 2\\^31, found '32'"),
        ({"hidden_size": -32}, "hidden_size: expected a positive integer"),
        ({"vocab_size": 2**40}, "vocab_size: expected a positive integer below"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected a positive integer"),
        ({"attention_bias": 1}, "attention_bias: expected true or false, found 1"),
        ({"sliding_windows": 512}, "sliding_windows: not a field of a skipless model"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of num_attention_heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, "head_dim: expected a value, found none"),
        ({"stream_basis": "k"}, "stream_basis: 'k' needs a square k_proj"),
        ({"stream_basis": "pivoted", "head_dim": 2}, "stream_basis: 'pivoted' needs at least hidden_size .* found 16"),
        ({"rest_dtype": "float32"}, "rest_dtype: expected null with stream_basis None"),
        ({"stream_basis": "q", "rest_dtype": "float32"}, "rest_dtype: expected null with stream_basis 'q'"),
        ({"layers_open": [3]}, "layers_open: expected layers 0..2, found 3"),
        ({"layers_open": "1"}, "layers_open: expected a list of int"),
        ({"folded_biases": ["model.layers.7.mlp.down_proj"]}, "folded_biases: expected names of modules"),
        *(({name: "other"}, f"{name}: expected .* found 'other'") for name in SUPPORTED),
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused_by_name(changes, message):
    with pytest.raises(InputError, match=f"config.json: {message}"):
        Architecture.from_config(config(**changes))


def test_the_model_file_supports_nothing_the_architecture_does_not_know():
    fields = {field.name for field in dataclasses.fields(Architecture)}
    allowing = {
        "stream_basis": {"num_key_value_heads": 4},
        "rest_dtype": {"stream_basis": "pivoted"},
        "ffn_type": {"num_local_experts": 4, "num_experts_per_tok": 2},
    }
    for name, values in SUPPORTED.items():
        assert name in fields | BOOKKEEPING.keys()
        for value in values:
            Architecture.from_config(config(**{name: value, **allowing.get(name, {})}))
    assert fields - FOREIGN <= set(SkiplessConfig(**TINY).to_dict())


def test_importing_skipless_and_its_seams_does_not_import_torch():
    heavy = "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    code = f"import sys, skipless, skipless.architecture.seams, skipless.cli; {heavy}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("head_dim", "part", "rotated"), [(20, 0.25, 6), (104, 30 / 104, 30), (5, 1.0, 5), (8, 0.5, 4)]
)
def test_rope_rotates_pairs(head_dim, part, rotated):
    """Of 5 dimensions GPT-NeoX makes 3 angles, and rotates 6; 30 / 104 of 104 is less than 30 in floating point."""
    fields = {"vocab_size": 9, "hidden_size": 2 * head_dim, "intermediate_size": 8, "num_hidden_layers": 1}
    architecture = Architecture.from_values({**fields, "num_attention_heads": 2, "partial_rotary_factor": part})
    assert architecture.rotated == rotated

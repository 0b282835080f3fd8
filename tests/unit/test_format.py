"""docs/format.md names every tensor with its shape, and which run may follow which."""

import re

import pytest

from skipless.architecture.config import SKIPLESS_NORMS, Architecture
from skipless.architecture.seams import closed, seams
from tests.models import TINY
from tests.pages import ROOT

ROW = re.compile(r"^\| (?P<names>`(?:model|lm_head)[^|]*) \| \((?P<shape>[^|]*)\) \|(?P<when>[^|]*)\|$", re.M)
BIASES = {"attention_bias": True, "mlp_bias": True}
QKV = {"qkv_bias": True, "head_bias": True, "folded_biases": ["model.layers.1.self_attn.o_proj"]}
EXPERTS = {"ffn_type": "moe", "num_local_experts": 3, "num_experts_per_tok": 2}
NORMS = {"norm_type": "layer", "norms": list(SKIPLESS_NORMS)}
FOLDED = ["model.embed_tokens", "model.layers.0.mlp.router", "model.layers.0.mlp.experts.1.up_proj"]
MODELS = [
    {**BIASES, **NORMS, "residual": "both", "residual_gains": True, "qk_norm": "head_dim", "attention_shaping": "full"},
    {
        **BIASES,
        "position_type": "learned",
        "position_offset": 2,
        "stream_basis": "pivoted",
        "layers_open": [1],
        "p_removed": True,
    },
    {"stream_basis": "pivoted", "attention_bias": True, "num_key_value_heads": 4, "values_removed": True},
    {**EXPERTS, **BIASES, "head_dim": 6, "p_removed": True, "folded_biases": FOLDED, "tie_word_embeddings": True},
    {"first_layer_removed": True, "stream_basis": "pivoted", "values_removed": True, "num_key_value_heads": 4},
    {"values_removed": True, "qk_norm": "heads", **QKV},
    {"keys_removed": True, "position_type": "alibi", **QKV},
    {"keys_removed": True, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, **QKV},
    {"head_dim": 16, "p_removed": True, "head_removed": True, "attention_bias": True, "values_removed": True},
]


def rows():
    """Pattern of a name, shape, what an architecture has to be true or to be, and whether it is an index."""
    for row in ROW.finditer((ROOT / "docs" / "format.md").read_text()):
        true = [name for name in re.findall(r"`(\w+)`", row["when"]) if name.endswith("removed")]
        words = re.findall(r'(\w+) ((?:"\w+"(?: or )?)+)', row["when"])
        one_of = {name: re.findall('"(.+?)"', values) for name, values in words}
        for name in re.findall("`([^`]+)`", row["names"]):
            pattern = re.escape(name).replace(r"\{i\}", r"\d+").replace(r"\{j\}", r"\d+")
            yield pattern, row["shape"], true, one_of, ", int32" in row["names"]


def described(architecture, name):
    """Number, shape and kind of the row that describes a tensor."""
    a = architecture
    values = {
        "V": a.vocab_size,
        "T": a.max_position_embeddings,
        "o": a.position_offset,
        "d": a.hidden_size,
        "f": a.intermediate_size,
    }
    values |= {"H": a.num_attention_heads, "K": a.num_key_value_heads, "h": a.head_dim, "D": a.query_width}
    values |= {"e": a.value_width, "E": a.num_local_experts, "u": a.unrotated}
    values["R"] = sum(a.row.values())
    values["I"] = a.query_width if a.p_removed and a.p_merged else a.hidden_size
    for number, (pattern, shape, true, one_of, index) in enumerate(rows()):
        holds = all(getattr(a, field) for field in true) and all(getattr(a, f) in each for f, each in one_of.items())
        if re.fullmatch(pattern, name) and holds:
            return number, tuple(eval(part, values) for part in shape.split(", ")), index
    raise LookupError(name)


@pytest.mark.parametrize("fields", MODELS, ids=str)
def test_every_tensor_has_a_row_with_its_shape(fields):
    architecture = Architecture.from_config({"model_type": "skipless", **TINY, **fields})
    indices = architecture.index_tensors()
    for name, shape in architecture.tensors().items():
        assert described(architecture, name)[1:] == (shape, name in indices), name


def test_every_row_has_a_tensor():
    models = [Architecture.from_config({"model_type": "skipless", **TINY, **fields}) for fields in MODELS]
    used = {described(model, name)[0] for model in models for name in model.tensors()}
    assert used == set(range(len(list(rows()))))


SERIAL = {"num_key_value_heads": 4}
WIDE, PARALLEL = {**SERIAL, "head_dim": 16}, {"block_type": "parallel"}
NO_ROPE = {**SERIAL, "position_type": "none"}


@pytest.mark.parametrize(
    ("fields", "first", "basis", "later"),
    [
        (SERIAL, "stream", "q", ("p", "values", "head")),
        (SERIAL, "stream", "pivoted", ("p", "head")),
        (PARALLEL, "stream", "pivoted", ("head",)),
        (SERIAL, "p", "q", ("stream", "values", "head")),
        (WIDE, "p", "q", ("stream", "head")),
        (PARALLEL, "p", "q", ()),
        (SERIAL, "values", "q", ("p", "head")),
        (PARALLEL, "values", "q", ("head",)),
        (NO_ROPE, "queries", "q", ("values", "p", "head")),
        (SERIAL, "head", "q", ("stream", "p", "values")),
        (PARALLEL, "head", "q", ("stream", "values")),
        (SERIAL, "first_layer", "q", ("stream", "p", "values", "head")),
    ],
    ids=str,
)
def test_which_run_may_follow(fields, first, basis, later):
    architecture = Architecture.from_config({"model_type": "skipless", **TINY, **fields})
    removes = "p" if fields is PARALLEL and first == "p" else "readers"
    every = seams(architecture, removes, first_layer=first == "first_layer", queries=first == "queries")
    found = closed(architecture, [seam for seam in every if seam.kind == first], basis)
    can = set()
    for removes in ("readers", "p"):
        every = [seam for seam in seams(found, removes) if seam.layer and seam.kind != "norms"]
        can |= {seam.kind for seam in every} - {seam.kind for seam in every if seam.blocked}
    assert can == set(later)

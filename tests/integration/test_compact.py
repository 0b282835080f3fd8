"""Models with skips and norms as skipless models that leave out what carries no information: judged by transformers'
own classes.
"""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import skipless
from skipless import cli
from skipless.algebra.affine import Affine
from skipless.checkpoint.families import llama
from skipless.errors import InputError
from skipless.inference import arithmetic, generate, load
from skipless.removals import neutral, rows
from tests.families import GPT, LLAMA, MODELS, saved
from tests.models import build, contents, edit_config, edit_tensors, save, stop_fuse
from tests.tolerances import TOLERANCES

FP64 = TOLERANCES[torch.float64]
ROPE = {"rope_theta": 500.0, "original_max_position_embeddings": 8}
SCALED = {**ROPE, "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = ["sliding_attention", "full_attention"]
HALF_ROPE = {"rope_theta": 500.0, "partial_rotary_factor": 0.5}
DYNAMIC = {"rope_theta": 500.0, "rope_type": "dynamic", "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0] * 4, "long_factor": [1.5, 3.0, 5.0, 9.0]}
# What families' configs may say besides.
OTHERS = {
    "llama3": ("Llama", {**LLAMA, "rope_parameters": SCALED, "rms_norm_eps": 1e-2, "hidden_act": "relu"}),
    "llama-dynamic": ("Llama", {**LLAMA, "max_position_embeddings": 8, "rope_parameters": DYNAMIC}),
    "llama-one-kv-head": ("Llama", {**LLAMA, "num_key_value_heads": 1, "attention_bias": True}),
    "mistral-windowed": ("Mistral", {**LLAMA, "sliding_window": 5}),
    "qwen2-windowed": ("Qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen2-mixed": ("Qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "gemma2-windowed": ("Gemma2", {**MODELS["gemma2"][1], "sliding_window": 5, "attn_logit_softcapping": 2.0}),
    "gemma3-mixed": ("Gemma3Text", {**LLAMA, "head_dim": 16, "sliding_window": 5, "layer_types": KINDS}),
    "qwen2-tied": ("Qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3_moe-all": ("Qwen3Moe", {**LLAMA, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    "bloom-six-heads": ("Bloom", {"vocab_size": 96, "hidden_size": 96, "n_layer": 2, "n_head": 6}),
    "mpt-scaled": ("Mpt", {**MODELS["mpt"][1], "attn_config": {"softmax_scale": 0.5}, "tie_word_embeddings": False}),
    "cohere-untied": ("Cohere", {**LLAMA, "tie_word_embeddings": False, "logit_scale": 0.5}),
    "gpt2-constant-norms": ("GPT2", {**GPT, "layer_norm_epsilon": 1e12}),
    "phi3-partial": ("Phi3", {**LLAMA, "partial_rotary_factor": 0.5, "head_dim": 8}),
    "gpt_neox-mostly": ("GPTNeoX", {**LLAMA, "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.75}}),
    "phi3-long": ("Phi3", {**LLAMA, "rope_parameters": LONG, "original_max_position_embeddings": 8}),
}
COMPACT = [
    *("llama", "llama-mha-biased", "llama-tied-wide", "mistral", "mixtral", "qwen2", "qwen3", "phi3"),
    *("gpt2", "gpt2-inner", "gpt_bigcode", "gpt_bigcode-mha", "gpt_neox", "gpt_neox-serial", "opt", "cohere"),
    *("gemma", "gemma2", "gemma3", "olmo2", "phi", "stablelm", "stablelm-parallel", "falcon-7b", "falcon-40b"),
    *("bloom", "mpt"),
    *OTHERS,
]
QUICK = {"llama", "mixtral", "phi3", "gpt2", "mpt", "cohere", "gemma3-mixed"}
cases = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in COMPACT]
)


@pytest.fixture(autouse=True)
def _others(monkeypatch):
    for name, model in OTHERS.items():
        monkeypatch.setitem(MODELS, name, model)


def opened(folder):
    """A model in fp64, by transformers' own class, or, of a skipless one, by ours."""
    model = load(folder, torch.float64)
    if model.config.model_type not in ("skipless", "falcon"):  # whose eager attention adds its ALiBi twice
        model.set_attn_implementation("eager")
    return model


def error(before, after):
    """Of the largest logit."""
    ids = torch.randint(2, 96, (3, 12), generator=torch.Generator().manual_seed(1))
    found = []
    for folder in (before, after):
        model = opened(folder)
        with torch.no_grad(), arithmetic(model):
            found.append(model(input_ids=ids, use_cache=False).logits)
    return ((found[1] - found[0]).abs().max() / found[0].abs().max()).item()


def numbers(folder):
    """In a folder's weights: of floating point, and of indices."""
    tensors = load_file(folder / "model.safetensors").values()
    return tuple(sum(t.numel() for t in tensors if t.is_floating_point() == kind) for kind in (True, False))


@cases
def test_every_family_is_the_same_function_of_as_many_fewer_numbers_as_promised(name, tmp_path):
    saved(name, tmp_path / "source")
    plan = skipless.fuse(tmp_path / "source", tmp_path / "fused", layout="skipless")
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["model_type"] == "skipless"
    assert error(tmp_path / "source", tmp_path / "fused") < FP64
    promised, audited = skipless.count(tmp_path / "source"), skipless.audit(tmp_path / "source")
    (before, _), (after, _) = (numbers(tmp_path / folder) for folder in ("source", "fused"))
    assert before - after == promised.left_out == audited.left_out > 0
    assert plan.parameters == (before, after)
    exact = sum(promised.as_is.values())
    if promised.architecture.qkv_bias:  # V's biases become P's
        exact -= 2 * (32 - promised.architecture.value_width)
    assert before - after == exact
    found = skipless.verify(tmp_path / "source", tmp_path / "fused", dtypes=(), tokens=4)
    assert found.same
    assert found.proved
    prompt = torch.arange(5, 10)[None]
    tokens = [generate(opened(tmp_path / folder), prompt, 8).tokens for folder in ("source", "fused")]
    assert torch.equal(*tokens)


LOOKED_UP = ("gpt_neox", "mixtral", "qwen3", "phi", "phi3-long", "stablelm-parallel", "cohere-untied")


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in LOOKED_UP)])
def test_layer_0_is_looked_up(name, tmp_path):
    """Serial, a row has the embedding, too, which the skip adds; parallel, its sum with what the FFN gives."""
    source, fused = tmp_path / "source", tmp_path / "fused"
    saved(name, source)
    kinds = ("norms", "values", "first_layer") if name == "llama" else ("first_layer",)
    skipless.fuse(source, fused, layout="skipless", remove=kinds)
    assert error(source, fused) < FP64
    a = skipless.count(source).architecture
    table = load_file(fused / "model.safetensors")["model.embed_tokens.weight"]
    assert table.shape == (96, 32 + a.query_width + 2 * a.value_width)
    found = skipless.verify(source, fused, dtypes=(), tokens=4)
    assert found.same
    assert found.proved
    spoil(fused, lambda tensors: tensors["model.embed_tokens.weight"][:, -1].add_(0.1))
    assert differs(source, fused)


def spoil(folder, change):
    """Change a folder's tensors, and take away what would tell by their bytes."""
    (folder / "skipless.json").unlink(missing_ok=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_norms_that_are_all_but_constant(tmp_path):
    """GPT-2 trained without norms is published so: of each, eps is 1e12 and gains are around 1e6."""
    source, fused = tmp_path / "source", tmp_path / "fused"
    saved("gpt2-constant-norms", source)
    spoil(source, lambda tensors: [t.mul_(1e6) for name, t in tensors.items() if "ln_" in name and "weight" in name])
    skipless.fuse(source, fused, layout="skipless")
    assert error(source, fused) < FP64
    edit_config(fused, norm_eps=1e10)
    assert error(source, fused) > 0.1


@pytest.fixture
def fused(tmp_path, request):
    """A model, by name, and what fuse makes of it."""
    saved(getattr(request, "param", "llama"), tmp_path / "source")
    skipless.fuse(tmp_path / "source", tmp_path / "fused", layout="skipless")
    return tmp_path / "source", tmp_path / "fused"


def differs(source, fused):
    return error(source, fused) > 1e-6 and not skipless.verify(source, fused, dtypes=(), tokens=4).same


@pytest.mark.parametrize(
    ("fused", "tensor"),
    [
        ("llama", "layers.1.self_attn.value_order"),
        ("llama", "layers.0.self_attn.v_proj.weight"),
        ("llama", "layers.1.self_attn.o_proj.weight"),
        ("llama", "layers.0.mlp.gate_proj.weight"),
        pytest.param("qwen2", "layers.1.self_attn.o_proj.bias", marks=pytest.mark.slow),
        pytest.param("qwen3", "layers.1.self_attn.k_norm.weight", marks=pytest.mark.slow),
        pytest.param("mixtral", "layers.1.mlp.router.weight", marks=pytest.mark.slow),
        ("gpt2", "position_embeddings.weight"),
        ("gpt2", "layers.0.self_attn.k_proj.weight"),
        pytest.param("bloom", "embed_norm.weight", marks=pytest.mark.slow),
        pytest.param("bloom", "layers.1.self_attn.q_proj.bias", marks=pytest.mark.slow),
        pytest.param("mpt", "layers.0.self_attn.k_proj.weight", marks=pytest.mark.slow),
        ("gpt2", "layers.1.self_attn.q_proj.bias"),
        pytest.param("gpt2", "layers.1.self_attn.key_order", marks=pytest.mark.slow),
        pytest.param("gpt2", "layers.0.self_attn.q_proj.weight", marks=pytest.mark.slow),
        pytest.param("gpt2", "layers.0.mlp.up_proj.bias", marks=pytest.mark.slow),
        pytest.param("gpt2", "layers.1.self_attn.o_proj.bias", marks=pytest.mark.slow),
        pytest.param("opt", "position_embeddings.weight", marks=pytest.mark.slow),
        ("gpt_neox", "layers.1.self_attn.k_rope_proj.weight"),
        ("gpt_neox", "layers.0.self_attn.k_rope_proj.bias"),
        pytest.param("phi", "layers.1.self_attn.k_proj.weight", marks=pytest.mark.slow),
        pytest.param("phi", "layers.1.self_attn.key_order", marks=pytest.mark.slow),
        pytest.param("stablelm", "layers.0.self_attn.q_proj.weight", marks=pytest.mark.slow),
        pytest.param("phi", "lm_head.bias", marks=pytest.mark.slow),
        ("gemma", "norm.weight"),
        ("olmo2", "layers.0.attention_output_norm.weight"),
        pytest.param("olmo2", "layers.1.ffn_output_norm.weight", marks=pytest.mark.slow),
        pytest.param("olmo2", "layers.1.self_attn.q_norm.weight", marks=pytest.mark.slow),
        pytest.param("falcon-40b", "layers.1.post_attention_layernorm.bias", marks=pytest.mark.slow),
        pytest.param("phi3", "layers.1.self_attn.q_proj.weight", marks=pytest.mark.slow),
    ],
    indirect=["fused"],
)
def test_a_wrong_tensor_shows(fused, tensor):
    name = tensor if tensor.startswith("lm_head") else f"model.{tensor}"
    along = 0 if name.endswith("_order") else -1  # other heads' orders
    spoil(fused[1], lambda tensors: tensors.update({name: tensors[name].roll(1, along)}))
    assert differs(*fused)


@pytest.mark.parametrize("index", [-1, 1, 32], ids=["negative", "twice", "beyond the stream"])
def test_an_order_that_is_none_is_refused(fused, index):
    def change(tensors):
        order = tensors["model.layers.1.self_attn.value_order"]
        order[0, 0], order[0, 1] = index, 1

    spoil(fused[1], change)
    with pytest.raises(InputError, match="value_order: expected each index of its source once"):
        opened(fused[1])


@pytest.mark.parametrize(
    ("fused", "tensor", "wrong"),
    [
        ("gpt2", "layers.0.self_attn.o_proj.weight", lambda found: found.T.contiguous()),
        pytest.param("opt", "position_embeddings.weight", lambda found: found.roll(2, 0), marks=pytest.mark.slow),
    ],
    indirect=["fused"],
    ids=["as Conv1D stores it", "without OPT's offset"],
)
def test_a_tensor_as_another_family_would_have_it_shows(fused, tensor, wrong):
    spoil(fused[1], lambda tensors: tensors.update({f"model.{tensor}": wrong(tensors[f"model.{tensor}"])}))
    assert differs(*fused)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_eps": 1e-2},
        {"hidden_act": "relu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"sliding_window": 5},
    ],
    ids=str,
)
def test_a_config_that_says_something_else_shows(fused, changes):
    (fused[1] / "skipless.json").unlink()
    edit_config(fused[1], **changes)
    assert differs(*fused)


def test_a_family_whose_fields_mean_something_else_is_found_by_verify(tmp_path, monkeypatch):
    """What fuse's own check, which runs the model file alone, cannot see."""
    saved("llama", tmp_path / "source")
    wrong = {**llama.FAMILY.computes, "norm_eps": lambda config: 1e-3}
    with monkeypatch.context() as patch:
        patch.setitem(llama.FAMILY.__dict__, "computes", wrong)
        skipless.fuse(tmp_path / "source", tmp_path / "fused", layout="skipless")
    assert differs(tmp_path / "source", tmp_path / "fused")


@pytest.mark.parametrize(
    ("module", "function", "wrong"),
    [
        (neutral, "_folded", lambda norm, reader, dtype: reader),
        (rows, "choose_rows", lambda seam, weight, right=rows.choose_rows: list(reversed(right(seam, weight)))),
    ],
    ids=["no gain", "heads mixed up"],
)
@pytest.mark.parametrize("name", ["phi3", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_self_check_finds_what_is_wrong(name, module, function, wrong, tmp_path, monkeypatch):
    saved(name, tmp_path / "source")
    monkeypatch.setattr(module, function, wrong)
    with pytest.raises(skipless.errors.BugError, match=r"expected to differ .* nothing was published"):
        skipless.fuse(tmp_path / "source", tmp_path / "fused", layout="skipless")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("Qwen3Moe", {**MODELS["qwen3_moe"][1]}, r"dense_layers: expected .* found \(1,\); use layout family"),
        ("GPTJ", {**GPT, "rotary_dim": 4}, "model_type: expected .* found 'gptj'; use layout family"),
        ("Llama", {**LLAMA, "rope_parameters": {**SCALED, "rope_type": "ntk"}}, "rope_parameters.rope_type"),
        ("Phi", {**LLAMA, "qk_layernorm": True}, "qk_norm: expected .* found 'head_dim'"),
        ("Cohere", {**LLAMA, "use_qk_norm": True}, "qk_norm: expected .* found 'heads'"),
        ("OPT", MODELS["opt-projected"][1], "embedding_size: expected .* found 16"),
        ("OPT", MODELS["opt-bare"][1], "layer_norm_elementwise_affine: expected .* found False"),
        ("Falcon", MODELS["falcon-rw"][1], "alibi: expected .* found True"),
        ("Mpt", {**MODELS["mpt"][1], "d_model": 48, "n_heads": 6}, "n_heads: expected .* found 6; use"),
        (
            "Mpt",
            {**MODELS["mpt"][1], "attn_config": {"clip_qkv": 8.0}},
            "attn_config: expected .* found .*'clip_qkv': 8",
        ),
        ("GPT2", {**GPT, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: .* found True"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_skipless_model_computes_is_refused_by_the_field(name, values, message, tmp_path, monkeypatch):
    if "ntk" in str(values):
        saved("llama", tmp_path / "source")
        edit_config(tmp_path / "source", rope_parameters=values["rope_parameters"])
    else:
        monkeypatch.setitem(MODELS, "refused", (name, values))
        saved("refused", tmp_path / "source")
    with pytest.raises(skipless.InputError, match=message):
        skipless.fuse(tmp_path / "source", tmp_path / "fused", layout="skipless")
    assert not (tmp_path / "fused").exists()
    assert "ntk" in str(values) or skipless.count(tmp_path / "source").left_out is None


def test_skips_behind_norms_are_refused_in_every_layout(tmp_path, monkeypatch):
    values = {**MODELS["bloom"][1], "apply_residual_connection_post_layernorm": True}
    monkeypatch.setitem(MODELS, "refused", ("Bloom", values))
    saved("refused", tmp_path / "source")
    for ask in (
        lambda: skipless.fuse(tmp_path / "source", tmp_path / "fused"),
        lambda: skipless.count(tmp_path / "source"),
        lambda: skipless.audit(tmp_path / "source"),
    ):
        with pytest.raises(skipless.InputError, match="apply_residual_connection_post_layernorm: expected false"):
            ask()
    assert not (tmp_path / "fused").exists()


def test_a_head_beside_the_table_that_it_is_tied_to_is_the_same_or_refused(tmp_path):
    saved("llama", tmp_path / "source")
    edit_config(tmp_path / "source", tie_word_embeddings=True)
    with pytest.raises(skipless.InputError, match=r"lm_head\.weight: expected the numbers of model\.embed"):
        skipless.fuse(tmp_path / "source", tmp_path / "fused", layout="skipless")
    assert not (tmp_path / "fused").exists()
    table = load_file(tmp_path / "source" / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(tmp_path / "source", **{"lm_head.weight": table})
    skipless.fuse(tmp_path / "source", tmp_path / "fused", layout="skipless")
    assert error(tmp_path / "source", tmp_path / "fused") < FP64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--remove", "stream"], "the stream seam of layer 0 is blocked by residual 'both'"),
        (
            ["--remove", "biases"],
            "remove: expected some of norms, stream, values, queries, p, head, first_layer; found 'biases'",
        ),
        (["--remove", "queries"], "the queries seam of layer 0 is blocked by position_type 'rope'"),
        (["--remove", "queries,stream"], "remove: expected queries without stream and first_layer"),
        (["--basis", "q"], "basis: expected none"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options, message, tmp_path):
    saved("llama", tmp_path / "source")
    arguments = ["fuse", str(tmp_path / "source"), str(tmp_path / "fused"), "--layout", "skipless", *options]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "fused").exists()


def test_one_after_the_other_is_as_good_as_both_at_once(fused, tmp_path):
    source, both = fused
    skipless.fuse(source, tmp_path / "norms", layout="skipless", remove=("norms",))
    skipless.fuse(tmp_path / "norms", tmp_path / "values", remove=("values",))
    assert numbers(tmp_path / "values") == numbers(both)
    assert error(source, tmp_path / "values") < FP64


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "phi3", "gemma", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_stored_in_any_dtype(name, dtype, tmp_path):
    saved(name, tmp_path / "source")
    skipless.fuse(tmp_path / "source", tmp_path / "fused", layout="skipless", dtype=dtype)
    assert skipless.verify(tmp_path / "source", tmp_path / "fused", dtypes=(dtype,), tokens=4).same


@pytest.mark.parametrize("fused", ["gemma3-mixed"], indirect=True)
@pytest.mark.parametrize(
    "changes",
    [{"layer_types": KINDS[::-1]}, {"layer_types": None}, {"attention_multiplier": None}, {"sliding_window": 6}],
    ids=str,
)
def test_what_layers_that_differ_say_matters(fused, changes):
    (fused[1] / "skipless.json").unlink()
    config = json.loads((fused[1] / "config.json").read_text())
    if changes == {"layer_types": None}:
        changes = {**changes, "rope_parameters": config["rope_parameters"]["sliding_attention"]}
    edit_config(fused[1], **changes)
    assert differs(*fused)


@pytest.mark.parametrize("fused", ["gemma3-mixed"], indirect=True)
def test_layers_that_differ_generate_with_a_cache_of_fixed_size(fused):
    prompt, options = torch.arange(5, 10)[None], {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    expected = opened(fused[0]).generate(prompt, **options)
    found = opened(fused[1]).generate(prompt, cache_implementation="static", **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("fused", ["gemma"], indirect=True)
@pytest.mark.parametrize("changes", [{"gain_offset": 0.0}, {"embedding_multiplier": None}], ids=str)
def test_what_gemma_alone_says_matters(fused, changes):
    (fused[1] / "skipless.json").unlink()
    edit_config(fused[1], **changes)
    assert differs(*fused)


def test_shards_and_resuming(tmp_path):
    saved("phi3", tmp_path / "source")
    options = {"layout": "skipless", "max_shard_size": 20_000}
    skipless.fuse(tmp_path / "source", tmp_path / "whole", **options)
    stop_fuse(tmp_path / "source", tmp_path / "again", 2, **options)
    skipless.fuse(tmp_path / "source", tmp_path / "again", resume=True, **options)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_what_a_user_sees(tmp_path):
    saved("llama-tied-wide", tmp_path / "source")
    arguments = ["fuse", str(tmp_path / "source"), str(tmp_path / "fused"), "--layout", "skipless"]
    planned = CliRunner().invoke(cli.main, [*arguments, "--dry-run"])
    result = CliRunner().invoke(cli.main, arguments)
    assert planned.exit_code == result.exit_code == 0
    for text in (planned.stdout, result.stdout):
        assert "704 (3.5%)" in text
        assert "model.norm stays as it is: tie_word_embeddings" in text
    card = (tmp_path / "fused" / "README.md").read_text()
    assert "- 2 values seams closed by rows: 576 weights less" in card
    assert "model.norm stays as it is: tie\\_word\\_embeddings" in card
    assert {file.name for file in (tmp_path / "fused").iterdir()} == {
        "README.md", "config.json", "configuration_skipless.py", "generation_config.json", "model.safetensors",
        "modeling_skipless.py", "skipless.json",
    }  # fmt: skip
    assert CliRunner().invoke(cli.main, ["verify", str(tmp_path / "fused")]).exit_code == 0
    counted = json.loads(CliRunner().invoke(cli.main, ["count", str(tmp_path / "source"), "--json"]).stdout)
    assert counted["models"][0]["left_out"] == 704


@pytest.mark.parametrize(
    "wrong",
    [lambda found: found.roll(1, 0), lambda found: torch.cat([found[:-1], 0 * found[-1:]])],
    ids=["another output", "without the bias of Q"],
)
def test_queries_that_do_not_follow_keys_are_found(wrong, tmp_path, monkeypatch):
    def turned_back(seam, found, affines, right=rows.turned_back):
        if seam.kind == "queries":
            (q,) = seam.readers
            found = {**found, q: Affine(wrong(found[q].weight.T).T)}
        return right(seam, found, affines)

    saved("gpt2", tmp_path / "source")
    monkeypatch.setattr(rows, "turned_back", turned_back)
    with pytest.raises(skipless.errors.BugError, match=r"scores: expected to differ .* nothing was published"):
        skipless.fuse(tmp_path / "source", tmp_path / "fused", layout="skipless", remove=("queries",))


@pytest.mark.parametrize("wrong", ["the other part", "not what is rotated"])
def test_what_rope_rotates_stays(wrong, tmp_path, monkeypatch):
    """A seam of what stands first in each head, which RoPE rotates, or rotated keys that are other heads'."""

    def parts(seam, affines, columns, right=rows._parts):
        rotated, others = right(seam, affines, columns)
        if wrong == "the other part":
            return tuple(part.flip(-1) for part in right(seam, affines, columns.flip(-1)))
        return rotated.roll(1, -2), others

    saved("gpt_neox", tmp_path / "source")
    monkeypatch.setattr(rows, "_parts", parts)
    with pytest.raises(skipless.errors.BugError, match=r"expected to differ .* nothing was published"):
        skipless.fuse(tmp_path / "source", tmp_path / "fused", layout="skipless", remove=("queries",))


@pytest.mark.parametrize(("fused", "rotated"), [("gpt2", []), ("gpt_neox", [8, 8])], indirect=["fused"])
def test_a_bias_of_keys_goes_where_it_cancels(fused, rotated):
    tensors = load_file(fused[1] / "model.safetensors")
    assert not any("k_proj.bias" in name for name in tensors)
    assert any("q_proj.bias" in name for name in tensors)
    assert [len(bias) for name, bias in tensors.items() if "k_rope_proj.bias" in name] == rotated


def test_a_cap_takes_no_bias_of_keys_away(tmp_path):
    source = save(build(position_type="learned", attention_bias=True, attn_logit_softcapping=0.5), tmp_path / "source")
    with pytest.raises(InputError, match=r"queries seam of layer 0 is blocked by attn_logit_softcapping: .* bias of K"):
        skipless.fuse(source, tmp_path / "fused", remove=["queries"])


@pytest.mark.parametrize(
    "fields",
    [
        {"position_type": "alibi", "attention_bias": True, "num_key_value_heads": 4},
        pytest.param({"position_type": "none", "attention_shaping": "full", "qkv_bias": True}, marks=pytest.mark.slow),
        pytest.param({"position_type": "learned", "residual": "both", "norm_type": "rms"}, marks=pytest.mark.slow),
        pytest.param({"position_type": "alibi", "block_type": "parallel"}, marks=pytest.mark.slow),
        {"rope_parameters": HALF_ROPE, "attention_bias": True},
        pytest.param({"rope_parameters": HALF_ROPE, "position_type": "rope_interleaved"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_queries_of_skipless_models(fields, tmp_path):
    source, fused = save(build(vocab_size=96, **fields), tmp_path / "source"), tmp_path / "fused"
    plan = skipless.fuse(source, fused, remove=("queries", "values"))
    a = skipless.count(source).architecture
    blocks = a.num_hidden_layers * a.num_key_value_heads * (a.head_dim**2 + a.unrotated**2)
    added = a.num_hidden_layers * a.hidden_size * (a.qkv_biased and not a.attention_bias)  # P's, for V's
    biases = a.num_hidden_layers * a.num_key_value_heads * (a.head_dim + a.unrotated) * a.qkv_biased
    removed = blocks + biases - added
    assert plan.parameters[0] - plan.parameters[1] == removed
    assert error(source, fused) < FP64
    found = skipless.verify(source, fused, dtypes=(), tokens=4)
    assert found.same
    assert found.proved
    spoil(fused, lambda tensors: tensors["model.layers.1.self_attn.k_proj.weight"][:, 0].add_(0.1))
    assert differs(source, fused)

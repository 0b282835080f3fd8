"""Models with skips and norms, folded within their own layout: judged by transformers' own classes."""

import dataclasses
import json
import re

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import skipless
from skipless import cli
from skipless.architecture import folds as room
from skipless.checkpoint.headers import Folder
from skipless.errors import BugError
from skipless.inference import InDouble
from skipless.removals import neutral
from skipless.rewrite import maps, request
from tests.families import GPT, LLAMA, MODELS, saved
from tests.models import build, edit_config, save
from tests.tolerances import TOLERANCES

# Heads that are matrices of their own, where the family ties them to the embeddings, and biases where it has none.
UNTIED = {
    "gemma-untied": ("Gemma", {**LLAMA, "head_dim": 16, "tie_word_embeddings": False, "attention_bias": True}),
    "cohere-untied": ("Cohere", {**LLAMA, "tie_word_embeddings": False}),
    "mpt-untied": (*MODELS["mpt"][:1], {**MODELS["mpt"][1], "tie_word_embeddings": False}),
    "gpt2-narrow": ("GPT2", {**GPT, "n_layer": 1, "n_head": 8}),
}
# What has nothing that can be moved, and why.
WITHOUT = {
    "opt-bare": "this model has no norms and no biases",
    "falcon-7b": "input_layernorm .* has a bias, and its readers q_proj, k_proj, v_proj, up_proj have none",
    "falcon-40b": "input_layernorm .* has a bias, and its readers q_proj, k_proj, v_proj have none",
    "stablelm": "input_layernorm .* has a bias, and its readers q_proj, k_proj, v_proj have none",
    "stablelm-parallel": "has a bias, and its readers q_proj, k_proj, v_proj, gate_proj, up_proj have none",
}
FOLDED = [name for name in (*MODELS, *UNTIED) if name not in WITHOUT]
# One of each kind of layout, for the quick tests: separate, fused, grouped, transposed, with experts, with 1 + w.
QUICK = {"llama", "phi3", "gpt_neox", "gpt2", "mixtral", "gemma2"}


def quick_or_slow(cases, quick=lambda case: case in QUICK):
    """The cases, all but some marked as slow."""
    return [
        case if quick(case) else pytest.param(*[case] if isinstance(case, str) else case, marks=pytest.mark.slow)
        for case in cases
    ]


@pytest.fixture(autouse=True)
def _untied(monkeypatch):
    for name, model in UNTIED.items():
        monkeypatch.setitem(MODELS, name, model)


def logits(folder):
    """Of a model folder, by transformers' own class of its type, in fp64 throughout."""
    # Falcon's eager attention adds its ALiBi twice
    attention = "sdpa" if json.loads((folder / "config.json").read_text())["model_type"] == "falcon" else "eager"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64,
        attn_implementation=attention,
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values())
    assert not type(model).__module__.startswith("skipless")
    ids = torch.randint(2, 96, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), InDouble():
        return model.eval()(input_ids=ids, use_cache=False).logits


def error(before, after):
    """Of the largest logit."""
    return ((logits(after) - logits(before)).abs().max() / logits(before).abs().max()).item()


def spoil(folder, change):
    """Change a folder's tensors, and take away what would tell by their bytes."""
    (folder / "skipless.json").unlink(missing_ok=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", quick_or_slow(FOLDED))
def test_every_family_is_the_same_function(name, tmp_path):
    saved(name, tmp_path / "source")
    promised = skipless.count(tmp_path / "source")
    plan = skipless.fuse(tmp_path / "source", tmp_path / "folded")
    assert error(tmp_path / "source", tmp_path / "folded") < TOLERANCES[torch.float64]
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("source", "folded"))
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("source", "folded")]
    assert configs[0] == configs[1]
    # all that is promised, to the number, and each is neutral
    gain = 0.0 if "gemma" in name else 1.0
    vectors = [(before[n], after[n], 0.0 if n.endswith("bias") else gain) for n in before if before[n].dim() == 1]
    emptied = sum(((new == value) & (old != value)).sum().item() for old, new, value in vectors)
    assert emptied == plan.neutral == promised.by_fuse > 0
    assert skipless.audit(tmp_path / "source", remove=tuple(plan.kinds)).moves == emptied
    assert skipless.audit(tmp_path / "source").by_fuse == emptied
    assert tuple(plan.note.splitlines()) == promised.stays


@pytest.mark.parametrize("name", quick_or_slow(WITHOUT, lambda name: name == "falcon-40b"))
def test_what_cannot_be_moved_is_refused_by_name(name, tmp_path):
    saved(name, tmp_path / "source")
    with pytest.raises(skipless.InputError, match=f"nothing to move: .*{WITHOUT[name]}"):
        skipless.fuse(tmp_path / "source", tmp_path / "folded")
    assert not (tmp_path / "folded").exists()
    assert skipless.count(tmp_path / "source").by_fuse == 0


# An identity, and what must not be left as it was: (model, a tensor that is stored in the source and is not after).
READERS = [
    ("llama", "model.layers.1.self_attn.q_proj.weight"),
    ("llama", "model.layers.1.self_attn.k_proj.weight"),
    ("llama", "model.layers.1.self_attn.v_proj.weight"),
    ("llama", "model.layers.0.mlp.gate_proj.weight"),
    ("llama", "model.layers.0.mlp.up_proj.weight"),
    ("llama", "lm_head.weight"),
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.1.w3.weight"),
    ("qwen3_moe", "model.layers.1.mlp.gate_proj.weight"),
    ("gemma", "model.layers.0.input_layernorm.weight"),
    ("gemma2", "model.layers.0.pre_feedforward_layernorm.weight"),
    ("phi3", "model.layers.0.mlp.gate_up_proj.weight"),
    ("phi", "lm_head.bias"),
    ("phi", "model.layers.0.mlp.fc1.bias"),
    ("gpt2", "transformer.h.0.attn.c_attn.weight"),
    ("gpt2", "transformer.h.0.attn.c_attn.bias"),
    ("gpt2", "transformer.h.1.attn.c_proj.bias"),
    ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.bias"),
    ("gpt_neox", "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"),
    ("bloom", "transformer.h.0.self_attention.query_key_value.weight"),
    ("opt", "model.decoder.layers.0.self_attn.v_proj.bias"),
    ("cohere", "model.layers.1.mlp.up_proj.weight"),
    ("gpt_bigcode", "transformer.h.0.attn.c_proj.bias"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tensor"), quick_or_slow(READERS, lambda case: case[0] in ("mixtral", "gemma2")))
def test_a_tensor_left_as_it_was_shows(name, tensor, tmp_path):
    saved(name, tmp_path / "source")
    skipless.fuse(tmp_path / "source", tmp_path / "folded")
    original = load_file(tmp_path / "source" / "model.safetensors")[tensor]
    spoil(tmp_path / "folded", lambda tensors: tensors.update({tensor: original}))
    assert error(tmp_path / "source", tmp_path / "folded") > 1e-5
    assert not skipless.verify(tmp_path / "source", tmp_path / "folded", dtypes=(), tokens=4).same


def forced(monkeypatch, writer, **changes):
    """Have one seam be folded whatever stands in its way."""

    def all_of_them(architecture):
        for seam in room.folds(architecture):
            yield dataclasses.replace(seam, blocked=None, **changes) if seam.writers[0].endswith(writer) else seam

    monkeypatch.setattr(request, "folds", lambda architecture: list(all_of_them(architecture)))


@pytest.mark.parametrize(
    ("name", "writer"),
    [
        ("qwen2", "1.self_attn.k_proj"),  # with RoPE it does not cancel
        ("phi", "0.self_attn.k_proj"),  # nor on the part that is rotated
    ],
)
def test_what_stays_would_have_changed_the_function(name, writer, tmp_path, monkeypatch):
    saved(name, tmp_path / "source")
    forced(monkeypatch, writer, width=8)
    with pytest.raises(BugError, match="k_proj: expected to differ"):
        skipless.fuse(tmp_path / "source", tmp_path / "folded")
    monkeypatch.setattr(maps, "expect_explained", lambda differences, how: None)
    skipless.fuse(tmp_path / "source", tmp_path / "folded")
    assert error(tmp_path / "source", tmp_path / "folded") > 1e-5


@pytest.mark.parametrize(
    ("name", "table", "norm"),
    [("gpt2", "transformer.wte", "transformer.ln_f"), ("cohere", "model.embed_tokens", "model.norm")],
)
def test_a_tied_table_cannot_take_the_last_norms_gain_in(name, table, norm, tmp_path):
    saved(name, tmp_path / "source")
    skipless.fuse(tmp_path / "source", tmp_path / "folded")

    def naively(tensors):
        tensors[f"{table}.weight"] *= tensors[f"{norm}.weight"]
        tensors[f"{norm}.weight"] = torch.ones_like(tensors[f"{norm}.weight"])

    spoil(tmp_path / "folded", naively)
    assert error(tmp_path / "source", tmp_path / "folded") > 1e-5


@pytest.mark.parametrize(
    ("name", "writer", "readers"),
    [
        ("gemma2", "0.attention_output_norm", ("mlp.gate_proj", "mlp.up_proj")),  # Gemma 2's post_attention_layernorm
        ("olmo2", "0.attention_output_norm", ("mlp.gate_proj", "mlp.up_proj")),
        ("qwen3", "0.self_attn.q_norm", ("self_attn.q_proj",)),
        ("gpt_neox", "0.post_attention_layernorm", ("mlp.up_proj", "self_attn.q_proj")),
        ("phi", "0.input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mixtral", "0.post_attention_layernorm", tuple(f"mlp.experts.{e}.up_proj" for e in range(3))),
    ],
)
def test_a_norm_folded_into_the_wrong_matrices_is_not_published(name, writer, readers, tmp_path, monkeypatch):
    saved(name, tmp_path / "source")
    forced(monkeypatch, writer, readers=tuple(f"model.layers.0.{reader}" for reader in readers))
    with pytest.raises((BugError, RuntimeError)):
        skipless.fuse(tmp_path / "source", tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        ("_folded", lambda norm, reader, dtype: reader),
        (
            "_folded",
            lambda norm, reader, dtype: dataclasses.replace(reader, weight=reader.weight * norm.weight[:, None]),
        ),
        ("_with_values", lambda seam, values, p: p),
        ("shared", lambda values, groups, heads: values.repeat(heads // groups)),
        ("read", lambda x, weight: -(x @ weight.double())),
    ],
    ids=["no gain", "no bias", "no value bias", "heads out of order", "sign"],
)
@pytest.mark.parametrize("dtype", [None, pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_the_self_check_finds_what_is_wrong(function, wrong, dtype, tmp_path, monkeypatch):
    name = "gpt2" if function != "shared" else "llama-mha-biased"
    monkeypatch.setitem(MODELS, "llama-mha-biased", ("Llama", {**LLAMA, "attention_bias": True}))
    saved(name, tmp_path / "source")
    monkeypatch.setattr(neutral, function, wrong)
    with pytest.raises(BugError, match=r"expected to differ from the source's by at most .* nothing was published"):
        skipless.fuse(tmp_path / "source", tmp_path / "folded", dtype=dtype)
    assert not (tmp_path / "folded").exists()


@pytest.mark.parametrize(
    "name", quick_or_slow(["llama", "gemma2", "mixtral", "gpt2", "phi3"], lambda name: name == "llama")
)
def test_verify_says_yes_and_no(name, tmp_path):
    saved(name, tmp_path / "source")
    skipless.fuse(tmp_path / "source", tmp_path / "folded")
    assert skipless.verify(tmp_path / "source", tmp_path / "folded", dtypes=()).same

    def change(tensors):
        tensor = next(tensors[name] for name in sorted(tensors) if "layers.1." in name or ".h.1." in name)
        tensor.reshape(-1)[3] += 1e-3

    spoil(tmp_path / "folded", change)
    assert not skipless.verify(tmp_path / "source", tmp_path / "folded", dtypes=()).same


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "mixtral", "phi"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_stored_in_any_dtype(name, dtype, tmp_path, caplog):
    saved(name, tmp_path / "source")
    skipless.fuse(tmp_path / "source", tmp_path / "folded", dtype=dtype)
    headers = Folder(tmp_path / "folded").headers
    assert {header.dtype for header in headers.values()} == {
        {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    }
    assert json.loads((tmp_path / "folded" / "config.json").read_text())["dtype"] == dtype
    assert not [record for record in caplog.records if record.name.startswith("skipless")]
    assert skipless.verify(tmp_path / "source", tmp_path / "folded", dtypes=()).same


def test_verify_proves_what_it_does_not_run(tmp_path, monkeypatch):
    """That all tensors and maps agree covers tokens and positions that no run sees."""
    monkeypatch.setitem(
        MODELS, "long", ("Llama", {**LLAMA, "max_position_embeddings": 10**5, "tie_word_embeddings": True})
    )
    saved("long", tmp_path / "source")
    skipless.fuse(tmp_path / "source", tmp_path / "folded")
    found = skipless.verify(tmp_path / "source", tmp_path / "folded", dtypes=(), tokens=4)
    assert found.same
    assert found.proved
    assert found.not_run
    assert found.maps[0].error < 1e-12

    def neutral_too(tensors):
        tensors["model.norm.weight"] = torch.ones(32).double()

    spoil(tmp_path / "folded", neutral_too)
    found = skipless.verify(tmp_path / "source", tmp_path / "folded", dtypes=(), tokens=4)
    assert found.tensors == ("model.norm.weight",)
    assert "model.norm.weight: expected as in A" in found.note


def test_gains_that_leave_a_matrix_too_small_for_its_dtype_are_told(tmp_path, caplog):
    saved("llama", tmp_path / "source")

    def small(tensors):
        for name in list(tensors):
            gain = 1e-5 if "post_attention_layernorm" in name else 1.0
            tensors[name] = (tensors[name] * gain).to(torch.bfloat16)

    spoil(tmp_path / "source", small)
    skipless.fuse(tmp_path / "source", tmp_path / "fine", dtype="float32")
    assert not caplog.text
    skipless.fuse(tmp_path / "source", tmp_path / "folded", dtype="float16")
    assert "above the" in caplog.text
    assert "use a finer --dtype" in caplog.text


def test_only_what_is_asked_for(tmp_path):
    saved("gpt2", tmp_path / "source")
    before = load_file(tmp_path / "source" / "model.safetensors")
    for kinds, same in ((("norms",), "h.0.attn.c_proj.bias"), (("biases",), "h.0.mlp.c_fc.weight")):
        plan = skipless.fuse(tmp_path / "source", tmp_path / kinds[0], remove=kinds)
        assert plan.neutral == {"norms": 2 * 2 * 2 * 32, "biases": 2 * 2 * 32}[kinds[0]]
        assert torch.equal(
            load_file(tmp_path / kinds[0] / "model.safetensors")[f"transformer.{same}"], before[f"transformer.{same}"]
        )
        assert error(tmp_path / "source", tmp_path / kinds[0]) < TOLERANCES[torch.float64]
    skipless.fuse(tmp_path / "norms", tmp_path / "both", remove=("biases",))
    assert error(tmp_path / "source", tmp_path / "both") < TOLERANCES[torch.float64]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "llama",
            ["--remove", "stream"],
            "remove: expected some of norms, biases .* found 'stream': norms and skip con",
        ),
        ("llama", ["--remove", "biases"], "remove: biases: nothing to move: this model has none"),
        ("qwen2", ["--remove", "norms,biases"], "remove: biases: nothing to move: .*k_proj .* keys are rotated"),
        ("llama", ["--basis", "q"], "basis: expected none .* found 'q'"),
        ("llama", ["--layers-open", "0"], "layers_open: expected none"),
        ("llama", ["--rest-dtype", "float32"], "rest_dtype: expected none"),
        ("llama", ["--parallel-removes", "p"], "parallel_removes: expected none"),
    ],
    ids=str,
)
def test_options_that_a_family_cannot_have(name, options, message, tmp_path):
    saved(name, tmp_path / "source")
    result = CliRunner().invoke(cli.main, ["fuse", str(tmp_path / "source"), str(tmp_path / "folded"), *options])
    assert result.exit_code == 2
    assert re.search(message, result.stderr)
    assert not (tmp_path / "folded").exists()


def test_the_family_layout_is_no_skipless_models(tmp_path):
    save(build(), tmp_path / "source")
    with pytest.raises(skipless.InputError, match="layout: expected skipless for a skipless model, found 'family'"):
        skipless.fuse(tmp_path / "source", tmp_path / "folded", layout="family")


def test_what_a_user_sees(tmp_path):
    saved("gemma2", tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    arguments = ["fuse", str(tmp_path / "source"), str(tmp_path / "folded")]
    planned = CliRunner().invoke(cli.main, [*arguments, "--dry-run"])
    result = CliRunner().invoke(cli.main, arguments)
    assert planned.exit_code == result.exit_code == 0
    for text in (planned.stdout, result.stdout):
        assert "fold norms" in text
        assert "model.norm stays as it is: tie_word_embeddings" in text
    card = (tmp_path / "folded" / "README.md").read_text()
    assert "loads as any gemma2 model does. 128 of" in card
    assert "stays as it is: what it gives joins the stream" in card
    assert {file.name for file in (tmp_path / "folded").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "skipless.json", "tokenizer.json",
    }  # fmt: skip
    assert CliRunner().invoke(cli.main, ["verify", str(tmp_path / "folded")]).exit_code == 0
    audited = CliRunner().invoke(cli.main, ["audit", str(tmp_path / "source"), "--remove", "norms"])
    assert audited.exit_code == 0
    assert "safe to move: 128 numbers" in audited.stdout
    counted = json.loads(CliRunner().invoke(cli.main, ["count", str(tmp_path / "source"), "--json"]).stdout)
    assert counted["models"][0]["by_fuse"] == 128


def test_buffers_go_and_another_models_tensors_stay(tmp_path):
    saved("gpt2", tmp_path / "source")
    spoil(tmp_path / "source", lambda tensors: tensors.update({"transformer.h.0.attn.bias": torch.ones(4, 4).bool()}))
    skipless.fuse(tmp_path / "source", tmp_path / "folded")
    assert "transformer.h.0.attn.bias" not in load_file(tmp_path / "folded" / "model.safetensors")
    saved("gemma3", tmp_path / "text")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": config, "vision_config": {}, "dtype": "float64"}
    (tmp_path / "text" / "config.json").write_text(json.dumps(whole))
    seen = torch.randn(3, 5)
    spoil(tmp_path / "text", lambda tensors: tensors.update({"vision_tower.patch.weight": seen}))
    skipless.fuse(tmp_path / "text", tmp_path / "both", dtype="float32")
    assert torch.equal(load_file(tmp_path / "both" / "model.safetensors")["vision_tower.patch.weight"], seen)
    written = json.loads((tmp_path / "both" / "config.json").read_text())
    assert written["dtype"] == written["text_config"]["dtype"] == "float32"


def test_the_language_model_of_a_larger_one_is_verified(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**LLAMA, "head_dim": 16},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(tmp_path / "source")
    for dtype in (None, "float32"):
        folded = tmp_path / f"folded-{dtype}"
        skipless.fuse(tmp_path / "source", folded, dtype=dtype)
        report = skipless.verify(tmp_path / "source", folded, dtypes=(), tokens=8)
        assert (report.same, report.data.function) == (True, ())
    edit_config(
        folded, text_config=json.loads((folded / "config.json").read_text())["text_config"] | {"rms_norm_eps": 0.1}
    )
    assert "text_config" in skipless.verify(tmp_path / "source", folded, dtypes=(), tokens=8).data.function[0]


def test_shards_and_resuming(tmp_path, monkeypatch):
    saved("mixtral", tmp_path / "source")
    skipless.fuse(tmp_path / "source", tmp_path / "whole", max_shard_size=40_000)
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2

    def stop(plan, task, seen=[]):  # noqa: B006
        seen.append(task)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        skipless.fuse(tmp_path / "source", tmp_path / "again", max_shard_size=40_000, progress=stop)
    assert not (tmp_path / "again").exists()
    skipless.fuse(tmp_path / "source", tmp_path / "again", max_shard_size=40_000, resume=True)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()

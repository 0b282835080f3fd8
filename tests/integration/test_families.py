"""Other people's models against transformers itself: tiny random models of each family."""

import contextlib
import importlib
import json
import math
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

import skipless
from skipless.checkpoint import families, family, inexpressible
from skipless.checkpoint.opening import open_source
from skipless.reports.counting import Conditions, count, count_architecture, table
from tests.families import GPT, MODELS, saved
from tests.pages import files

each_model = pytest.mark.parametrize("name", MODELS)

# What transformers calls the modules of each part, by the ends of their names; fused ones are split by width.
PARTS = {
    "embeddings": (
        "embed_tokens",
        "wte",
        "wpe",
        "embed_positions",
        "embed_in",
        "embed_out",
        "word_embeddings",
        "lm_head",
    ),
    "qkv": ("qkv_proj", "attn.c_attn", "query_key_value", "Wqkv"),
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "p": ("o_proj", "attn.out_proj", "attn.c_proj", "dense", "self_attn.out_proj"),
    "m": ("gate_proj", "up_proj", "gate_up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "experts.gate_up_proj"),
    "o": ("down_proj", "fc2", "fc_out", "mlp.c_proj", "dense_4h_to_h", "experts.down_proj"),
    "other": ("mlp.gate", "block_sparse_moe.gate", "project_in", "project_out"),
}


def parts_of(model, architecture):
    """Parameters by part, by transformers' own names."""
    parts = dict.fromkeys(("embeddings", *"qkvpmo", "norms", "biases", "other"), 0)
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            module = name  # experts are parameters, not modules
        if "norm" in module or ".ln_" in module:
            parts["norms"] += parameter.numel()
        elif kind == "bias":
            parts["biases"] += parameter.numel()
        else:
            (part,) = {part for part, ends in PARTS.items() if any(("." + module).endswith("." + end) for end in ends)}
            if part == "qkv":
                widths = architecture.projections
                for letter in "qkv":
                    parts[letter] += parameter.numel() * widths[letter] // sum(widths.values())
            else:
                parts[part] += parameter.numel()
    return parts


@each_model
def test_every_parameter_is_counted_where_it_belongs(name, tmp_path):
    model = saved(name, tmp_path)
    found = count(tmp_path)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.parts == parts_of(model, found.architecture)
    source = open_source(tmp_path)
    assert sum(info.weights for info in source.reader.tensors.values()) == found.parameters
    for tensor, info in source.reader.tensors.items():
        assert source.reader.tensor(tensor).shape == info.shape


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == "qwen3-235b-a22b"))  # of many modules
        for name in table()["models"]
        if not name.startswith("palm")
    ],
)
def test_well_known_models_have_as_many_parameters_as_transformers_gives_them(name):
    fields = {field: value for field, value in table()["models"][name].items() if field != "parameters"}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        )
    assert count(name).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "billions"), [("palm-8b", 8.63), ("palm-62b", 62.50), ("palm-540b", 540.35)])
def test_palm_has_as_many_parameters_as_its_paper_says(name, billions):
    """arXiv:2204.02311, table 1."""
    found = count(name)
    assert round(found.weights / 1e9, 2) == billions
    a = found.architecture
    assert (a.block_type, a.num_key_value_heads, a.head_dim, a.ffn_type) == ("parallel", 1, 256, "glu")
    assert (a.query_width == a.hidden_size) == (name != "palm-540b")
    assert found.parts["norms"] == (a.num_hidden_layers + 1) * a.hidden_size


INEXPRESSIBLE = [
    ("DeepseekV2", "kv_lora_rank", "deepseek-ai/DeepSeek-V2-Lite"),
    ("DeepseekV3", "kv_lora_rank", "deepseek-ai/DeepSeek-V3"),
    ("Llama4", "no_rope_layers", "meta-llama/Llama-4-Scout-17B-16E"),
    ("Llama4Text", "no_rope_layers", "llama-4-maverick"),
    ("Gemma3n", "altup_num_inputs", "google/gemma-3n-E4B-it"),
    ("Gemma4", "per_layer_config", "google/gemma-4-31B"),
    ("Qwen3Next", "linear_num_value_heads", "Qwen/Qwen3-Next-80B-A3B-Instruct"),
    ("GptOss", "swiglu_limit", "openai/gpt-oss-20b"),
]


@pytest.mark.parametrize(("kind", "field", "name"), INEXPRESSIBLE)
def test_a_family_that_cannot_be_said_is_refused_by_the_field_in_the_way(kind, field, name, tmp_path):
    config = getattr(transformers, f"{kind}Config", None)
    if config is None:
        pytest.skip(f"this release of transformers has no {kind}")
    source = tmp_path / "source"
    config().save_pretrained(source)
    save_file({"x": torch.zeros(1)}, source / "model.safetensors")
    for command in (count, skipless.audit, lambda folder: skipless.fuse(folder, tmp_path / "fused")):
        with pytest.raises(skipless.InputError, match=rf"^config\.json: {field}: .* cannot be counted, audited or"):
            command(source)
    with pytest.raises(skipless.InputError, match=rf"^{name}: cannot be counted"):
        count(name)


SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8}
WITH_BLOCKS = {
    "DeepseekV3": ({**SMALL, **LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 2}, 2 * 4 * (6**2 + 8**2)),
    "Llama4Text": (
        {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "no_rope_layers": [1, 0], "num_local_experts": 2,
         "intermediate_size_mlp": 40},
        (2 + 1) * 2 * 8**2,
    ),
    "GptOss": ({**SMALL, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}, 2 * 2 * 8**2),
}  # fmt: skip


@pytest.mark.parametrize(
    "layers", [None, 0, "x", 10**4000, -1, [1]], ids=["null", "0", "text", "huge", "negative", "list"]
)
def test_blocks_of_a_config_that_is_none(layers):
    config = {"model_type": "llama4_text", "no_rope_layers": [1, 0], "num_key_value_heads": 2, "head_dim": 10**400}
    assert "carry no information" not in inexpressible.find(config).refusal({**config, "num_hidden_layers": layers})


def rebased(linear, starts, size, change, along=0):
    """Give these rows (columns) of a matrix, `size` from each start on, another basis."""
    for start in starts:
        part = linear.weight.data.narrow(along, start, size)
        part.copy_(change @ part if along == 0 else part @ change)
        if along == 0 and linear.bias is not None:
            linear.bias.data[start : start + size] = change @ linear.bias.data[start : start + size]


@pytest.mark.parametrize("kind", WITH_BLOCKS)
def test_blocks_of_families_that_cannot_be_said(kind, tmp_path):
    """As many weights as the refusal says are a change of basis, which changes nothing; where RoPE is, another does."""
    fields, blocks = WITH_BLOCKS[kind]
    if getattr(transformers, f"{kind}Config", None) is None:
        pytest.skip(f"this release of transformers has no {kind}")
    config = getattr(transformers, f"{kind}Config")(**fields)
    config.save_pretrained(tmp_path)
    with pytest.raises(skipless.InputError, match=f"; blocks of {blocks:,} weights carry no information"):
        count(tmp_path / "config.json")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    model = model.double().eval()
    ids, size, changed = torch.randint(96, (2, 12)), 8, 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        before = model(input_ids=ids).logits
        for index, layer in enumerate(model.model.layers):
            attention, groups = layer.self_attn, 4 if kind == "DeepseekV3" else 2
            heads, latent = range(0, 4 * size, 4 * size // groups), kind == "DeepseekV3"
            nope = 6 if latent else size * (kind == "Llama4Text" and not config.no_rope_layers[index])
            for group, head in enumerate(heads):
                own = [head + each for each in range(0, 4 * size // groups, size)]
                change = torch.randn(size, size).double()
                values = (attention.kv_b_proj, 14 * group + 6) if latent else (attention.v_proj, size * group)
                rebased(values[0], [values[1]], size, change)
                rebased(attention.o_proj, own, size, change.inverse(), 1)
                changed += size**2
                if nope:
                    change = torch.randn(nope, nope).double()
                    keys = (attention.kv_b_proj, 14 * group) if latent else (attention.k_proj, size * group)
                    rebased(keys[0], [keys[1]], nope, change)
                    queries = (attention.q_b_proj, [10 * group]) if latent else (attention.q_proj, own)
                    rebased(queries[0], queries[1], nope, change.inverse().T)
                    changed += nope**2
        assert changed == blocks
        after = model(input_ids=ids).logits
        assert (after - before).abs().max() < 1e-5 * before.abs().max()  # transformers computes norms in fp32
        rotated = attention.q_b_proj if latent else model.model.layers[0].self_attn.q_proj
        start = 6 if latent else 0
        rebased(rotated, [start], 4, torch.randn(4, 4).double())
        assert (model(input_ids=ids).logits - before).abs().max() > 1e-3 * before.abs().max()


def test_every_family_that_cannot_be_said_is_tried_here_and_is_described_nowhere():
    tried = {inexpressible.named(name) for _, _, name in INEXPRESSIBLE}
    assert tried == set(inexpressible.FAMILIES)
    described = {name for each in family.every() for name in each.model_types}
    assert not described & {name for each in inexpressible.FAMILIES for name in each.model_types}
    with pytest.raises(skipless.InputError, match=r"config\.json: model_type: expected another, found 'gpt_oss'"):
        family.find({"model_type": "gpt_oss"})


def norm_heads(x, source, letter, config, layer):
    """Queries' and keys' norm, x (tokens, heads * head_dim)."""
    architecture = source.architecture
    if architecture.qk_norm is None:
        return x
    name = f"model.layers.{layer}.self_attn.{letter}_norm"
    weight = source.reader.tensor(f"{name}.weight")
    bias = source.reader.tensor(f"{name}.bias") if f"{name}.bias" in source.reader.tensors else 0
    eps = getattr(config, "rms_norm_eps", None) or config.layer_norm_eps
    width = architecture.head_dim
    if architecture.norm_type == "rms":
        if architecture.qk_norm == "head_dim":
            x = functional.rms_norm(x.unflatten(1, (-1, width)), (width,), eps=eps).flatten(1)
            gain = weight.repeat(x.shape[1] // width)
        else:
            x, gain = functional.rms_norm(x, x.shape[1:], eps=eps), weight
        return x * gain
    x = functional.layer_norm(x.unflatten(1, (-1, width)), (width,), eps=eps)
    return (x * weight.reshape(-1, width) + bias).flatten(1)


def rotate(heads, config, interleaved, layer):
    """RoPE, its angles in fp32 as transformers computes them."""
    values = getattr(config, "rope_parameters", None) or {"rope_theta": 10000.0}
    values = values.get(config.layer_types[layer]) if "full_attention" in values else values
    size = getattr(config, "rotary_dim", None) or int(heads.shape[2] * values.get("partial_rotary_factor", 1.0))
    frequencies = 1 / values["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    angles = torch.outer(torch.arange(heads.shape[1]).float(), frequencies)
    cos, sin = angles.cos().double(), angles.sin().double()
    x, still = heads[..., :size], heads[..., size:]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat([torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1), still], -1)


def attention(source, config, layer, x, spoil=None):
    """The attention's output by canonical matrices alone."""
    architecture, prefix = source.architecture, f"model.layers.{layer}.self_attn"

    def apply(x, name):
        weight = source.reader.tensor(f"{prefix}.{name}.weight")
        weight = weight.roll(1, 0) if name == spoil else weight
        bias = f"{prefix}.{name}.bias"
        return x @ weight.T + (source.reader.tensor(bias) if bias in source.reader.tensors else 0)

    def heads(x):
        return x.unflatten(1, (-1, architecture.head_dim)).transpose(0, 1)

    q = heads(norm_heads(apply(x, "q_proj"), source, "q", config, layer))
    k = heads(norm_heads(apply(x, "k_proj"), source, "k", config, layer))
    v = heads(apply(x, "v_proj"))
    if architecture.position_type.startswith("rope"):
        interleaved = architecture.position_type == "rope_interleaved"
        q, k = (rotate(x, config, interleaved, layer) for x in (q, k))
    groups = architecture.num_attention_heads // architecture.num_key_value_heads
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scale = (getattr(config, "query_pre_attn_scalar", None) or architecture.head_dim) ** -0.5
    scores = scale * q @ k.transpose(1, 2)
    if architecture.position_type == "alibi":
        slopes = 2.0 ** (-8 * torch.arange(1, 5).double() / 4)
        alibi = slopes[:, None, None] * torch.arange(len(x)).double()
        scores = scores + alibi * (scale if config.model_type == "falcon" else 1)
    if cap := getattr(config, "attn_logit_softcapping", None):
        scores = cap * torch.tanh(scores / cap)
    future = torch.ones(scores.shape[1:]).triu(1).bool()
    mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    return apply(mixed.transpose(0, 1).flatten(1), "o_proj")


@each_model
def test_canonical_matrices_are_the_layers_attention(name, tmp_path):
    model = saved(name, tmp_path)
    source, seen = open_source(tmp_path), {}

    def hook(module, args, kwargs, output):
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        output = output[0] if isinstance(output, tuple) else output
        if model.config.model_type == "bloom":
            output = output - args[1]  # the skip connection
        seen[len(seen)] = (x[0], output[0])

    for module_name, module in model.named_modules():
        if module_name.rpartition(".")[2] in ("attn", "self_attn", "attention", "self_attention"):
            module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(torch.arange(3, 12)[None])
        assert len(seen) == source.architecture.num_hidden_layers
        for layer, (x, expected) in seen.items():
            found = attention(source, model.config, layer, x)
            # transformers computes the softmax in fp32
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
            for spoil in ("q_proj", "v_proj", "o_proj"):
                error = (attention(source, model.config, layer, x, spoil) - expected).abs().max()
                assert error > 1e-3 * expected.abs().max(), spoil


def every_family():
    return {found.model_types[0]: found for found in family.every()}


def configs(found):
    """The tiny models' configs of a family."""
    made = [getattr(transformers, f"{kind}Config")(**values).to_dict() for kind, values in MODELS.values()]
    return [config for config in made if config["model_type"] in found.model_types]


def test_every_family_has_a_model_here():
    missing = {name for name, found in every_family().items() if not configs(found)}
    assert missing == {"gguf-llama", "gguf-skipless", "palm"}  # PaLM was not published


@pytest.mark.parametrize("name", every_family())
def test_a_description_has_nothing_nobody_reads(name):
    found, asked = every_family()[name], set()

    class Recorder(family.Lenient):
        def __getitem__(self, field):
            asked.add(field)
            return super().__getitem__(field)

        def __contains__(self, field):
            asked.add(field)
            return super().__contains__(field)

    rules = list(found.fields.values())
    for config in configs(found) or [{}]:
        for rule in rules:
            if callable(rule):
                rule(Recorder({**found.defaults, **config}))
    asked |= {field for rule in rules if not callable(rule) for field in ([rule] if isinstance(rule, str) else rule)}
    assert set(found.defaults) <= asked
    architecture = {"vocab_size", *family.Architecture.__dataclass_fields__}
    assert {*found.fields, *found.fixed} <= architecture
    used = set()
    for config in configs(found):
        built = found.architecture(config)
        for variant in ({}, *found.variants):
            used |= set(family.Layout(found, built, found.prefixes[0], variant).shapes)
    for called in [*found.names.values(), *(name for variant in found.variants for name in variant.values())]:
        probe = called.replace("{e}", "0").replace("{h}", "0")
        assert not used or any(f"{probe}." in tensor for tensor in used), called


def test_a_new_family_is_one_new_file(tmp_path, monkeypatch):
    ((name, text),) = files("add-a-family").items()
    (tmp_path / Path(name).name).write_text(text)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    folder = tmp_path / "model"
    saved("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"], config["breadth"] = "broad", config.pop("hidden_size")
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file({name.replace("q_proj", "wq"): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    try:
        source = open_source(folder)
        assert source.family == count(folder).family == "broad"
        name = "model.layers.1.self_attn.q_proj.weight"
        assert torch.equal(source.reader.tensor(name), tensors[name])
        assert skipless.audit(folder).seams
        skipless.fuse(folder, tmp_path / "folded")
        assert "model.layers.1.self_attn.wq.weight" in load_file(tmp_path / "folded" / "model.safetensors")
    finally:
        sys.modules.pop("skipless.checkpoint.families.broad", None)


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *(("llama", field) for field in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")),
        ("llama", "num_attention_heads"),
        ("gpt2", "n_embd"),
        ("mpt", "d_model"),
        ("opt", "ffn_dim"),
    ],
)
def test_a_dimension_that_is_missing(name, field, tmp_path):
    saved(name, tmp_path)
    with pytest.raises(skipless.InputError, match=rf"config.json: {field}: expected a value .* found none; add it"):
        count(edited(tmp_path, **{field: "absent"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"model.layers.2.self_attn.q_proj.weight: expected \(32, 32\), as config.json says"),
        ({"num_hidden_layers": 1}, "model.layers.1.* expected no such tensor"),
        ({"intermediate_size": 41}, r"gate_proj.weight: expected \(41, 32\), as config.json says; found \(40, 32\)"),
        ({"attention_bias": True}, "q_proj.bias: expected"),
        ({"hidden_size": "wide"}, "hidden_size: expected a positive integer below 2\\^31, found 'wide'"),
        ({"hidden_size": -32}, "hidden_size: expected a positive integer"),
        ({"tie_word_embeddings": 3}, "tie_word_embeddings: expected true or false, found 3"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers: expected at most 100,000"),
        ({"model_type": "t5"}, "model_type: expected one of skipless, .*llama.*; found 't5'; another is described by"),
        ({"model_type": "gemma3", "text_config": [1]}, "text_config: expected an object"),
        ({"model_type": "mpt"}, r"transformer.wte.weight: expected \(96, 32\), as config.json says; found no such"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", [count, skipless.audit])
def test_a_config_that_contradicts_its_tensors_or_itself(command, changes, message, tmp_path):
    saved("llama", tmp_path)
    with pytest.raises(skipless.InputError, match=message):
        command(edited(tmp_path, **changes))


def test_a_wrong_dimension_is_called_as_the_family_calls_it():
    with pytest.raises(skipless.InputError, match=r"config.json: n_embd: expected a positive integer .* found 'wide'"):
        family.read({"model_type": "gpt2", **GPT, "n_embd": "wide"})


@pytest.mark.parametrize("size", [10**9, 10**400, -1, True, 0.5, None, [], "7", {}])
def test_numbers_that_cannot_be_end_quickly(size):
    for found in every_family().values():
        for config in configs(found):
            for name in config:
                if type(config[name]) is int and "token" not in name:
                    with contextlib.suppress(skipless.InputError):
                        found.architecture({**config, name: size})


def rewrite(folder, rename, **extra):
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, **extra}, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon-40b"])
def test_checkpoints_without_their_prefix_and_with_buffers(name, tmp_path):
    saved(name, tmp_path)
    before = open_source(tmp_path).reader
    expected = {tensor: before.tensor(tensor) for tensor in before.tensors}
    extra = {"lm_head.weight": expected["model.embed_tokens.weight"].clone()}
    if name == "gpt2":
        extra["h.0.attn.bias"] = torch.ones(4, 4, dtype=torch.bool)
    rewrite(tmp_path, lambda tensor: tensor.removeprefix("transformer."), **extra)
    after = open_source(tmp_path).reader
    assert all(torch.equal(after.tensor(tensor), value) for tensor, value in expected.items())


def test_sharded_folders(tmp_path):
    model = saved("gpt_neox", tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    one, many = (open_source(tmp_path / folder).reader for folder in ("one", "many"))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert all(torch.equal(one.tensor(tensor), many.tensor(tensor)) for tensor in one.tensors)


def test_a_multimodal_models_language_model():
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "model_type": "gemma3_text"}
    found = family.read({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert (found.num_attention_heads, found.num_key_value_heads, found.vocab_size) == (8, 4, 262208)
    counted = count_architecture("4b", "gemma3", found, {}, Conditions())
    assert counted.parameters == count("gemma-3-4b").parameters


def write_gguf(file, tied=False, quantized=False):
    """A tiny llama, and its tensors as written: name -> (outputs, inputs)."""
    generator = np.random.default_rng(0)
    layer = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    layer |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96), "attn_norm": (64,), "ffn_norm": (64,)}
    shapes = {"token_embd": (128, 64), "output_norm": (64,)} | ({} if tied else {"output": (128, 64)})
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    tensors = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized and values.ndim == 2 else None
        data = values if kind is None else gguf.quants.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_gguf_file(tied, quantized, tmp_path):
    tensors = write_gguf(tmp_path / "tiny.gguf", tied, quantized)
    source = open_source(tmp_path / "tiny.gguf")
    assert source.architecture.tie_word_embeddings == tied
    found = count(tmp_path / "tiny.gguf")
    assert (found.name, found.family) == ("tiny", "gguf-llama")
    assert found.parameters == sum(values.size for values in tensors.values())
    for ours, theirs in {
        "model.layers.1.self_attn.k_proj": "blk.1.attn_k",
        "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
    }.items():
        found, expected = source.reader.tensor(f"{ours}.weight"), torch.from_numpy(tensors[theirs])
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02 if quantized else 0)
    assert {seam.kind for seam in skipless.audit(tmp_path / "tiny.gguf").seams} == {"stream", "p"}


def test_gguf_files_that_are_none(tmp_path):
    file = tmp_path / "tiny.gguf"
    for content in (b"", b"GGUF", b"not a model at all" * 9):
        file.write_bytes(content)
        with pytest.raises(skipless.InputError, match="expected a whole GGUF file"):
            skipless.audit(file)
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:-40_000])
    with pytest.raises(skipless.InputError, match="expected a whole GGUF file"):
        skipless.audit(file)
    with pytest.raises(skipless.InputError, match="expected a GGUF file, found no such file"):
        count(tmp_path / "none.gguf")


def test_a_gguf_file_without_the_package_that_reads_it(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(skipless.InputError, match=r"need the \[gguf\] extra; pip install 'skipless\[gguf\]'"):
        count(tmp_path / "tiny.gguf")

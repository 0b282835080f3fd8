"""Two ranks (gloo, on the CPU) that share a model's weights give the same logits and tokens as one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from skipless.model.modeling_skipless import ALL_PARALLEL_STYLES
from tests.models import build, edit_tensors, load, random_ids, save
from tests.tolerances import FP64

OLD = Version(transformers.__version__) < Version("5.16")
new = pytest.mark.skipif(OLD, reason="a skipless model's ranks need transformers 5.16 or newer")

MHA = {"num_key_value_heads": 4}
MODELS = {
    "original": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "q": {"stream_basis": "q", "p_removed": True},
    "k": {"stream_basis": "k", "p_removed": True, **MHA},
    "v": {"stream_basis": "v", "p_removed": True, **MHA},
    "pivoted": {"stream_basis": "pivoted", "p_removed": True},
    "open": {"stream_basis": "pivoted", "layers_open": [1]},
    "folded": {"stream_basis": "q", "folded_biases": ["model.embed_tokens", "model.layers.1.mlp.down_proj"]},
    "parallel": {"stream_basis": "q", "block_type": "parallel"},
    "parallel-p": {"p_removed": True, "block_type": "parallel"},
    "shaped": {"stream_basis": "q", "p_removed": True, "attention_shaping": "value"},
    "mean": {"stream_basis": "pivoted", "p_removed": True, "attention_shaping": "full"},
    "alibi": {"stream_basis": "q", "position_type": "alibi", "attention_shaping": "full"},
    "wide-p": {"p_removed": True, "head_dim": 16, "num_attention_heads": 4},
    "values": {"values_removed": True, "stream_basis": "pivoted", "head_removed": True},
    "moe": {"ffn_type": "moe", "num_local_experts": 4, "num_experts_per_tok": 2, "p_removed": True},
    "norms": {"norm_type": "rms", "residual": "both", "qk_norm": "head_dim"},
}
TOKENS = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


def generate(model, ids, **options):
    """The logits of the prompt, and the greedy tokens after it."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return logits.tolist(), model.generate(ids, attention_mask=torch.ones_like(ids), **TOKENS, **options).tolist()


def work(folders: list[str]) -> None:
    """What a rank does: load its share of each model, run it, and say what came out and how much it holds."""
    from transformers.distributed import DistributedConfig

    import skipless.model  # noqa: F401

    torch.distributed.init_process_group("gloo")
    for folder in folders:
        try:
            model = load(Path(folder), distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"))
            logits, tokens = generate(model, random_ids(model))
            _, static = generate(model, random_ids(model), cache_implementation="static")
            held = sum(
                weight.to_local().numel() if hasattr(weight, "to_local") else weight.numel()
                for weight in model.parameters()
            )
            found = {"logits": logits, "tokens": tokens, "static": static, "held": held}
        except ValueError as error:
            found = {"error": str(error)}
        if torch.distributed.get_rank() == 0:
            print(json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()


def run_ranks(folders):
    """What rank 0 says of each folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "-m", __name__, *map(str, folders)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def models():
    return {name: build(seed=3, **fields) for name, fields in MODELS.items()}


@pytest.fixture(scope="module")
def ranks(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    spoiled = save(models["q"], folder / "spoiled")
    key = models["q"].model.layers[1].self_attn.k_proj.weight.detach().clone()
    key[-1] += 0.1  # in the second rank's share
    edit_tensors(spoiled, model__layers__1__self_attn__k_proj__weight=key)
    heads = save(build(num_key_value_heads=1), folder / "heads")
    folders = [*(save(model, folder / name) for name, model in models.items()), spoiled, heads]
    return dict(zip([*MODELS, "spoiled", "heads"], run_ranks(folders), strict=True))


def error(found, expected):
    found, expected = torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    return ((found - expected).abs().amax(-1) / expected.abs().amax(-1)).max().item()


@pytest.mark.slow
@new
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks(models, ranks, name):
    logits, tokens = generate(models[name], random_ids(models[name]))
    assert error(ranks[name]["logits"], logits) < FP64
    assert ranks[name]["tokens"] == tokens
    assert ranks[name]["static"] == tokens


@pytest.mark.slow
@new
def test_a_spoiled_share(models, ranks):
    logits, _ = generate(models["q"], random_ids(models["q"]))
    assert error(ranks["spoiled"]["logits"], logits) > 1000 * FP64


@pytest.mark.slow
@new
@pytest.mark.parametrize("name", ["original", "q", "k", "v", "moe"])
def test_a_rank_holds_half(models, ranks, name):
    """Of all matrices but a router, up to an odd row of the vocabulary."""
    model = models[name]
    whole = sum(weight.numel() for module, weight in model.named_parameters() if "router" in module)
    matrices = sum(weight.numel() for weight in model.parameters()) - whole
    assert ranks[name]["held"] - whole == pytest.approx(matrices / 2, abs=2 * model.config.hidden_size)


@pytest.mark.slow
@new
def test_heads_that_do_not_divide(ranks):
    assert ranks["heads"] == {
        "error": "num_key_value_heads: expected a multiple of the 2 ranks of tensor parallelism, found 1"
    }


def test_older_releases_of_transformers_are_refused_by_name():
    for style in ("split_heads", "gather_heads"):
        with pytest.raises(RuntimeError, match=r"transformers 5\.16 or newer"):
            ALL_PARALLEL_STYLES[style].prepare_module_tp(None, None)


if __name__ == "__main__":
    work(sys.argv[1:])

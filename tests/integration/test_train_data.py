"""Training on text of one's own: tokens, tokenizer, start, several batches and processes to a step; and evaluation."""

import dataclasses
import gzip
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from skipless import fuse
from skipless.architecture.config import Architecture
from skipless.cli import main
from skipless.errors import InputError
from skipless.train import corpus, data, run
from skipless.train.estimate import estimate
from skipless.train.evaluation import evaluate
from skipless.train.log import Bar
from skipless.train.recipe import Data, Recipe, Start, Tokenizer, described
from tests.integration.test_train import lines
from tests.models import load, relative_error
from tests.pages import ROOT, page

RECIPE = """
steps = 6
batch_size = 4
sequence_length = 32
muon_lr = 0.02
adamw_lr = 0.01
log_every = 1

[data]
files = "{folder}/text/*.py"
held_out_files = ["{folder}/held_out/*.py"]

[model]
vocab_size = 300
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 4
max_position_embeddings = 64
gate_bias = true
attention_shaping = "value"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to train on, some to hold out, and a recipe."""
    folder = tmp_path_factory.mktemp("data")
    stdlib = Path(sysconfig.get_path("stdlib"))
    for part, names in {"text": ("bisect", "heapq", "stat"), "held_out": ("keyword", "token")}.items():
        (folder / part).mkdir()
        for name in names:
            (folder / part / f"{name}.py").write_text((stdlib / f"{name}.py").read_text()[:3000])
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    return Recipe.read(str(folder / "recipe.toml"))


@pytest.fixture(scope="module")
def trained(folder: Path, recipe: Recipe) -> tuple[Path, dict[str, float]]:
    torch.set_num_threads(1)
    return folder / "trained", run.train(recipe, folder / "trained")


def curve(out: Path) -> list[float]:
    """Each step's loss."""
    return [line["loss"] for line in lines(out) if "loss" in line]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load(out, torch.float32).state_dict()


class TestEval:
    def test_is_what_the_trainer_says_of_the_text_it_held_out(self, folder: Path, trained: tuple[Path, dict[str, Any]]):
        out, result = trained
        command = ["eval", str(out), "--data", f"{folder}/held_out/*.py", "--sequence-length", "32"]
        found = CliRunner().invoke(main, [*command, "--json"])
        assert found.exit_code == 0, found.output
        values = json.loads(found.stdout)
        assert values["loss"] == pytest.approx(result["held_out_loss"], rel=1e-5)
        assert values["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-5)
        assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))
        assert "perplexity" in CliRunner().invoke(main, command).stdout
        other = evaluate(out, [f"{folder}/text/*.py"], sequence_length=32)
        assert other.loss < values["loss"]

    def test_takes_tokens_and_no_more_than_it_is_asked(self, folder: Path, trained: tuple[Path, dict[str, Any]]):
        out, result = trained
        tokens = evaluate(out, [str(out / "checkpoints" / "held_out.bin")], sequence_length=32)
        assert tokens.loss == pytest.approx(result["held_out_loss"], rel=1e-5)
        assert tokens.bits_per_byte is None
        told: list[tuple[int, int | None]] = []
        text, options = [f"{folder}/text/*.py"], {"sequence_length": 32, "progress": lambda *done: told.append(done)}
        assert evaluate(out, text, most_tokens=100, **options).tokens == 96
        assert told == [(96, 100)]
        read = evaluate(out, text, **options).tokens
        assert told[-1] == (read, None)
        assert [done for done, _ in told[1:]] == sorted({done for done, _ in told[1:]})

    def test_refuses_what_it_cannot_do(self, folder: Path, trained: tuple[Path, dict[str, Any]]):
        text = f"{folder}/text/*.py"
        with pytest.raises(InputError, match=r"sequence_length: expected 2 to 64, for which .* found 65"):
            evaluate(trained[0], [text], sequence_length=65)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "load_tokenizer", lambda folder: type("PythonOnly", (), {})())
            with pytest.raises(InputError, match=r"expected a tokenizer with a tokenizer\.json, found PythonOnly"):
                evaluate(trained[0], [text])
        with pytest.raises(InputError, match="sequence_length: expected at most the text's 3 tokens, found 64"):
            evaluate(trained[0], [text], most_tokens=3)
        assert CliRunner().invoke(main, ["eval", str(trained[0]), "--data", str(folder / "no*")]).exit_code == 2


def test_tokens_train_as_the_text_that_they_were_made_of(
    recipe: Recipe, trained: tuple[Path, dict[str, Any]], tmp_path: Path
):
    out, result = trained
    made = out / "checkpoints"
    np.save(tmp_path / "held_out.npy", np.fromfile(made / "held_out.bin", np.uint16).astype(np.int32))
    tokens_of = Data(files=(str(made / "training.bin"),), held_out_files=(f"{tmp_path}/*.npy",))
    tokens = dataclasses.replace(recipe, data=tokens_of, tokenizer=Tokenizer(str(out)))
    found = run.train(tokens, tmp_path / "out")
    assert found["held_out_loss"] == result["held_out_loss"]
    assert found["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=0.02)  # less the ends of documents
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()

    bare = dataclasses.replace(recipe, data=dataclasses.replace(tokens_of, held_out_files=()), steps=1)
    found = run.train(bare, tmp_path / "bare")
    assert found["bits_per_byte"] is None
    assert not (tmp_path / "bare" / "tokenizer.json").exists()


def test_starts_from_a_model_with_its_tokenizer(recipe: Recipe, trained: tuple[Path, dict[str, Any]], tmp_path: Path):
    out, result = trained
    further = dataclasses.replace(recipe, model=None, start=Start(str(out)), steps=1, warmup=0.0, decay=0.0)
    still = dataclasses.replace(further, muon_lr=0.0, adamw_lr=0.0)
    assert run.train(still, tmp_path / "still")["held_out_loss"] == pytest.approx(result["held_out_loss"], rel=1e-6)
    assert all(torch.equal(weight, weights(out)[name]) for name, weight in weights(tmp_path / "still").items())
    run.train(further, tmp_path / "further")
    assert not torch.equal(weights(tmp_path / "further")["lm_head.weight"], weights(out)["lm_head.weight"])
    first, second = (AutoTokenizer.from_pretrained(each) for each in (out, tmp_path / "further"))
    assert first.get_vocab() == second.get_vocab()


def test_skips_and_norms_fade_to_a_model_without_them(folder: Path, trained: tuple[Path, Any], tmp_path: Path):
    """From another family's model, whose head is its table."""
    llama = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    fuse(tmp_path / "llama", tmp_path / "start", layout="skipless", remove=("norms",))
    file, out = tmp_path / "recipe.toml", tmp_path / "out"
    text = (folder / "recipe.toml").read_text().split("[model]")[0].replace("muon_lr = 0.02", "muon_lr = 0.002")
    file.write_text(
        f'save_every = 1\n{text}[tokenizer]\nfolder = "{trained[0]}"\n[start]\nfolder = "{tmp_path}/start"\n'
        "[schedule]\nskips = [1, 4]\nnorms = [2, 5]"
    )
    command = ["train", str(file), str(out), "--json"]
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 0, found.output
    model = load(out, torch.float64)
    assert (model.config.residual, model.config.norm_type) == ("none", "none")
    assert not [name for name in model.state_dict() if "norm" in name or "skip" in name]
    saved = evaluate(out, [f"{folder}/held_out/*.py"], sequence_length=32)
    assert saved.loss == pytest.approx(json.loads(found.stdout)["held_out_loss"], rel=1e-5)  # of the model that faded
    fuse(out, tmp_path / "fused", basis="q", dtype="float64")
    assert relative_error(load(tmp_path / "fused", torch.float64), model) < 1e-9

    again = tmp_path / "again"
    interrupted(Recipe.read(str(file)), again)  # while both fade
    run.train(Recipe.read(str(file)), again, resume=True)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    shorter = CliRunner().invoke(main, [*command, "--resume", "--steps", "4"])
    assert shorter.exit_code == 2
    assert "schedule.norms: expected two steps" in shorter.stderr


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.json")), ids=lambda file: file.stem)
def test_every_example_trains_from_one_command(file: Path, tmp_path: Path):
    np.save(tmp_path / "tokens.npy", np.tile(np.arange(0, 512, 32), 100))
    recipe = RECIPE.split("[data]")[0] + f'[data]\nfiles = "{tmp_path}/tokens.npy"\n'
    rates = {"steps = 6": "steps = 12", "muon_lr = 0.02": "muon_lr = 0.005", "adamw_lr = 0.01": "adamw_lr = 0.005"}
    for old, new in rates.items():
        recipe = recipe.replace(old, new)
    (tmp_path / "recipe.toml").write_text(recipe)
    command = ["train", "--model", str(file), str(tmp_path / "recipe.toml"), str(tmp_path / "out"), "--json"]
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["held_out_loss"] < curve(tmp_path / "out")[0] - 1
    model = load(tmp_path / "out", torch.float32)
    assert set(Architecture.from_config(json.loads(file.read_text())).tensors()) == model.state_dict().keys()


@pytest.mark.parametrize("changes", [{"batch_size": 2, "accumulate": 2}, {"checkpointing": True}])
def test_the_same_step_in_less_memory(
    changes: dict[str, Any], recipe: Recipe, trained: tuple[Path, dict[str, Any]], tmp_path: Path
):
    run.train(dataclasses.replace(recipe, **changes), tmp_path / "out")
    assert curve(tmp_path / "out") == pytest.approx(curve(trained[0]), rel=1e-4)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_with_twice_the_batch(
    folder: Path, recipe: Recipe, trained: tuple[Path, dict[str, Any]], tmp_path: Path
):
    text = (folder / "recipe.toml").read_text()
    (tmp_path / "recipe.toml").write_text(text.replace("batch_size = 4", "batch_size = 2"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "skipless", "train", tmp_path / "recipe.toml", tmp_path / "out", "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("step 6: held out") == 1
    assert json.loads(done.stdout)["held_out_loss"] == pytest.approx(trained[1]["held_out_loss"], rel=1e-4)
    assert curve(tmp_path / "out") == pytest.approx(curve(trained[0]), rel=1e-4)
    alone = run.train(Recipe.read(str(tmp_path / "recipe.toml")), tmp_path / "alone")
    assert alone["held_out_loss"] != pytest.approx(trained[1]["held_out_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1000}, "batch_size: expected at most the text's .* sequences a step, found 1000"),
        ({"sequence_length": 65}, "sequence_length: expected 2 to 64, for which the model has positions .* found 65"),
        ({"sequence_length": 1}, "sequence_length: expected 2 to 64, .* found 1"),
        (
            {"sequence_length": 10**6, "model": {"max_position_embeddings": 10**6}},
            "sequence_length: expected at most the .* tokens of training, found 1000000",
        ),
        ({"data": Data(files=("~no-one/*",))}, "~no-one/.*: expected files, found none"),
        ({"data": Data(files=("nothing/*",))}, r"nothing/\*: expected files, found none"),
        ({"tokenizer": Tokenizer("nowhere")}, "nowhere: expected a tokenizer that transformers loads"),
    ],
)
def test_nothing_is_left_of_what_cannot_be_trained_on(
    changes: dict[str, Any], message: str, recipe: Recipe, tmp_path: Path
):
    model = {**(recipe.model or {}), **changes.get("model", {})}
    with pytest.raises(InputError, match=message):
        run.train(dataclasses.replace(recipe, **{**changes, "model": model}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 100)[:-9]}, "a.jsonl.gz: expected json, found"),
        ({"a.npy": b""}, "a.npy: expected tokens, found"),
        ({"a.bin.gz": gzip.compress(bytes(800))}, "a.bin.gz: expected tokens that are not compressed, found .gz"),
        ({"a.bin": bytes(800), "b.txt": b"a" * 800}, "files: expected files of one kind, found .*a.bin .*b.txt"),
    ],
)
def test_nothing_is_left_of_files_that_cannot_be_read(
    files: dict[str, bytes], message: str, recipe: Recipe, tmp_path: Path
):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    first, *others = (str(tmp_path / name) for name in files)
    with pytest.raises(InputError, match=message):
        run.train(
            dataclasses.replace(recipe, data=Data(files=(first,), held_out_files=tuple(others))), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_when_tokenizing_fails(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any):
        raise OSError("no space left")

    monkeypatch.setattr(corpus, "write_tokens", fail)
    with pytest.raises(OSError, match="no space left"):
        run.train(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("fraction", "held"), [(0.05, 5), (0.03, 3), (0.4, 40), (0.9, 90)])
def test_a_fraction_of_the_documents_is_held_out(fraction: float, held: int, recipe: Recipe, tmp_path: Path):
    written = [f"document {i}" for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in written))
    data = Data(files=(f"{tmp_path}/*.jsonl",), held_out=fraction)
    training, held_out = (list(texts()) for texts in corpus.texts(dataclasses.replace(recipe, data=data)))
    assert len(held_out) == held
    assert held_out[0] == written[0]
    assert sorted(training + held_out) == sorted(written)


def stop_after(patch: pytest.MonkeyPatch, step: int):
    """Ctrl-C, when the checkpoint of this step has been written."""

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any):
        if state.global_step == step:
            raise KeyboardInterrupt

    patch.setattr(Bar, "on_save", interrupt)


def interrupted(recipe: Recipe, out: Path, step: int = 3, resume: bool = False):
    """A run that was stopped after a step."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(KeyboardInterrupt):
            run.train(recipe, out, resume=resume)


def test_a_run_goes_on_with_the_text_that_it_began_with(
    folder: Path, recipe: Recipe, trained: tuple[Path, Any], tmp_path: Path
):
    shutil.copytree(folder / "text", tmp_path / "text")
    data = dataclasses.replace(recipe.data, files=(f"{tmp_path}/text/*",))
    moved = dataclasses.replace(recipe, data=data, save_every=1)
    interrupted(moved, tmp_path / "out")
    shutil.rmtree(tmp_path / "text")
    run.train(moved, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (trained[0] / "model.safetensors").read_bytes()


def test_a_run_goes_on_with_the_tokens_that_it_began_with(recipe: Recipe, trained: tuple[Path, Any], tmp_path: Path):
    made, folder = trained[0] / "checkpoints", tmp_path / "tokens"
    folder.mkdir()
    shutil.copy(made / "training.bin", folder / "b.bin")
    data = Data(files=(f"{folder}/*.bin",), held_out_files=(str(made / "held_out.bin"),))
    tokens = dataclasses.replace(recipe, data=data, tokenizer=Tokenizer(str(trained[0])), save_every=1)
    interrupted(tokens, tmp_path / "out")
    shutil.copy(made / "held_out.bin", folder / "a.bin")  # another that the pattern finds
    run.train(tokens, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (trained[0] / "model.safetensors").read_bytes()
    size = (folder / "b.bin").stat().st_size
    (folder / "b.bin").write_bytes(bytes(size + 2))
    with pytest.raises(InputError, match=f"b.bin: expected the {size} bytes that the run began with, found {size + 2}"):
        run.train(dataclasses.replace(tokens, steps=8), tmp_path / "out", resume=True)


def test_a_run_goes_on_in_as_many_processes_and_steps(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    further = dataclasses.replace(recipe, steps=8, save_every=1)
    run.train(dataclasses.replace(recipe, steps=2, save_every=1), tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(InputError, match=r"processes: expected 1, with which the run in .* was started, found 2"):
            run.check_folder(tmp_path / "out", further, resume=True)

    interrupted(further, tmp_path / "out", resume=True)
    with pytest.raises(InputError, match=r"steps: expected 8, with which the run in .* was started, found 6"):
        run.train(dataclasses.replace(further, steps=6), tmp_path / "out", resume=True)
    run.train(further, tmp_path / "out", resume=True)


def test_the_command_that_it_names_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(recipe: Recipe):
        raise KeyboardInterrupt

    out = tmp_path / "my model"
    config = {"model_type": "skipless", **(Recipe.read(str(folder / "recipe.toml")).model or {}), "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["--steps", "2", "--model", str(tmp_path / "config.json")]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        stopped = CliRunner().invoke(main, ["train", str(folder / "recipe.toml"), str(out), *options])
    assert stopped.exit_code == 130
    program, *command = shlex.split(stopped.stderr.rpartition("go on with: ")[2])
    assert program == "skipless"
    assert CliRunner().invoke(main, command).exit_code == 0
    assert (out / "model.safetensors").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(run, "new_model", interrupt)  # before there is anything to go on with
        stopped = CliRunner().invoke(main, ["train", str(folder / "recipe.toml"), str(tmp_path / "none")])
    assert (stopped.exit_code, stopped.stderr) == (130, "")


# The same steps on a model's shards, of which each process has one, as on the whole model.
SHARDED = """
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from skipless.train.initialize import initialize
from skipless.train.optimizer import MuonAdamW
from tests.models import build, random_ids

def losses(sharded):
    model = build(dtype=torch.float32, gate_bias=True)
    initialize(model)
    if sharded:
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    optimizer = MuonAdamW(model, 0.02, 0.01)
    for _ in range(4):
        ids = random_ids(model, batch=4)
        own = ids.chunk(2)[distributed.get_rank()] if sharded else ids
        loss = model(input_ids=own, labels=own).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if sharded:
            distributed.all_reduce(loss)
        yield loss.item() / (2 if sharded else 1)

distributed.init_process_group("gloo")
found = [list(losses(sharded)) for sharded in (True, False)]
if distributed.get_rank() == 0:
    print(*found, sep=chr(10))
"""


@pytest.mark.slow
def test_the_optimizer_takes_shards_as_it_takes_the_whole(tmp_path: Path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *sys.path)))}
    done = subprocess.run(
        [*command, tmp_path / "sharded.py"], env=environment, capture_output=True, text=True, check=True
    )
    sharded, whole = map(json.loads, done.stdout.splitlines())
    assert sharded == pytest.approx(whole, rel=1e-3)  # Muon's own arithmetic is in bfloat16
    assert sharded[-1] < 0.98 * sharded[0]


def activations(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Bytes that autograd keeps of a batch, weights aside."""
    kept: dict[int, torch.Tensor] = {weight.data_ptr(): weight for weight in model.parameters()}
    size = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal size
        if (place := tensor.untyped_storage().data_ptr()) not in kept:
            size += tensor.untyped_storage().nbytes()
        kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    return size


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(folder: Path, recipe: Recipe, tmp_path: Path):
    command = ["train", str(folder / "recipe.toml"), str(tmp_path / "out"), "--dry-run", "--processes", "2", "--json"]
    found = json.loads(CliRunner().invoke(main, command).stdout)
    model = run.new_model(recipe)
    assert found["parameters"] == model.num_parameters()
    assert found["tokens_per_step"] == 2 * 4 * 32
    assert not (tmp_path / "out").exists()

    size = activations(model, torch.zeros(4, 32, dtype=torch.long))
    assert found["memory"]["activations"] == pytest.approx(size, rel=0.02)

    def memory(**changes: Any) -> dict[str, int]:
        return estimate(dataclasses.replace(recipe, **changes), 2).memory

    assert memory(checkpointing=True)["activations"] < 0.8 * size
    assert memory(batch_size=8)["activations"] == pytest.approx(2 * size, rel=0.02)
    assert memory(fsdp=True)["optimizer"] == found["memory"]["optimizer"] // 2
    with pytest.raises(InputError, match="fsdp: expected a GPU for each process, found none"):
        run.train(dataclasses.replace(recipe, fsdp=True), tmp_path / "out")


def test_a_dry_run_of_experts_has_them_take_as_many_tokens_each(recipe: Recipe):
    experts = {"ffn_type": "moe", "num_local_experts": 4, "num_experts_per_tok": 2, "gate_bias": False}
    moe = dataclasses.replace(recipe, model={**(recipe.model or {}), **experts, "norm_type": "rms", "residual": "both"})
    kept = activations(run.new_model(moe), torch.randint(300, (4, 32)))
    assert estimate(moe, 1).memory["activations"] == pytest.approx(kept, rel=0.02)


def test_processes_are_those_of_a_dry_run(folder: Path, tmp_path: Path):
    found = CliRunner().invoke(main, ["train", str(folder / "recipe.toml"), str(tmp_path / "out"), "--processes", "2"])
    assert found.exit_code == 2
    assert "--processes: expected --dry-run beside it" in found.stderr


def test_help_and_docs_list_every_field():
    text = " ".join(CliRunner().invoke(main, ["train", "--help"]).stdout.split())
    for name, default, about in described():
        assert f"{name} {about}" in text
        assert f"| `{name}` | {f'`{default}`' if default else ''} | {about} |" in page("train")

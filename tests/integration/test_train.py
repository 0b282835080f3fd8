"""Whole training runs, on a corpus of a few kilobytes: what they leave, how they end, and resuming after a kill."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from skipless.cli import main
from skipless.errors import InputError
from skipless.rewrite.model_files import AUTO_MAP
from skipless.train import corpus, run
from skipless.train.data import Blocks, read_texts, split
from skipless.train.log import Bar
from skipless.train.optimizer import MuonAdamW
from skipless.train.recipe import Data, Recipe
from skipless.train.trainer import SkiplessTrainer
from tests.models import load

RECIPE = """
steps = 12
batch_size = 4
sequence_length = 32
muon_lr = 0.02
adamw_lr = 0.01
save_every = 4
eval_every = 6

[model]
vocab_size = 300
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 64
gate_bias = true
attention_shaping = "value"
"""

# Trains in another process, and stalls between two checkpoints, to be killed there.
STALLING = """
import sys, time
from pathlib import Path
from skipless.train import corpus, run
from skipless.train.log import Bar
from skipless.train.recipe import Recipe

texts, recipe, out = sys.argv[1:]
corpus.standard_library = lambda: sorted(Path(texts).iterdir())
Bar.on_step_begin = lambda self, args, state, control, **kwargs: time.sleep(60 * (state.global_step == 6))
run.train(Recipe.read(recipe), Path(out))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """recipe.toml, and a corpus so small that 12 steps are more than one epoch."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "corpus").mkdir()
    for name in ("bisect.py", "heapq.py", "keyword.py", "stat.py", "token.py", "types.py"):
        text = (Path(sysconfig.get_path("stdlib")) / name).read_text()
        (folder / "corpus" / name).write_text(text[:400])
    return folder


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    return Recipe.read(str(folder / "recipe.toml"))


@pytest.fixture(scope="module", autouse=True)
def _corpus_and_one_thread(folder: Path):
    """More threads would add numbers up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "standard_library", lambda: sorted((folder / "corpus").iterdir()))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(folder: Path, recipe: Recipe) -> tuple[Path, dict[str, float]]:
    """An uninterrupted run."""
    return folder / "trained", run.train(recipe, folder / "trained")


@pytest.fixture(scope="module")
def killed(folder: Path) -> Path:
    """What a run leaves that gets SIGKILL after its first checkpoint."""
    out = folder / "killed"
    command = [sys.executable, "-c", STALLING, folder / "corpus", folder / "recipe.toml", out]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=log)
    try:
        while run.newest_checkpoint(out / "checkpoints") is None:
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.02)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert [path.name for path in out.rglob("checkpoint-*")] == ["checkpoint-4"]
    return out


def test_without_its_extra_it_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "skipless.train.run")
    result = CliRunner().invoke(main, ["train", str(folder / "recipe.toml"), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert (
        result.stderr
        == "skipless: train: expected the [train] extra, found no accelerate; pip install 'skipless[train]'\n"
    )
    assert not (tmp_path / "out").exists()


def test_leaves_a_model_that_loads(recipe: Recipe, trained: tuple[Path, dict[str, float]]):
    out, result = trained
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.stat().st_mode & 0o777 for path in out.iterdir() if path.is_file()} == {0o644}

    assert json.loads((out / "config.json").read_text())["auto_map"] == AUTO_MAP

    model, tokenizer = load(out, torch.float32), AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id
    _, held_out = split(read_texts(corpus.standard_library()), recipe.data.held_out, recipe.seed)
    tokens = Blocks.from_texts(held_out, tokenizer, recipe.sequence_length).tokens
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert result["held_out_loss"] == pytest.approx(loss, rel=1e-5)

    with pytest.MonkeyPatch.context() as patch:  # the same run without a step taken
        patch.setattr(MuonAdamW, "step", lambda *args, **kwargs: None)
        at_the_start = run.train(recipe, out.with_name("untrained"))
    assert result["held_out_loss"] < at_the_start["held_out_loss"] - 0.1
    assert result["bits_per_byte"] < at_the_start["bits_per_byte"]


def test_clips_gradients_and_schedules_both_learning_rates(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rates, norms = [], []

    def watch(self: Any, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any):
        rates.append([group["lr"] for part in optimizer.optimizer.parts for group in part.param_groups])
        norms.append(torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()]).item())

    monkeypatch.setattr(Bar, "on_pre_optimizer_step", watch)
    run.train(dataclasses.replace(recipe, gradient_clip=0.01), tmp_path)
    assert norms == pytest.approx([0.01] * 12, rel=1e-3)
    factors = [0, 1, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]  # 5 % warm-up, 40 % decay
    assert rates == [pytest.approx([0.02 * factor, 0.01 * factor]) for factor in factors]


@pytest.mark.slow
def test_refuses_a_folder_that_is_not_empty(recipe: Recipe, tmp_path: Path, killed: Path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file", killed):
        with pytest.raises(InputError, match="expected an empty or new folder, found files; continue with --resume"):
            run.train(recipe, out)
    assert (tmp_path / "file").read_text() == "mine"


def test_refuses_to_resume_nothing(recipe: Recipe, tmp_path: Path, trained: tuple[Path, dict[str, float]]):
    for out, found in ((tmp_path, "none"), (tmp_path / "new", "none"), (trained[0], "one of 12 steps")):
        with pytest.raises(InputError, match=f"expected an unfinished run to resume, found {found}"):
            run.train(recipe, out, resume=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["", "no state", "half a state", "half the only checkpoint"])
def test_a_killed_run_resumes_bit_for_bit(
    damage: str, recipe: Recipe, trained: tuple[Path, dict[str, float]], killed: Path, tmp_path: Path
):
    out = shutil.copytree(killed, tmp_path / "out")
    checkpoint = out / "checkpoints" / "checkpoint-4"
    if damage in ("no state", "half a state"):  # killed once more, while writing the second checkpoint
        checkpoint = shutil.copytree(checkpoint, out / "checkpoints" / "checkpoint-8")
    state = checkpoint / "trainer_state.json"
    if damage:
        state.write_text(state.read_text()[: state.stat().st_size // 2])
    if damage == "no state":
        state.unlink()
        (checkpoint / "optimizer.pt").unlink()

    assert run.train(recipe, out, resume=True) == trained[1]
    assert {path.name for path in out.iterdir()} == {path.name for path in trained[0].iterdir()}
    for file in trained[0].iterdir():
        if file.is_file():
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert lines(out) == lines(trained[0])


@pytest.mark.parametrize("step", [10, 12])  # an epoch's end, the run's end
def test_an_interrupted_run_resumes_bit_for_bit(
    step: int, recipe: Recipe, trained: tuple[Path, dict[str, float]], tmp_path: Path
):
    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any):
        if state.global_step == step:
            raise KeyboardInterrupt

    recipe = dataclasses.replace(recipe, save_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bar, "on_save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.train(recipe, tmp_path)
    assert run.train(recipe, tmp_path, resume=True) == trained[1]
    assert (tmp_path / "model.safetensors").read_bytes() == (trained[0] / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("field", "rate"), [("muon_lr", 30.0), ("adamw_lr", 1e30)])
@pytest.mark.parametrize("eval_every", [6, 100])
def test_refuses_to_save_what_is_not_a_number(field: str, rate: float, eval_every: int, recipe: Recipe, tmp_path: Path):
    recipe = dataclasses.replace(recipe, eval_every=eval_every, **{field: rate})
    with pytest.raises(
        InputError, match=r"step \d+: (eval_loss|loss|grad_norm): expected a number, found \w+; lower muon_lr or adamw_"
    ):
        run.train(recipe, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "log"]


def test_nan_is_named_by_its_step_and_not_saved(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compute_loss = SkiplessTrainer.compute_loss

    def spoiled(self: SkiplessTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, *args, **kwargs)
        return loss * torch.nan if self.state.global_step == 6 else loss

    monkeypatch.setattr(SkiplessTrainer, "compute_loss", spoiled)
    with pytest.raises(InputError, match=r"^step 7: loss: expected a number, found nan"):
        run.train(dataclasses.replace(recipe, eval_every=100), tmp_path)
    assert [path.name for path in tmp_path.rglob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "x"}, "model: Field 'hidden_size' expected int, got str"),
        ({"num_key_value_heads": 3}, "model: num_key_value_heads: expected a divisor"),
        ({"hidden_sizes": 3}, "model: hidden_sizes: not a field"),
        (
            {"stream_basis": "pivoted"},
            "stream_basis, values_removed, keys_removed, head_removed, first_layer_removed: expected a model with",
        ),
        ({"vocab_size": 10**6}, "vocab_size: expected .* found 1000000"),
    ],
)
def test_refuses_a_model_it_cannot_train(fields: dict[str, Any], message: str, recipe: Recipe, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        run.train(dataclasses.replace(recipe, model={**recipe.model, **fields}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line(folder: Path, trained: tuple[Path, dict[str, float]], tmp_path: Path):
    arguments = ["train", str(folder / "recipe.toml")]
    found = CliRunner(env={"COLUMNS": "80"}).invoke(main, [*arguments, str(tmp_path / "a"), "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout) == trained[1]
    assert found.stdout.count("\n") == 1
    for word in ("step", "12/12", "loss", "held out", "tokens/s"):
        assert word in found.stderr
    assert "…" not in found.stderr
    assert max(map(len, found.stderr.splitlines())) <= 80

    found = CliRunner().invoke(main, [*arguments, str(tmp_path / "b")])
    loss, bits = trained[1].values()
    assert found.stdout == f"held out: {loss:.3f} nats a token, {bits:.3f} bits a byte\n"

    found = CliRunner().invoke(main, [*arguments, str(tmp_path / "b")])
    assert (found.exit_code, found.stdout) == (2, "")
    assert "--resume" in found.stderr


@pytest.fixture
def interrupted(recipe: Recipe, tmp_path: Path) -> Path:
    """What a run leaves that ended in its first step."""

    def stop(*_: Any, **__: Any):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bar, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            run.train(recipe, tmp_path)
    return tmp_path


def test_resuming_something_else_is_refused(recipe: Recipe, interrupted: Path):
    for changes, message in (
        ({"muon_lr": 2 * recipe.muon_lr}, "muon_lr: expected .* with which the run in .* was started, found"),
        ({"data": Data(held_out=0.3)}, "data.held_out: expected 0.05, with which"),
    ):
        with pytest.raises(InputError, match=message):
            run.train(dataclasses.replace(recipe, **changes), interrupted, resume=True)


def test_a_run_goes_on_with_the_text_that_it_began_with(
    recipe: Recipe, interrupted: Path, trained: tuple[Path, dict[str, float]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(corpus, "standard_library", list)
    assert run.train(recipe, interrupted, resume=True) == trained[1]


def lines(out: Path) -> list[dict[str, Any]]:
    """The log of a run, less its speed."""
    found = [json.loads(line) for line in (out / "log" / "log.jsonl").read_text().splitlines()]
    own = ("tokens_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return [{name: value for name, value in line.items() if name not in own} for line in found]


def test_the_log_stays(trained: tuple[Path, dict[str, float]]):
    out, result = trained
    found = lines(out)
    assert [line["step"] for line in found] == sorted(line["step"] for line in found)
    assert found[-1]["eval_loss"] == result["held_out_loss"]
    assert found[-1]["eval_bits_per_byte"] == result["bits_per_byte"]
    assert found[-1]["tokens"] == 12 * 4 * 32
    assert {"loss", "grad_norm", "learning_rate", "epoch"} <= found[0].keys()
    events = EventAccumulator(str(out / "log")).Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert not (out / "checkpoints" / "runs").exists()
    assert losses == {line["step"]: pytest.approx(line["loss"]) for line in found if "loss" in line}


def test_more_steps_after_the_end(recipe: Recipe, trained: tuple[Path, dict[str, float]], tmp_path: Path, folder: Path):
    out = shutil.copytree(trained[0], tmp_path / "out")
    command = ["train", str(folder / "recipe.toml"), str(out), "--resume", "--json"]
    found = CliRunner().invoke(main, [*command, "--steps", "20"])
    assert found.exit_code == 0, found.output
    steps = [line["step"] for line in lines(out)]
    assert steps == sorted(steps)
    assert steps[-1] == 20
    rates = [line["learning_rate"] for line in lines(out) if "loss" in line and line["step"] > 12]
    assert rates[0] > rates[-1]  # the schedule is that of 20 steps
    assert json.loads(found.stdout)["held_out_loss"] < trained[1]["held_out_loss"]
    assert not torch.equal(*(load(each, torch.float32).lm_head.weight for each in (out, trained[0])))
    assert CliRunner().invoke(main, [*command, "--steps", "20"]).exit_code == 2

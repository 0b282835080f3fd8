"""How fast the trainer is beside a bare PyTorch loop on the same model, text, optimizer and schedule.

    python benchmarks/training.py [RECIPE] [--steps 20] [--rounds 4]

Rounds of both alternate, each from the same weights; the first steps of each are not counted. Prints tokens/s of both,
the median ratio, and on the last line one JSON object. Run it on a machine that does nothing else.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, get_wsd_schedule

from skipless.quiet import no_library_bars
from skipless.train import corpus
from skipless.train.log import Bar, callbacks
from skipless.train.optimizer import MuonAdamW
from skipless.train.recipe import Recipe
from skipless.train.run import new_model, prepare
from skipless.train.trainer import SkiplessTrainer, training_arguments

NOT_COUNTED = 5


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.times.append(time.perf_counter())


def speed(times: list[float], tokens_per_step: int) -> float:
    """Tokens/s of the steps that are counted."""
    return (len(times) - 1 - NOT_COUNTED) * tokens_per_step / (times[-1] - times[NOT_COUNTED])


def trainer_speed(recipe: Recipe, text: corpus.Corpus, tokens_per_step: int, folder: Path) -> float:
    """As `skipless train` runs, with its bar and its log."""
    model = new_model(recipe)
    clock, bar = Clock(), Bar(tokens_per_step, text)
    arguments = training_arguments(recipe, model.config, str(folder / "checkpoints"))
    others = callbacks(bar, folder / "log", 0)
    trainer = SkiplessTrainer(recipe, model, text, arguments, [clock, *others])
    with no_library_bars(), bar.progress:
        trainer.train()
    return speed(clock.times, tokens_per_step)


def bare_speed(recipe: Recipe, text: corpus.Corpus, tokens_per_step: int) -> float:
    """The shortest loop that does the same arithmetic."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = new_model(recipe).to(device).train()
    optimizer = MuonAdamW(model, recipe.muon_lr, recipe.adamw_lr)
    steps = recipe.steps
    warmup, decay = round(recipe.warmup * steps), round(recipe.decay * steps)
    scheduler = get_wsd_schedule(
        optimizer, num_warmup_steps=warmup, num_decay_steps=decay, num_training_steps=steps, decay_type="linear"
    )
    batches = iter(DataLoader(text.training, recipe.batch_size, shuffle=True))
    times = []
    for _ in range(steps):
        for _ in range(recipe.accumulate):
            ids = next(batches)["input_ids"].to(device)
            with torch.autocast(device, torch.bfloat16, enabled=recipe.bf16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss / recipe.accumulate
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    return speed(times, tokens_per_step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="stdlib")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    recipe = Recipe.read(arguments.recipe)
    recipe = dataclasses.replace(recipe, steps=arguments.steps, eval_every=10**6, save_every=10**6)
    sequences = recipe.batch_size * recipe.accumulate
    tokens_per_step = sequences * recipe.sequence_length
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print(f"machine: {machine}")
    found: dict[str, list[float]] = {"trainer": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        vocab_size = recipe.model["vocab_size"]
        checkpoints = Path(folder) / "checkpoints"
        prepare(recipe, vocab_size, sequences, checkpoints)
        text = corpus.made(recipe, vocab_size, checkpoints, sequences)
        for number in range(arguments.rounds):
            found["trainer"].append(trainer_speed(recipe, text, tokens_per_step, Path(folder)))
            found["bare"].append(bare_speed(recipe, text, tokens_per_step))
            print(
                f"round {number}: " + ", ".join(f"{name} {values[-1]:,.0f} tokens/s" for name, values in found.items())
            )
    ratio = statistics.median(a / b for a, b in zip(found["trainer"], found["bare"], strict=True))
    print(f"trainer / bare loop: {ratio:.2f}")
    print(json.dumps({"machine": machine, "ratio": ratio, **found}))


if __name__ == "__main__":
    main()

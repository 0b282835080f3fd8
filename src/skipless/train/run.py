"""Train a skipless model by a recipe: corpus, tokenizer, model, transformers' Trainer, and a folder that loads."""

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, get_wsd_schedule, set_seed
from transformers.trainer_utils import get_last_checkpoint

from skipless.errors import InputError
from skipless.model import SkiplessConfig, SkiplessForCausalLM
from skipless.train.data import Blocks, read_texts, split, standard_library, train_tokenizer
from skipless.train.initialize import initialize
from skipless.train.optimizer import MuonAdamW
from skipless.train.recipe import Recipe

CHECKPOINTS = "checkpoints"


class Bar(TrainerCallback):
    """A progress bar with loss, held-out loss, tokens/s and time left, on stderr."""

    def __init__(self, tokens_per_step: int, bits_per_byte: float):
        self.tokens_per_step, self.bits_per_byte = tokens_per_step, bits_per_byte
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  held out {task.fields[held_out]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first_step = time.perf_counter(), state.global_step
        self.task = self.progress.add_task("", total=state.max_steps, loss="-", held_out="-", speed="-")
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = state.global_step - self.first_step
        speed = steps * self.tokens_per_step / (time.perf_counter() - self.started)
        self.progress.update(self.task, completed=state.global_step, speed=f"{speed:,.0f}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.progress.update(self.task, loss=f"{logs['loss']:.3f}")
        if "eval_loss" in logs:
            loss = logs["eval_loss"]
            held_out = f"{loss:.3f} nats a token, {loss * self.bits_per_byte:.3f} bits a byte"
            self.progress.update(self.task, held_out=held_out)
            self.progress.console.print(f"step {state.global_step}: held out {held_out}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()


def train(recipe: Recipe, out: Path, *, resume: bool = False) -> dict[str, float]:
    """Train, and leave a model folder with its tokenizer in `out`; returns held-out loss (nats a token), bits a byte.

    Checkpoints go to `out`/checkpoints while training runs; after a kill, `resume` goes on from the newest one.
    Raises InputError when `out` is not empty (without `resume`), or has nothing to resume (with it), and when the loss
    stops being a number.
    """
    checkpoints = out / CHECKPOINTS
    last_checkpoint = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if not resume and out.exists() and any(out.iterdir()):
        raise InputError(
            f"{out}: expected an empty or new folder, found files; continue with --resume or choose another"
        )
    if resume and last_checkpoint is None:
        raise InputError(f"{out}: expected a training checkpoint to resume from, found none; start without --resume")

    set_seed(recipe.seed)
    training_texts, held_out_texts = split(read_texts(standard_library()), recipe.held_out, recipe.seed)
    try:
        config = SkiplessConfig(**recipe.model)
    except ValueError as error:
        raise InputError(f"model: {error}") from error
    tokenizer = train_tokenizer(training_texts, config.vocab_size)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    training = Blocks.from_texts(training_texts, tokenizer, recipe.sequence_length)
    held_out = Blocks.from_texts(held_out_texts, tokenizer, recipe.sequence_length)
    bits_per_byte = 1 / math.log(2) / held_out.bytes_per_token

    model = SkiplessForCausalLM(config)
    initialize(model)
    optimizer = MuonAdamW(model, recipe.muon_lr, recipe.adamw_lr)
    scheduler = get_wsd_schedule(
        optimizer,
        num_warmup_steps=round(recipe.warmup * recipe.steps),
        num_decay_steps=round(recipe.decay * recipe.steps),
        num_training_steps=recipe.steps,
        decay_type="linear",
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=recipe.batch_size,
            max_grad_norm=recipe.gradient_clip,
            bf16=recipe.bf16,
            eval_strategy="steps",
            eval_steps=recipe.eval_every,
            save_steps=recipe.save_every,
            save_total_limit=2,
            logging_steps=10,
            logging_nan_inf_filter=False,
            seed=recipe.seed,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=training,
        eval_dataset=held_out,
        optimizers=(optimizer, scheduler),
        callbacks=[Bar(recipe.batch_size * recipe.sequence_length, bits_per_byte)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint)
    loss = trainer.evaluate()["eval_loss"]
    if not math.isfinite(loss):
        raise InputError(f"held-out loss: expected a number, found {loss}; lower muon_lr or adamw_lr in the recipe")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.rmtree(checkpoints)
    return {"held_out_loss": loss, "bits_per_byte": loss * bits_per_byte}

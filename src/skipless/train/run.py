"""Train a skipless model by a recipe: corpus, tokenizer, model, transformers' Trainer, and a folder that loads."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (Trainer needs it, and says so only when it begins)
import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, get_wsd_schedule, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from skipless.checkpoint.headers import read_json_object
from skipless.errors import InputError
from skipless.model import SkiplessConfig, SkiplessForCausalLM
from skipless.quiet import no_library_bars
from skipless.train.data import Blocks, read_texts, split, standard_library, train_tokenizer
from skipless.train.initialize import initialize
from skipless.train.optimizer import MuonAdamW
from skipless.train.recipe import Recipe

CHECKPOINTS = "checkpoints"
RECIPE = "recipe.json"


def is_first() -> bool:
    """Whether this process is the one of those that torchrun has started (or the only one) that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


class Bar(TrainerCallback):
    """A progress bar with loss, held-out loss, tokens/s and time left, on stderr; fits in 80 columns."""

    def __init__(self, tokens_per_step: int, bits_per_byte: float):
        self.tokens_per_step, self.bits_per_byte = tokens_per_step, bits_per_byte
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}  held out {task.fields[held_out]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not is_first(),
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first_step = time.perf_counter(), state.global_step
        self.task = self.progress.add_task(
            "", total=state.max_steps, loss="-", held_out="-", speed="-", completed=state.global_step
        )

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
            self.progress.update(self.task, held_out=f"{loss:.3f}")
            if is_first():
                self.progress.console.print(f"step {state.global_step}: held out {held_out}")


class StopAtNaN(TrainerCallback):
    """Ends a run when its loss is no longer a number, so that no such model is saved."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        for name, value in (logs or {}).items():
            if name in ("loss", "eval_loss") and not math.isfinite(value):
                raise InputError(
                    f"step {state.global_step}: {name}: expected a number, found {value}; "
                    "lower muon_lr or adamw_lr in the recipe and start again"
                )


def newest_checkpoint(checkpoints: Path) -> str | None:
    """The newest checkpoint that a kill did not cut short: Trainer writes its state into the folder last."""
    for folder in sorted(checkpoints.glob("checkpoint-*"), key=lambda folder: -int(folder.name.split("-")[1])):
        with suppress(FileNotFoundError, json.JSONDecodeError):
            json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            return str(folder)
    return None


def check_folder(out: Path, fields: dict[str, Any], resume: bool) -> None:
    """Refuse to write over files, to resume what is not there, or to resume with another recipe or corpus."""
    saved = out / CHECKPOINTS / RECIPE
    if not resume:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise InputError(
                f"{out}: expected an empty or new folder, found files; continue with --resume or choose another"
            )
        return
    if not saved.is_file():
        raise InputError(
            f"{out}: expected an unfinished run to resume, found none; start a new folder without --resume"
        )
    started = read_json_object(saved)
    for name, found in fields.items():
        if found != started.get(name):
            raise InputError(
                f"{name}: expected {started.get(name)!r}, with which the run in {out} was started, found {found!r}; "
                f"resume with the same recipe or start a new folder"
            )


def train(recipe: Recipe, out: Path, *, resume: bool = False) -> dict[str, float]:
    """Train, and leave a model folder with its tokenizer in `out`; returns held-out loss (nats a token), bits a byte.

    Checkpoints go to `out`/checkpoints while training runs; after a kill, `resume` goes on from the newest one (from
    the start if there is none yet). Of several processes, which torchrun starts, each takes a batch of its own, and the
    first alone prints and writes. Raises InputError when `out` is not empty (without `resume`), or has no run to
    resume (with it), for a model or corpus that cannot be trained, and when the loss stops being a number.
    """
    checkpoints = out / CHECKPOINTS
    set_seed(recipe.seed)
    texts = read_texts(standard_library())
    corpus = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    fields = json.loads(json.dumps({**dataclasses.asdict(recipe), "corpus": corpus}))
    if is_first():
        check_folder(out, fields, resume)
    training_texts, held_out_texts = split(texts, recipe.held_out, recipe.seed)
    try:
        config = SkiplessConfig(**recipe.model)
    except (ValueError, StrictDataclassError) as error:
        raise InputError(f"model: {error.__cause__ or error}") from error
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
    if is_first():
        checkpoints.mkdir(parents=True, exist_ok=True)
        (checkpoints / RECIPE).write_text(json.dumps(fields), encoding="utf-8")
    bar = Bar(recipe.batch_size * recipe.sequence_length, bits_per_byte)
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
        callbacks=[bar, StopAtNaN()],
    )
    trainer.remove_callback(PrinterCallback)
    with no_library_bars(), bar.progress:
        trainer.train(resume_from_checkpoint=newest_checkpoint(checkpoints))
        loss = trainer.evaluate()["eval_loss"]
        config.use_cache = True  # Trainer turned it off
        if is_first():
            model.to(getattr(torch, recipe.dtype)).save_pretrained(out)
    if is_first():
        for file in out.glob("*.safetensors"):
            shutil.copymode(out / "config.json", file)  # safetensors ignores the umask
        tokenizer.save_pretrained(out)
        shutil.rmtree(checkpoints)
    return {"held_out_loss": loss, "bits_per_byte": loss * bits_per_byte}

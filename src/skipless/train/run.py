"""Train a skipless model by a recipe: tokens, model, transformers' Trainer, and a folder that loads."""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (Trainer needs it, and says so only when it begins)
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerFast, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from skipless.checkpoint import files
from skipless.checkpoint.headers import read_json_object
from skipless.checkpoint.opening import check_config
from skipless.errors import InputError
from skipless.inference import load
from skipless.inference import save as save_model
from skipless.log import is_first, processes
from skipless.model import SkiplessConfig, SkiplessForCausalLM
from skipless.quiet import no_library_bars
from skipless.rewrite.model_files import AUTO_MAP
from skipless.train import corpus
from skipless.train.data import check_length
from skipless.train.fade import Fade, final
from skipless.train.initialize import initialize
from skipless.train.log import Bar, callbacks
from skipless.train.recipe import Recipe, Schedule
from skipless.train.trainer import SkiplessTrainer, training_arguments

CHECKPOINTS, LOG = "checkpoints", "log"
RECIPE = "recipe.json"


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint that a kill did not cut short: Trainer writes its state into the folder last."""
    for folder in sorted(checkpoints.glob("checkpoint-*"), key=lambda folder: -_step(folder)):
        with suppress(FileNotFoundError, json.JSONDecodeError):
            json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            return folder
    return None


def _step(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.split("-")[1])


def check_folder(out: Path, recipe: Recipe, resume: bool) -> None:
    """Raise InputError if a run would write over files, or cannot be resumed.

    A run that is not there, or is done, cannot be resumed; nor can one with another recipe or in another number of
    processes, but for more steps once it is done.
    """
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
    older = _written_down(Recipe(1, 1, 1, 0.0, 0.0))  # what a release may have written that knew fewer fields
    started = older | read_json_object(saved)
    done = started.pop("done", 0)
    if recipe.steps <= done:
        raise InputError(f"{out}: expected an unfinished run to resume, found one of {done} steps; --steps takes more")
    fields = _written_down(recipe)
    if done:
        started["steps"] = fields["steps"]
    for name, found in fields.items():
        if found != started.get(name):
            raise InputError(
                f"{name}: expected {started.get(name)!r}, with which the run in {out} was started, found {found!r}; "
                f"resume with the same or start a new folder"
            )


def _written_down(recipe: Recipe) -> dict[str, Any]:
    """What has to be the same when a run goes on."""
    return recipe.to_json() | {"processes": processes()}


def new_config(recipe: Recipe) -> SkiplessConfig:
    """The recipe's [model], or that of the folder it starts from. Raises InputError for one that is not a model."""
    if recipe.start.folder:
        start = read_json_object(Path(recipe.start.folder) / "config.json")
        if (found := start.get("model_type")) != "skipless":
            raise InputError(f"{recipe.start.folder}: model_type: expected skipless to start from, found {found}")
        check_config(start)
        config = SkiplessConfig.from_dict(start)
    else:
        try:
            config = SkiplessConfig(**(recipe.model or {}))
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise InputError(f"model: {error.__cause__ or error}") from error
    check_length(recipe.sequence_length, config.max_position_embeddings)
    return config


def new_model(recipe: Recipe) -> SkiplessForCausalLM:
    """The recipe's model with its starting values, in fp32. Raises InputError for one that cannot be trained."""
    config = new_config(recipe)
    if recipe.start.folder:
        return load(Path(recipe.start.folder), torch.float32).train()
    model = SkiplessForCausalLM(config)
    initialize(model, recipe.start.sharpness)
    return model


def write_down(recipe: Recipe, done: int, checkpoints: Path) -> None:
    """Keep the recipe of a run, and after how many steps it was done (0: not yet), in one replacement of the file."""
    files.replace(checkpoints / RECIPE, [json.dumps(_written_down(recipe) | {"done": done}).encode()])


def prepare(recipe: Recipe, vocab_size: int, sequences: int, checkpoints: Path) -> None:
    """Write the recipe, and its text as tokens, unless a killed run has; nothing, if the text cannot be trained on."""
    new = [folder for folder in (checkpoints, checkpoints.parent) if not folder.exists()]
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_down(recipe, 0, checkpoints)
    try:
        if not corpus.is_made(checkpoints):
            corpus.make(recipe, vocab_size, checkpoints)
        corpus.made(recipe, vocab_size, checkpoints, sequences)
    except Exception:
        for folder in new:
            shutil.rmtree(folder)
        raise


def save(trainer: SkiplessTrainer, recipe: Recipe, tokenizer: PreTrainedTokenizerFast | None, out: Path) -> None:
    """Write the model folder, and that the run is done."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not is_first():
        return
    config = trainer.model.config
    if recipe.schedule != Schedule():
        config = final(config, state, recipe.schedule)
    config.use_cache = True  # Trainer turned it off
    config.auto_map = dict(AUTO_MAP)  # transformers would write the one class that it saves
    with torch.device("meta"):
        model = SkiplessForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    save_model(model.to(getattr(torch, recipe.dtype)), out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    write_down(recipe, recipe.steps, out / CHECKPOINTS)


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    waiting: Callable[[str], AbstractContextManager[None]] = lambda work: nullcontext(),
) -> dict[str, float | None]:
    """Train, and leave a model folder with its tokenizer in `out`.

    Returns the held-out loss (nats a token), and bits a byte (None where the tokens came without a tokenizer).
    `out`/checkpoints has the tokens and the newest checkpoints. `resume` goes on from there: after a kill (from the
    start if there is no checkpoint yet), or, with more steps, after the end. `out`/log stays, too. Where torchrun has
    started several processes, each takes a batch of its own, and the first alone prints and writes. `waiting` is
    entered with what is done before the first step.

    Raises InputError when `out` is not empty (without `resume`), or has no run to resume (with it), for a model or
    corpus that cannot be trained, and when the loss stops being a number.
    """
    checkpoints = out / CHECKPOINTS
    if is_first():
        check_folder(out, recipe, resume)
    set_seed(recipe.seed)
    with waiting("making the model"):
        model = new_model(recipe)
    fades = [] if recipe.schedule == Schedule() else [Fade(model, recipe.schedule)]
    arguments = training_arguments(recipe, model.config, str(checkpoints))
    if recipe.checkpointing and not recipe.fsdp:  # which does it itself
        newer = hasattr(model, "activation_checkpointing_enable")  # in transformers 6 there is no other
        enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    sequences = recipe.batch_size * recipe.accumulate * arguments.world_size
    with waiting("tokenizing"), arguments.main_process_first(local=False):
        if is_first():
            prepare(recipe, model.config.vocab_size, sequences, checkpoints)
    if not corpus.is_made(checkpoints):
        sys.exit(2)  # the first process has said why
    text = corpus.made(recipe, model.config.vocab_size, checkpoints, sequences)
    if text.tokenizer is not None:
        model.config.bos_token_id = model.config.eos_token_id = text.tokenizer.eos_token_id

    newest = newest_checkpoint(checkpoints)
    bar = Bar(sequences * recipe.sequence_length, text)
    trainer = SkiplessTrainer(recipe, model, text, arguments, [*fades, *callbacks(bar, out / LOG, _step(newest))])
    with no_library_bars(), bar.progress:
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        loss = trainer.last_evaluation()
        save(trainer, recipe, text.tokenizer, out)
    return {"held_out_loss": loss, "bits_per_byte": text.bits_per_byte(loss)}

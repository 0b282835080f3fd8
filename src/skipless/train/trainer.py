"""transformers' Trainer with our optimizer and schedule, that stops at a loss that is not a number."""

import math
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, get_wsd_schedule

from skipless.errors import InputError
from skipless.model import SkiplessConfig, SkiplessForCausalLM
from skipless.train.corpus import Corpus
from skipless.train.optimizer import MuonAdamW
from skipless.train.recipe import Recipe

WATCHED = ("loss", "grad_norm", "eval_loss")


def training_arguments(recipe: Recipe, config: SkiplessConfig, folder: str) -> TrainingArguments:
    """The recipe in transformers' terms. Joins the other processes, if torchrun has started any.

    Raises InputError for FSDP without a GPU, where accelerate would leave it out.
    """
    fsdp: dict[str, Any] = {}
    if recipe.fsdp:
        if not torch.cuda.is_available():
            raise InputError("fsdp: expected a GPU for each process, found none; remove it, or look with --dry-run")
        fsdp["fsdp"] = True
        fsdp["fsdp_config"] = {
            "transformer_layer_cls_to_wrap": ["SkiplessDecoderLayer"],
            "state_dict_type": "SHARDED_STATE_DICT",
            "activation_checkpointing": recipe.checkpointing,
        }
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        max_grad_norm=recipe.gradient_clip,
        bf16=recipe.bf16,
        eval_strategy="steps",
        eval_steps=recipe.eval_every,
        save_steps=recipe.save_every,
        save_total_limit=2,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        seed=recipe.seed,
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=config.ffn_type == "moe",  # of experts, some may have no tokens
        ddp_timeout=86400,  # the others wait while the first tokenizes
        use_cpu=not torch.cuda.is_available(),
        **fsdp,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # Trainer would spread a batch over all that one process sees
    return arguments


class NotANumberError(InputError):
    """A loss or a gradient of a run is not a number."""


class LogWhatIsSaved(TrainerCallback):
    """Logs before each checkpoint, so that none is saved of a run that has gone wrong."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= control.should_save


class SkiplessTrainer(Trainer):
    """Muon and AdamW, warm-up, flat, linear decay; NaN ends a run with the step in which it began."""

    def __init__(
        self,
        recipe: Recipe,
        model: SkiplessForCausalLM,
        corpus: Corpus,
        args: TrainingArguments,
        callbacks: list[TrainerCallback],
    ):
        super().__init__(
            model=model,
            args=args,
            train_dataset=corpus.training,
            eval_dataset=corpus.held_out,
            callbacks=[LogWhatIsSaved(), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.recipe = recipe
        self.optimizer: Any
        self.lr_scheduler: Any
        self.first_wrong = torch.tensor(math.inf, device=args.device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = MuonAdamW(model or self.model, self.recipe.muon_lr, self.recipe.adamw_lr)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = get_wsd_schedule(
                optimizer or self.optimizer,
                num_warmup_steps=round(self.recipe.warmup * num_training_steps),
                num_decay_steps=round(self.recipe.decay * num_training_steps),
                num_training_steps=num_training_steps,
                decay_type="linear",
            )
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        wrong = torch.where(loss.isfinite(), math.inf, float(self.state.global_step + 1))  # no wait for the GPU here
        self.first_wrong = torch.minimum(self.first_wrong, wrong)
        return loss

    def last_evaluation(self) -> float:
        """Held-out loss in nats a token, after the last step."""
        for line in reversed(self.state.log_history):
            if "eval_loss" in line and line["step"] == self.state.global_step:
                return line["eval_loss"]
        return self.evaluate()["eval_loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in WATCHED:
            if not math.isfinite(value := logs.get(name, 0.0)):
                first = self.accelerator.gather(self.first_wrong[None]).min().item()
                step = int(min(first, self.state.global_step))
                raise NotANumberError(
                    f"step {step}: {name}: expected a number, found {value}; lower muon_lr or adamw_lr in the recipe "
                    "and start again"
                )
        super().log(logs, start_time)

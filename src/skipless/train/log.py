"""What a run says of itself: a bar on stderr, and a log that stays, as JSON lines and for TensorBoard."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from skipless.log import is_first
from skipless.train.corpus import Corpus

LINES = "log.jsonl"


class Bar(TrainerCallback):
    """A progress bar with loss, held-out loss, tokens/s and time left, on stderr; fits in 80 columns."""

    def __init__(self, tokens_per_step: int, corpus: Corpus):
        self.tokens_per_step, self.corpus = tokens_per_step, corpus
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
        self.progress.update(self.task, completed=state.global_step, speed=f"{self.speed(state):,.0f}")

    def speed(self, state: Any) -> float:
        """Tokens a second since training began, of all processes."""
        return (state.global_step - self.first_step) * self.tokens_per_step / (time.perf_counter() - self.started)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.progress.update(self.task, loss=f"{logs['loss']:.3f}")
        if "eval_loss" in logs:
            loss = logs["eval_loss"]
            bits = self.corpus.bits_per_byte(loss)
            self.progress.update(self.task, held_out=f"{loss:.3f}")
            if is_first():
                held_out = f"{loss:.3f} nats a token" + ("" if bits is None else f", {bits:.3f} bits a byte")
                self.progress.console.print(f"step {state.global_step}: held out {held_out}")


class Lines(TrainerCallback):
    """A JSON object a line: step, tokens seen, tokens/s, and what Trainer logs.

    Where a run goes on from a checkpoint, the lines after that are removed.
    """

    def __init__(self, file: Path, bar: Bar):
        self.file, self.bar = file, bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True) if self.file.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last
        kept = [line for line in whole if json.loads(line)["step"] <= state.global_step]
        self.file.write_text("".join(kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if "train_runtime" in (logs or {}):  # Trainer's summary, which a resumed run would count from its resuming
            return
        line: dict[str, Any] = {"step": state.global_step, "tokens": state.global_step * self.bar.tokens_per_step}
        line |= {"tokens_per_second": round(self.bar.speed(state))} | (logs or {})
        if "eval_loss" in line:
            line["eval_bits_per_byte"] = self.bar.corpus.bits_per_byte(line["eval_loss"])
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def callbacks(bar: Bar, folder: Path, first_step: int) -> list[TrainerCallback]:
    """The bar, and of the first process the log in `folder`, which goes on behind first_step."""
    if not is_first():
        return [bar]
    folder.mkdir(exist_ok=True)
    board = TensorBoardCallback(SummaryWriter(str(folder), purge_step=first_step + 1))
    board.logging_dir = str(folder)  # for what is logged after the last step, too
    return [bar, Lines(folder / LINES, bar), board]

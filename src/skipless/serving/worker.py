"""One model in a process of its own, so that engines, their thread pools and their memory do not mix.

The process reads requests and writes answers, a line of JSON each; what an engine prints goes to stderr.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from skipless.errors import InputError, extra
from skipless.rewrite.machine import peak_memory
from skipless.serving.engines import ENGINES
from skipless.serving.running import Runner


def runner(engine: str, folder: Path, precision: str, compiled: bool) -> Runner:
    """Load a model folder into an engine. compiled: by torch (decoding.prepare_decoding)."""
    chosen = ENGINES[engine]
    with extra(chosen.extra) if chosen.extra else nullcontext():
        room = import_module(f"skipless.serving.{chosen.module}")
    opened: Runner = room.open_runner(folder, precision, compiled)
    return opened


class Worker:
    """A Runner in another process, which calls `serve`. load_seconds: how long it took until the model was ready.

    command: of that process. Raises InputError for what it does not load or run, and RuntimeError if it ends.
    """

    def __init__(self, command: Sequence[str]):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, text=True)
        ready = self._answer()
        self.bytes_per_token: int = ready["bytes_per_token"]
        self.load_seconds: float = ready["load_seconds"]

    @classmethod
    def of(cls, engine: str, folder: Path, precision: str, compiled: bool = False) -> Self:
        """A model folder in an engine (as `runner` loads it)."""
        arguments = (engine, str(folder), precision, str(int(compiled)))
        return cls([sys.executable, "-P", "-m", __name__, *arguments])  # -P: no module of the current folder

    def generate(self, batch: int, prompt: int, tokens: int) -> list[float]:
        """As a Runner."""
        answer = self._ask("generate", batch=batch, prompt=prompt, tokens=tokens)
        self.peak_memory: int = answer["peak_memory"]
        times: list[float] = answer["result"]
        return times

    def broken_cache(self, prompt: int, tokens: int) -> str | None:
        """What is wrong with the Runner's cache, or None."""
        problem: str | None = self._ask("broken_cache", prompt=prompt, tokens=tokens)["result"]
        return problem

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, method: str, **arguments: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps({"method": method, **arguments}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"the process that ran a model ended; it said:\n{self._log.read().decode()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise InputError(answer["error"])
        return answer


def serve(load: Callable[[], Runner]) -> None:
    """What the process does: load a Runner, then call whichever of its methods it is asked to."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        start = time.perf_counter()
        model = load()
        answer(load_seconds=time.perf_counter() - start, bytes_per_token=model.bytes_per_token)
        for line in sys.stdin:
            asked = json.loads(line)
            result = getattr(model, asked.pop("method"))(**asked)
            answer(result=result, peak_memory=peak_memory())
    except (InputError, OSError) as error:
        answer(error=str(error))


if __name__ == "__main__":
    engine, folder, precision, compiled = sys.argv[1:]
    serve(lambda: runner(engine, Path(folder), precision, bool(int(compiled))))

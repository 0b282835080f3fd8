"""How fast do models decode? Interleaved rounds, medians, and the ceiling that reading the weights sets.

Each token reads every weight once (of the embedding table one row), so tokens/s <= batch * bandwidth / bytes per token.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from skipless.errors import InputError
from skipless.serving.engines import ENGINES
from skipless.serving.running import Runner
from skipless.serving.shapes import write_shapes
from skipless.serving.worker import Worker

# Between two turns, so that the thread pool of the last one does not spin into the next.
PAUSE = 0.3
# Bytes that no cache holds.
LARGE = 10**9


@dataclass(frozen=True)
class Work:
    """What each model does in a round: for each of `batches`, decode `tokens` tokens after `context` tokens; read a
    prompt of `prefill` tokens (0: none).
    """

    batches: tuple[int, ...] = (1,)
    context: int = 128
    tokens: int = 32
    prefill: int = 512


@dataclass(frozen=True)
class Decoding:
    """Of one model at one batch. rounds: tokens/s, all sequences together; tokens_per_second: their median.

    share: of the bandwidth; speedup: over the first model; both the medians of what they are in one round.
    """

    batch: int
    rounds: tuple[float, ...]
    tokens_per_second: float
    bytes_per_second: float
    ceiling: float
    share: float
    speedup: float


@dataclass(frozen=True)
class Speed:
    """One model. first_token: seconds from a prompt of `context` tokens to the first token, at the first batch.

    prefill: tokens/s of the long prompt, and its speedup; load_seconds, peak_memory (bytes): of its process, if it had
    one.
    """

    name: str
    bytes_per_token: int
    decoding: tuple[Decoding, ...]
    first_token: float
    prefill: float | None
    prefill_speedup: float | None
    load_seconds: float | None
    peak_memory: int | None


@dataclass(frozen=True)
class Bench:
    """What was measured, where and in what. bandwidth: bytes/s that torch reads, the median over rounds.

    broken_caches: of models whose cache changes what they generate, how.
    """

    work: Work
    bandwidth: float
    speeds: tuple[Speed, ...]
    engine: str
    dtype: str
    broken_caches: dict[str, str]


def bench(
    folders: Sequence[str | Path] = (),
    *,
    shape: str | None = None,
    layers: int | None = None,
    engine: str = "torch",
    dtype: str = "float32",
    compiled: bool = False,
    work: Work | None = None,
    rounds: int = 7,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bench:
    """Time models, each in a process of its own: those in folders, or random ones of a shape (shapes.write_shapes).

    engine: "torch", "openvino" or "vllm"; dtype: what to run in (engines.ENGINES); compiled: torch's fast path;
    progress is called with how many turns are done, of how many. Raises InputError for what the engine does not run.
    """
    if bool(folders) == (shape is not None) or (layers is not None and shape is None):
        raise InputError("bench: expected model folders, or --shape with or without --layers, and not both")
    if dtype not in ENGINES[engine].precisions:
        raise InputError(f"dtype: expected one of {', '.join(ENGINES[engine].precisions)} for {engine}, found {dtype}")
    if compiled and engine != "torch":
        raise InputError(f"compile: expected engine torch, found {engine}, which compiles by itself or not at all")
    with ExitStack() as stack:
        paths = [Path(folder) for folder in folders]
        names = [str(folder) for folder in folders]
        if shape is not None:
            stored = dtype if dtype in ENGINES["torch"].precisions else "float32"
            paths = write_shapes(shape, layers, stored, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            names = [path.name for path in paths]
        workers = [stack.enter_context(Worker.of(engine, path, dtype, compiled)) for path in paths]
        runners = list(zip(names, workers, strict=True))
        return measure(runners, work or Work(), rounds, f"{engine}, compiled" if compiled else engine, dtype, progress)


def measure(
    runners: Sequence[tuple[str, Runner]],
    work: Work,
    rounds: int = 7,
    engine: str = "torch",
    dtype: str = "float32",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bench:
    """Time models in turns, the order of which alternates, beside the bandwidth; ratios are those of a round."""
    done, total = 0, len(runners) * (rounds + 1)
    broken: dict[str, str] = {}
    for name, runner in runners:
        _turn(runner, work)  # warm up
        if (problem := runner.broken_cache(work.context, work.tokens)) is not None:
            broken[name] = problem
        progress(done := done + 1, total)
    buffer = torch.ones(min(LARGE, max(runner.bytes_per_token for _, runner in runners)) // 4)
    bandwidths = []
    turns: list[list[Turn]] = [[] for _ in runners]
    for number in range(rounds):
        bandwidths.append(read_bandwidth(buffer))
        order = range(len(runners))
        for index in order if number % 2 == 0 else reversed(order):
            time.sleep(PAUSE if isinstance(runners[index][1], Worker) else 0)
            turns[index].append(_turn(runners[index][1], work))
            progress(done := done + 1, total)
    speeds = tuple(
        _speed(name, runner, work, timed, turns[0], bandwidths)
        for (name, runner), timed in zip(runners, turns, strict=True)
    )
    return Bench(work, median(bandwidths), speeds, engine, dtype, broken)


@dataclass(frozen=True)
class Turn:
    """One model's turn: seconds a step by batch, seconds to the first token, and of the long prompt."""

    step: tuple[float, ...]
    first_token: float
    prefill: float | None


def _turn(runner: Runner, work: Work) -> Turn:
    steps, first = [], 0.0
    for batch in work.batches:
        times = runner.generate(batch, work.context, work.tokens)
        steps.append(median(after - before for before, after in pairwise(times)))
        first = first or times[0]
    prefill = runner.generate(1, work.prefill, 1)[0] if work.prefill else None
    return Turn(tuple(steps), first, prefill)


def _speed(
    name: str, runner: Runner, work: Work, turns: Sequence[Turn], first: Sequence[Turn], bandwidths: Sequence[float]
) -> Speed:
    size = runner.bytes_per_token
    decoding = []
    for index, batch in enumerate(work.batches):
        steps = [turn.step[index] for turn in turns]
        decoding.append(
            Decoding(
                batch=batch,
                rounds=tuple(batch / step for step in steps),
                tokens_per_second=batch / median(steps),
                bytes_per_second=size / median(steps),
                ceiling=batch * median(bandwidths) / size,
                share=median(size / step / bandwidth for step, bandwidth in zip(steps, bandwidths, strict=True)),
                speedup=median(other.step[index] / step for other, step in zip(first, steps, strict=True)),
            )
        )
    pairs = [(other.prefill, turn.prefill) for other, turn in zip(first, turns, strict=True)]
    prompts = [(before, after) for before, after in pairs if before and after]
    return Speed(
        name=name,
        bytes_per_token=size,
        decoding=tuple(decoding),
        first_token=median(turn.first_token for turn in turns),
        prefill=work.prefill / median(after for _, after in prompts) if prompts else None,
        prefill_speedup=median(before / after for before, after in prompts) if prompts else None,
        load_seconds=runner.load_seconds if isinstance(runner, Worker) else None,
        peak_memory=runner.peak_memory if isinstance(runner, Worker) else None,
    )


def read_bandwidth(buffer: torch.Tensor, repeats: int = 5) -> float:
    """Bytes/s at which torch sums a buffer, the best of several repeats; as large as a model, it is where that is: in
    memory, or in a cache.
    """
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best

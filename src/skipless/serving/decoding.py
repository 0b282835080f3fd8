"""The fast path in PyTorch on a CPU: a step of decoding that reads the weights as fast as the memory gives them.

Compiled, the weights are constants (inductor's freezing): each is packed once, the way its kernel wants to read it. Not
compiled, what matters is whose kernel multiplies a row: of bf16, oneDNN's may take twice as long as PyTorch's own.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from transformers import Cache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from skipless.errors import InputError
from skipless.inference import generate, greedy_config, load, positions_of
from skipless.model.modeling_skipless import CACHE
from skipless.serving.running import check_length, expert_share, sequence

# Weights are constants, and of oneDNN's kernels and inductor's own the faster is taken, quietly: which one that is, and
# by how much, differs from CPU to CPU.
FROZEN = {
    "freezing": True,
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
    "max_autotune_report_choices_stats": False,
    "autotune_num_choices_displayed": 0,
}


def prepare_decoding(model: PreTrainedModel, compiled: bool = False) -> None:
    """Make `model.generate` decode faster on a CPU; prompts run as before. For inference only.

    model: any decoder of transformers. As it is, its bf16 rows are multiplied by the faster of PyTorch's kernels.
    compiled: with a compiled step and a static cache. The weights must not change then: the step has copies of its own,
    which take as much memory again. It is compiled when it is first used, and again for another batch or a longer
    cache. Off the CPU there is nothing to prepare: with cache_implementation="static", `generate` compiles by itself.
    Raises InputError for a model that does not compile as one graph.
    """
    if compiled and not model._can_compile_fullgraph:
        raise InputError(
            "compile: expected a model that transformers compiles as one graph, found one that it does not (experts, "
            "or RoPE that depends on the length); leave it out"
        )
    if compiled:
        model.generation_config.cache_implementation = "static"
    if model.device.type != "cpu":
        return
    if compiled:
        # transformers counts a window's tokens in Python: the step must not be compiled for each count
        windowed = getattr(model.config, "sliding_window", None) is not None
        model.forward = _compiled_step(model.forward, dynamic=None if windowed else False)
    elif model.dtype == torch.bfloat16 and _slower_with_onednn(max(model.parameters(), key=torch.Tensor.numel)):
        model.forward = _step_without_onednn(model.forward)


def _compiled_step(whole: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    """A forward that takes the compiled path for single tokens with a static cache."""
    step = torch.compile(whole, fullgraph=True, dynamic=dynamic)
    prepared: WeakSet[Cache] = WeakSet()

    @functools.wraps(whole)  # generate asks what it takes
    def forward(*args: Any, **kwargs: Any) -> Any:
        ids, cache = kwargs.get("input_ids"), kwargs.get(CACHE)
        decodes = ids is not None and ids.shape[1] == 1 and cache is not None and cache.is_compileable
        if not decodes or torch.is_grad_enabled():
            return whole(*args, **kwargs)
        if cache not in prepared:
            _pass_as_inputs(cache)
            prepared.add(cache)
        with torch._inductor.config.patch(FROZEN):
            return step(*args, **kwargs)

    return forward


def _pass_as_inputs(cache: Cache) -> None:
    """Take from a static cache's tensors the mark that their addresses stay: frozen, the step would keep using the ones
    that it was compiled with, also when `generate` comes with another cache.
    """
    for layer in cache.layers:
        for name in ("keys", "values", "cumulative_length"):
            setattr(layer, name, getattr(layer, name).detach())  # the same memory, and no mark


def _step_without_onednn(whole: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that multiplies a single row by PyTorch's own kernel."""

    @functools.wraps(whole)  # generate asks what it takes
    def forward(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        with _without_onednn() if ids is not None and ids.numel() == 1 else nullcontext():
            return whole(*args, **kwargs)

    return forward


@contextmanager
def _without_onednn() -> Iterator[None]:
    onednn: Any = torch.backends.mkldnn
    enabled, onednn.enabled = onednn.enabled, False
    try:
        yield
    finally:
        onednn.enabled = enabled


@torch.no_grad()
def _slower_with_onednn(weight: torch.Tensor) -> bool:
    """Whether PyTorch's own kernel multiplies a row faster than oneDNN's, which it takes by default."""
    row = torch.ones(1, weight.shape[-1], dtype=weight.dtype)

    def seconds() -> float:
        start = time.perf_counter()
        torch.nn.functional.linear(row, weight)
        return time.perf_counter() - start

    default = min(seconds() for _ in range(5))
    with _without_onednn():
        return min(seconds() for _ in range(5)) < default


def bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of weights read to decode one token at batch 1: all but the tables that are only looked up in, and the
    experts that it is not sent to.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    output = model.get_output_embeddings()
    if output is not None:
        tables.discard(id(output.weight))
    share = expert_share(model.config.to_dict())
    read = ((name, weight) for name, weight in model.named_parameters() if id(weight) not in tables)
    return round(sum(weight.nbytes * (share if ".experts." in name else 1) for name, weight in read))


class TorchRunner:
    """A model as bench sees one."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.bytes_per_token = bytes_per_token(model)

    @torch.no_grad()
    def generate(self, batch: int, prompt: int, tokens: int) -> list[float]:
        """Decode greedily after a prompt of this many tokens; when each token came, in seconds."""
        check_length(prompt, tokens, positions_of(self.model.config))
        ids = torch.tensor([sequence(prompt, self.model.config.vocab_size)] * batch, device=self.model.device)
        config, watch = greedy_config(tokens), Watch()
        config.output_logits = False
        self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=watch)
        return watch.times[1:]  # what came first is the prompt

    def broken_cache(self, prompt: int, tokens: int) -> str | None:
        """What is wrong with its cache, by the logits of each token."""
        check_length(prompt, tokens, positions_of(self.model.config))
        ids = torch.tensor([sequence(prompt, self.model.config.vocab_size)], device=self.model.device)
        return generate(self.model, ids, tokens).broken_cache()


class Watch(BaseStreamer):
    """Notes when `generate` hands something on."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter() - self.start)

    def end(self) -> None:
        pass


def open_runner(folder: Path, precision: str, compiled: bool) -> TorchRunner:
    """A model folder, loaded and prepared."""
    model = load(folder, getattr(torch, precision))
    prepare_decoding(model, compiled)
    return TorchRunner(model)

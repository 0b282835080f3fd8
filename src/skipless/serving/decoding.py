"""The fast path in PyTorch: a compiled step, with the weights as constants, decodes token by token.

Inductor's freezing packs each weight once, the way its kernels want to read it; on a CPU that is what brings decoding
to the memory's bandwidth.
"""

import time
from typing import Any
from weakref import WeakSet

import torch
from transformers import Cache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from skipless.errors import InputError
from skipless.inference import greedy_config


# Weights are constants, and of oneDNN's kernels and inductor's own the faster is taken (quietly): which one it is, and by
# how much, differs from CPU to CPU.
FROZEN = {
    "freezing": True,
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
    "max_autotune_report_choices_stats": False,
    "autotune_num_choices_displayed": 0,
}


def compile_decoding(model: PreTrainedModel) -> None:
    """Let `model.generate` decode with a compiled step and a static cache; prompts run as before. For inference only.

    The weights must not change afterwards: the compiled step has copies of its own, which take as much memory again. It
    is compiled when it is first used, and again for another batch or a longer cache. `model`: a decoder of transformers
    that compiles without graph breaks. Off the CPU there is nothing to pack, and `generate` compiles by itself.
    """
    model.generation_config.cache_implementation = "static"
    if model.device.type != "cpu":
        return
    whole = model.forward
    step = torch.compile(whole, fullgraph=True, dynamic=False)
    prepared: WeakSet[Cache] = WeakSet()

    def forward(*args: Any, **kwargs: Any) -> Any:
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        decodes = ids is not None and ids.shape[1] == 1 and cache is not None and cache.is_compileable
        if not decodes or torch.is_grad_enabled():
            return whole(*args, **kwargs)
        if cache not in prepared:
            _pass_as_inputs(cache)
            prepared.add(cache)
        with torch._inductor.config.patch(FROZEN):
            return step(*args, **kwargs)

    model.forward = forward


def _pass_as_inputs(cache: Cache) -> None:
    """Take from a static cache's tensors the mark that their addresses stay: frozen, the step would keep using the ones
    that it was compiled with, also when `generate` comes with another cache.
    """
    for layer in cache.layers:
        for name in ("keys", "values", "cumulative_length"):
            setattr(layer, name, getattr(layer, name).detach())  # the same memory, and no mark


def bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of weights read to decode one token at batch 1: all but the tables that are only looked up in."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    output = model.get_output_embeddings()
    if output is not None:
        tables.discard(id(output.weight))
    return sum(weight.nbytes for weight in model.parameters() if id(weight) not in tables)


class TorchRunner:
    """A model as bench sees one."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.bytes_per_token = bytes_per_token(model)

    @torch.no_grad()
    def generate(self, batch: int, prompt: int, tokens: int) -> list[float]:
        """Decode greedily after a prompt of this many tokens; when each token came, in seconds."""
        limit = self.model.config.max_position_embeddings
        if prompt + tokens > limit:
            raise InputError(
                f"tokens: expected a prompt and tokens of at most {limit} together, found {prompt + tokens}"
            )
        ids = (torch.arange(prompt) % self.model.config.vocab_size).repeat(batch, 1).to(self.model.device)
        config, watch = greedy_config(tokens), Watch()
        config.output_logits = False
        self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=watch)
        return watch.times[1:]  # what came first is the prompt


class Watch(BaseStreamer):
    """Notes when `generate` hands something on."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter() - self.start)

    def end(self) -> None:
        pass

"""Fade out, during a run, what the model shall not have at its end: skip connections and norms.

With t from 0 to 1 as the recipe's [schedule] says: a skip is multiplied by 1 - t; a norm divides by r^(1 - t) c^t, with
r the root mean square of the token at hand (of layer norms: the standard deviation) and c what it has been of late, of
all tokens of the first process (after arXiv:2602.10408). At t = 1 a norm is the map x -> x C diag(g / c) + b, with C
what takes the mean away, or the identity. The matrices that read it take it in, or, where one of those cannot, the
matrices that write x.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from skipless.architecture.config import Architecture, Module
from skipless.architecture.graph import graph
from skipless.errors import InputError
from skipless.model import SkiplessConfig, SkiplessForCausalLM
from skipless.model.modeling_skipless import SkiplessNorm
from skipless.train.recipe import Schedule

# The weight of the newest step in c, once there have been 50.
NEWEST = 0.02

State = dict[str, torch.Tensor]


class FadingNorm(SkiplessNorm):
    """A norm whose divisor goes from each token's own RMS to a constant; `share`: how far it has gone (t)."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    log_rms: torch.Tensor
    steps: torch.Tensor

    def __init__(self, norm: SkiplessNorm):
        nn.Module.__init__(self)
        self.norm_type, self.eps = norm.norm_type, norm.eps
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        self.share = 0.0
        self.seen: list[torch.Tensor] = []  # of each batch of a step
        self.register_buffer("log_rms", torch.zeros(()))  # log c
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        if self.norm_type == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        log_rms = (wide.square().mean(-1, keepdim=True) + self.eps).log() / 2
        if self.training:
            self.seen.append(log_rms.detach().mean())
        divisor = ((1 - self.share) * log_rms + self.share * self.log_rms).exp()
        normed = (wide / divisor).to(hidden_states.dtype)
        normed = normed if self.weight is None else normed * self.weight
        return normed if self.bias is None else normed + self.bias

    def follow(self) -> None:
        """After a step: move c towards what the step has seen, until it has become the divisor."""
        if self.seen and self.share < 1:
            self.steps += 1
            self.log_rms.lerp_(torch.stack(self.seen).mean().to(self.log_rms), (1 / self.steps).clamp(min=NEWEST))
        self.seen.clear()


class Fade(TrainerCallback):
    """Fades a model's skips and norms step by step."""

    def __init__(self, model: SkiplessForCausalLM, schedule: Schedule):
        """Put into the model what fades, and what a model without it needs; it computes the same as before.

        Raises InputError for one in which nothing fades, or in which a norm could not move into matrices.
        """
        self.schedule = schedule
        self.norms: list[FadingNorm] = []
        self.skips: list[tuple[nn.Module, str, float]] = []
        final(model.config, None, schedule)
        self.opened = add_own_values(model) if schedule.skips else []
        if schedule.skips:
            for layer in model.model.layers:
                for name, there in (("attention", layer.attention_skip), ("ffn", layer.ffn_skip)):
                    if there:
                        self._fade_skip(layer, f"{name}_skip_gain")
        if schedule.norms:
            add_gate_biases(model)
            for name, module in list(model.named_modules()):
                if isinstance(module, SkiplessNorm) and "self_attn" not in name:
                    owner, _, last = name.rpartition(".")
                    self.norms.append(FadingNorm(module))
                    setattr(model.get_submodule(owner), last, self.norms[-1])

    def _fade_skip(self, layer: nn.Module, name: str) -> None:
        gain = getattr(layer, name)
        start = 1.0 if gain is None else gain.item()
        delattr(layer, name)
        layer.register_buffer(name, torch.tensor([start], dtype=next(layer.parameters()).dtype), persistent=False)
        self.skips.append((layer, name, start))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.set(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(state.global_step)

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """After a step, the `step`-th: go as much further as the schedule says."""
        for norm in self.norms:
            norm.follow()
        for alpha in self.opened:
            alpha.add_(share(self.schedule.skips, step) - share(self.schedule.skips, step - 1))
        self.set(step)

    def set(self, step: int) -> None:
        """Be as far as the schedule is after so many steps."""
        for layer, name, start in self.skips:
            getattr(layer, name).fill_(start * (1 - share(self.schedule.skips, step)))
        for norm in self.norms:
            norm.share = share(self.schedule.norms, step)


def add_own_values(model: SkiplessForCausalLM) -> list[nn.Parameter]:
    """Where attention is not shaped, a path for each token's own value, and its gains in all layers: out = alpha v +
    beta softmax(.) v with alpha 0 and beta 1. Without a skip, nothing else keeps tokens apart (initialize.py).
    """
    config = model.config
    if config.attention_shaping is not None:
        return []
    config.attention_shaping = "value"
    alphas = []
    for layer in model.model.layers:
        alphas.append(nn.Parameter(torch.zeros(config.num_attention_heads).to(model.dtype)))
        attention = layer.get_submodule("self_attn")
        attention.register_parameter("alpha", alphas[-1])
        attention.register_parameter("beta", nn.Parameter(torch.ones_like(alphas[-1])))
    return alphas


def add_gate_biases(model: SkiplessForCausalLM) -> None:
    """Where gates have no bias, one of 0. A GLU without it is of degree 2 in its input (initialize.py)."""
    config = model.config
    if config.ffn_type == "glu" and not (config.gate_bias or config.mlp_bias):
        config.gate_bias = True
        for layer in model.model.layers:
            bias = nn.Parameter(torch.zeros(config.intermediate_size).to(model.dtype))
            layer.get_submodule("mlp.gate_proj").register_parameter("bias", bias)


def share(steps: tuple[int, ...], step: int) -> float:
    """How far (0 to 1) what fades from the first of two steps to the second has faded after `step` steps."""
    first, last = steps
    return min(1.0, max(0.0, (step - first) / (last - first)))


@dataclass(frozen=True)
class Norm:
    """A norm that has become constant, and the modules that take it in: all that read it, or all that write it."""

    name: str
    readers: tuple[Module, ...] = ()
    writers: tuple[Module, ...] = ()


def final(config: SkiplessConfig, state: State | None, schedule: Schedule) -> SkiplessConfig:
    """The config without what has faded, and, in place, its tensors.

    Raises InputError, without `state`, too, for a norm that no matrices can take in, and for a model that has not what
    is to fade.
    """
    fields = json.loads(config.to_json_string())
    if schedule.skips:
        if config.residual == "none":
            raise InputError("schedule.skips: expected a model with skip connections to start from, found none in it")
        fields["residual"] = "none"
    if schedule.norms:
        if config.norm_type == "none":
            raise InputError("schedule.norms: expected a model with norms to start from, found none in it")
        architecture = Architecture.from_config(fields)
        folded = set(architecture.folded_biases)
        for norm in takers(architecture):
            folded |= {each.name for each in biased(norm, architecture) if not (each.bias or each.table)}
            if state is not None:
                move(norm, architecture, state)
        fields |= {"norm_type": "none", "norms": None, "norm_bias": None, "norms_removed": [], "gains_removed": []}
        fields["folded_biases"] = sorted(folded)
    return SkiplessConfig.from_dict(fields)


def takers(architecture: Architecture) -> Iterable[Norm]:
    """Each norm, in the order of computation, with the modules that take it in. Raises InputError if there are none."""
    a, spaces = architecture, graph(architecture)
    modules = {module.name: module for module in a.modules()}
    biases = {module.name for module in a.norm_modules() if module.bias}
    for name in (name for name in a.norm_names() if a.has_norm(name)):
        readers = spaces.through(name)
        able = {
            each for each, module in modules.items()
            if module.inputs == a.hidden_size and not module.table
            and (name not in biases or module.bias or ".mlp." in each)
        }  # fmt: skip
        if readers and able.issuperset(readers):
            yield Norm(name, readers=tuple(modules[each] for each in readers))
            continue
        writers = _writers(name, architecture)
        if not writers or not modules.keys() >= set(writers):
            raise InputError(
                f"schedule.norms: {name}: expected matrices that take its constant in, all that read it or all that "
                f"write what it reads; found none, as some have been removed, are a tied table or are joined by skips; "
                f"leave schedule.norms out, or let the skips fade, too"
            )
        yield Norm(name, writers=tuple(modules[each] for each in writers))


def _writers(norm: str, a: Architecture) -> tuple[str, ...]:
    """All that write what a norm reads, where nothing else reads it; none where something does."""
    if norm == "model.embed_norm":
        return () if a.tie_word_embeddings else ("model.embed_tokens",)
    (space,) = (each for each in graph(a).spaces if any(norm in port.norms for port in each.readers))
    alone = all(port.norms == (norm,) for port in space.readers) and not any(port.norms for port in space.writers)
    writers = tuple(port.module for port in space.writers)
    partial = a.norm_type == "layer" and not a.norm_topk_prob and any(".experts." in each for each in writers)
    return () if not alone or space.written_tied or partial else writers


def biased(norm: Norm, architecture: Architecture) -> tuple[Module, ...]:
    """The modules that take a norm's bias in, of those that take the norm in."""
    if not any(module.bias for module in architecture.norm_modules() if module.name == norm.name):
        return ()
    ffn = tuple(module for module in norm.writers if ".mlp." in module.name)  # experts' weights sum to 1
    return norm.readers or ffn or norm.writers[:1]


@torch.no_grad()
def move(norm: Norm, architecture: Architecture, state: State) -> None:
    """Move a norm from a state into the modules that take it in."""
    rms, _ = state.pop(f"{norm.name}.log_rms").double().exp(), state.pop(f"{norm.name}.steps")
    gain, bias = (state.pop(f"{norm.name}.{kind}", None) for kind in ("weight", "bias"))
    scale = torch.ones(architecture.hidden_size) if gain is None else gain.cpu()
    scale = scale.double() / rms.cpu()
    centered = architecture.norm_type == "layer"
    for module in (*norm.readers, *norm.writers):
        name = f"{module.name}.weight"
        weight = state[name].to(scale)  # a linear layer's: (outputs, inputs), a table's: (rows, outputs)
        held = state.get(f"{module.name}.bias")
        shift = None if held is None else held.to(scale)
        if module in norm.readers:
            folded = weight * scale
            folded = folded - folded.mean(1, keepdim=True) if centered else folded
            added = None if bias is None else weight @ bias.to(scale)
        else:
            outputs = weight if module.table else weight.T
            outputs = outputs - outputs.mean(-1, keepdim=True) if centered else outputs
            folded = outputs * scale if module.table else (outputs * scale).T
            if shift is not None:
                shift = (shift - shift.mean() if centered else shift) * scale
            added = None if bias is None else bias.to(scale)
        if module in biased(norm, architecture):
            assert added is not None
            if module.table:
                folded = folded + added
            else:
                shift = added if shift is None else shift + added
        state[name] = folded.to(state[name]).contiguous()
        if shift is not None:
            state[f"{module.name}.bias"] = shift.to(state[name])

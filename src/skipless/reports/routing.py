"""Experts: what other models compute when they send each token where A does.

Which experts a token goes to is a step: where two are as good, rounding makes another choice, and another function of
that token and of all that look back at it. So A's choices are noted, and others are run with them: what they compute is
then smooth, and how they would have chosen shows in their routing weights, which are compared with A's.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Choice:
    """Of one layer: the experts' weights, (tokens, experts), and those that were taken, (tokens, taken)."""

    weights: Tensor
    taken: Tensor


@contextmanager
def noting(model: PreTrainedModel) -> Iterator[list[Choice]]:
    """The experts that a model chooses in the passes made meanwhile, by layer; none if its routers are not known."""
    noted: list[Choice] = []

    def choose(module: Any, weights: Tensor) -> Tensor:
        taken: Tensor = type(module).choose(module, weights)
        noted.append(Choice(weights.double(), taken))
        return taken

    with _choosing(model, choose):
        yield noted


@contextmanager
def following(model: PreTrainedModel, noted: list[Choice]) -> Iterator[list[Tensor]]:
    """Have a model choose the experts that were noted.

    Gives, layer by layer, the relative error of each token's routing weights. A model that cannot follow (`follows`)
    chooses for itself, and gives nothing.
    """
    others, errors = iter(noted), list[Tensor]()

    def choose(module: Any, weights: Tensor) -> Tensor:
        choice = next(others)
        errors.append((weights.double() - choice.weights).norm(dim=-1) / choice.weights.norm(dim=-1))
        return choice.taken

    with _choosing(model, choose) if follows(model, noted) else nullcontext():
        yield errors


def follows(model: PreTrainedModel, noted: list[Choice]) -> bool:
    """Whether a model has experts to take for each choice that was noted."""
    routers = [(len(module.experts), module.top_k) for module in _routers(model)]
    return bool(noted) and routers == [(each.weights.shape[-1], each.taken.shape[-1]) for each in noted]


def routed(model: PreTrainedModel) -> bool:
    """Whether tokens are sent to experts."""
    fields = ("num_local_experts", "num_experts", "n_routed_experts")
    return any(getattr(model.config, name, None) for name in fields)


def _routers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "choose") and hasattr(module, "experts")]


@contextmanager
def _choosing(model: nn.Module, choose: Any) -> Iterator[None]:
    routers = _routers(model)
    for module in routers:
        module.choose = lambda weights, module=module: choose(module, weights)
    try:
        yield
    finally:
        for module in routers:
            del module.choose

"""What a run would take, found without memory for it: the model's shapes alone run once (torch's fake tensors)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from skipless.model import SkiplessForCausalLM
from skipless.train.optimizer import MuonAdamW
from skipless.train.recipe import Recipe
from skipless.train.run import new_config


@dataclass(frozen=True)
class TrainingEstimate:
    """What a run would take.

    tokens_per_step: of all processes. tokens: of all steps. flops: of all steps, 6 a weight and token, without the
    attention's. memory: bytes a process, by what takes them, without the allocator's and the libraries' own.
    """

    parameters: int
    tokens_per_step: int
    tokens: int
    flops: int
    memory: dict[str, int]


class EvenExperts(TorchFunctionMode):
    """Each expert takes as many tokens: which ones it takes, shapes alone do not say."""

    def __init__(self, experts: int):
        super().__init__()
        self.experts = experts

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch.where(taken), with a share of what there is to take."""
        if function is torch.where and len(args) == 1:
            return args[0].new_zeros((args[0].ndim, args[0].numel() // self.experts), dtype=torch.long).unbind()
        return function(*args, **(kwargs or {}))


def estimate(recipe: Recipe, processes: int) -> TrainingEstimate:
    """What a run of so many processes, one a GPU, would take.

    Weights, gradients and optimizer are in fp32. FSDP spreads them over the processes; then a layer's weights and
    gradients are whole while it is computed (and the next layer's weights, which are fetched meanwhile), and those
    outside of layers all the time. Without FSDP, bf16 keeps a copy of the weights. Raises InputError for a [model] that
    is none.
    """
    config = new_config(recipe)
    computed = torch.bfloat16 if recipe.bf16 else torch.float32
    with FakeTensorMode(), EvenExperts(config.num_local_experts or 1):
        model = AutoModelForCausalLM.from_config(config, dtype=computed)
        muon, adamw = (
            sum(weight.numel() for weight in group["params"]) for group in MuonAdamW(model, 0.0, 0.0).param_groups
        )
        outside, layers = _activations(model, recipe.batch_size, recipe.sequence_length)
    weights = muon + adamw
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    shards = processes if recipe.fsdp else 1
    states = recipe.batch_size * recipe.sequence_length * config.hidden_size * computed.itemsize
    memory = {
        "weights": 4 * weights // shards,
        "gradients": 4 * weights // shards,
        "optimizer": (4 * muon + 8 * adamw) // shards,
        "activations": outside + (len(layers) * states + max(layers) if recipe.checkpointing else sum(layers)),
    }
    if recipe.fsdp:
        rest = weights - layer * len(layers)
        memory["gathered"] = (3 * layer + 2 * rest) * computed.itemsize
    elif recipe.bf16:
        memory["bfloat16 weights"] = 2 * weights
    step = recipe.batch_size * recipe.accumulate * recipe.sequence_length * processes
    return TrainingEstimate(weights, step, step * recipe.steps, 6 * weights * step * recipe.steps, memory)


def _activations(model: SkiplessForCausalLM, batch: int, length: int) -> tuple[int, list[int]]:
    """Bytes that autograd keeps of one batch for the way back, outside of layers and of each, weights aside."""
    seen = {weight.untyped_storage()._cdata: weight for weight in model.parameters()}  # kept: ids come again
    outside = len(model.model.layers)
    sizes, where = [0] * (outside + 1), outside

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = tensor
            sizes[where] += storage.nbytes()
        return tensor

    def enter(index: int) -> None:
        nonlocal where
        where = index

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: enter(index))
        layer.register_forward_hook(lambda *_: enter(outside))
    ids = torch.zeros(batch, length, dtype=torch.long)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sizes[outside], sizes[:outside]

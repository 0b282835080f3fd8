"""Tiny models, built in code: all weights, biases, gains and orders random, so that nothing cancels by being one."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from skipless.model import SkiplessConfig, SkiplessForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# As small as a model can be, for what fuses it hundreds of times, and options that give nearly each tensor a file.
SMALL: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 11}
SMALL_FILES: dict[str, Any] = {"basis": "q", "max_shard_size": 1000}
# Options of a fuse that writes many files, in bf16.
MANY_FILES: dict[str, Any] = {"dtype": "bfloat16", "max_shard_size": 20_000}


@torch.no_grad()
def build(seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any) -> SkiplessForCausalLM:
    """A tiny model with random, well-conditioned weights (orthogonal plus noise) and layer outputs of unit size.

    A GLU squares its input, layer by layer: left alone, one key would take all the attention and the loudest token
    all the tolerance.
    """
    torch.manual_seed(seed)
    model = SkiplessForCausalLM(SkiplessConfig(**{**TINY, **fields})).double().eval()
    for name, weight in model.named_parameters():
        if name.endswith(("bias", "alpha", "beta", "gamma")):
            weight.normal_()
        elif "norm" in name or name.endswith("_gain"):  # away from 0, at which a whole branch would be lost
            weight.normal_(1, 0.3)
        elif "proj" in name:
            noise = 0.2 * torch.randn_like(weight) * weight.shape[1] ** -0.5
            weight.copy_(torch.nn.init.orthogonal_(torch.empty_like(weight), gain=1.3) + noise)
    for name, order in model.named_buffers():
        if name.endswith(("key_order", "value_order")):
            for own in order:
                places, others = torch.rand(len(own)) < 0.5, torch.arange(len(own), model.config.hidden_size)
                own.copy_(torch.arange(len(own)))
                (moved,) = places.nonzero(as_tuple=True)
                moved = moved[: len(others)]
                own[moved] = others[torch.randperm(len(others))[: len(moved)]].to(own.dtype)
        else:
            order.copy_(torch.rand(order.shape).argsort(-1))
    for index, layer in enumerate(model.model.layers, 1):
        size = model(input_ids=random_ids(model), output_hidden_states=True).hidden_states[index].std()
        for name, weight in layer.mlp.named_parameters():
            if "down_proj" in name:
                weight /= size or 1  # of units that are all dead, nothing
    return model.to(dtype)


def save(model: SkiplessForCausalLM, folder: Path, **options: Any) -> Path:
    """Save as a user would."""
    model.save_pretrained(folder, **options)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder and those within; of skipless.json, less forecasts and checks, whose last
    digits depend on how many rows are computed at a time.
    """
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    if "skipless.json" in found:
        record = json.loads(found["skipless.json"])
        assert record.pop("seams"), folder
        assert record.pop("check"), folder
        found["skipless.json"] = json.dumps(record).encode()
    return found


def stop_fuse(source: Path, destination: Path, number: int, **options: Any) -> Path:
    """Begin a fuse, and stop it when the task of this number is done; where it is in the making."""
    from skipless import fuse
    from skipless.checkpoint.staging import LocalDestination

    def stop(plan: Any, task: Any) -> None:
        if task is plan.tasks[number]:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        fuse(source, destination, progress=stop, **options)
    assert not destination.exists()
    return LocalDestination(destination).unfinished


def random_ids(model: SkiplessForCausalLM, batch: int = 2, length: int = 11, seed: int = 1) -> torch.Tensor:
    """Random token ids (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


@torch.no_grad()
def relative_error(found: SkiplessForCausalLM, expected: SkiplessForCausalLM, **kwargs: Any) -> float:
    """The largest difference of logits, relative to the token's largest logit, on random tokens."""
    ids = random_ids(expected, **kwargs)
    reference = expected(input_ids=ids).logits.double()
    difference = found(input_ids=ids).logits.double() - reference
    return (difference.abs().amax(-1) / reference.abs().amax(-1)).max().item()


def load(folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> SkiplessForCausalLM:
    """Load as a user would."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a single-file checkpoint; '__' stands for '.' in names."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name, value in changes.items():
        config.pop(name, None)
        if value is not None:
            config[name] = value
    file.write_text(json.dumps(config))

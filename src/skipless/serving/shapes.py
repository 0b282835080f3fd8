"""Random skipless models of a known shape, whole and without what can be removed: to time what is not trained yet."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch

from skipless.architecture.config import Architecture
from skipless.checkpoint.reader import CheckpointReader
from skipless.errors import InputError
from skipless.inference import save
from skipless.model import SkiplessConfig, SkiplessForCausalLM
from skipless.model.modeling_skipless import SkiplessDecoderLayer
from skipless.reports.counting import resolve
from skipless.rewrite.planning import make_plan
from skipless.rewrite.request import Request

# A skipless config's own fields.
FIELDS = tuple(SkiplessConfig.__annotations__)
# On so many random tokens, the size of each layer's output is set to 1.
TOKENS = 32


def write_shapes(name: str, layers: int | None, dtype: str, folder: Path) -> list[Path]:
    """Write a skipless model of this shape into folder/original, and what fusing it by q and by pivoted columns would
    leave into folder/q (if its q_proj is square) and folder/pivoted.

    name: as for count; layers: so many instead of its own. Raises InputError for what has no skipless checkpoint.
    """
    architecture = skipless_shape(name, layers)
    original = folder / "original"
    write(config_of(architecture), dtype, original)
    written = [original]
    reader = CheckpointReader(original)
    square = architecture.query_width == architecture.hidden_size
    for basis in ("q", "pivoted") if square else ("pivoted",):
        config = make_plan(reader, Request(basis=basis)).config
        write({field: value for field, value in config.items() if field in FIELDS}, dtype, folder / basis)
        written.append(folder / basis)
    return written


def skipless_shape(name: str, layers: int | None) -> Architecture:
    """The skipless version of a known model, or of its first layers."""
    _, _, architecture, _ = resolve(name)
    if not architecture.expressible:
        raise InputError(
            f"{name}: expected a model that a skipless checkpoint can be; found projected embeddings, a norm of all "
            f"heads together, or layers of different kinds"
        )
    if layers is not None:
        architecture = dataclasses.replace(architecture, num_hidden_layers=layers, layers_open=())
    return architecture.skipless()


def config_of(architecture: Architecture) -> dict[str, Any]:
    """The fields of a config.json, less those that do not apply; a model of skips and norms it is not."""
    fields = {name: getattr(architecture, name) for name in FIELDS if hasattr(architecture, name)}
    unused = {"norms", "norms_removed", "gains_removed", "layers_open", "folded_biases"}
    return {name: value for name, value in fields.items() if name not in unused and (value or value is False)}


@torch.no_grad()
def write(config: dict[str, Any], dtype: str, folder: Path) -> None:
    """Write a model of random weights, each layer's output of size 1: without norms it would soon be 0 or infinite."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = SkiplessForCausalLM(SkiplessConfig(**config))
    model = model.to(getattr(torch, dtype)).to_empty(device="cpu").eval()
    model.tie_weights()
    for weight in model.parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5 if weight.ndim > 1 else 1)
    for order in model.buffers():
        order.copy_(torch.rand(order.shape).argsort(-1))

    def rescale(layer: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        for name, weight in cast(SkiplessDecoderLayer, layer).mlp.named_parameters():
            if "down_proj" in name:
                weight.div_(output.std())
        return output / output.std()

    for layer in model.model.layers:
        layer.register_forward_hook(rescale)
    model(input_ids=torch.randint(model.config.vocab_size, (1, TOKENS)), use_cache=False)
    save(model, folder)

"""How well weights go into few bits: skipless models, what fuse makes of them by each basis, and a pre-norm twin.

    python benchmarks/lowbits.py WORK [--tokens 614400]

Trains, unless benchmarks/curves.py has, a serial skipless model (MHA, so that Q, K and V can each be the basis), one
that has no Q and P from the start, and one with skips and norms, on the same tokens. The bundled model (GQA) comes on
top. Every matrix, embeddings and head included, is rounded to the nearest of a symmetric grid, int8 or int4, with a
scale for each 32 of its inputs. Prints Markdown: excess kurtosis (0: normal) of matrices and of what they read, the
largest range of an input over the median one's, and what int8 and int4 add to the held-out loss. KB are those of int4
with scales in 16 bits.

Of int4, changes of basis that cost no weights and change no function are tried on top: "scaled" and "rotated" (below);
and int8 for the projections, which give queries, keys and values (of pivoted columns: rest_proj).
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import skipless
from curves import held_out, trained
from skipless.architecture.config import Architecture
from skipless.architecture.graph import graph
from skipless.bundled import BUNDLED
from skipless.inference import load
from stored import held_out as held_out_of_bundled

GROUP, SEQUENCES = 32, 32
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "rest_proj")
WHOLE, FUSED = ("pre-norm with skips", "serial MHA without QP"), "serial MHA"


def matrices(model: Any) -> dict[str, torch.Tensor]:
    """All that is stored in few bits, (rows, inputs); of a table, a row is what is looked up."""
    return {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest point of a symmetric grid, with a scale for each GROUP numbers of a row."""
    padded = nn.functional.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    most = 2 ** (bits - 1) - 1
    scale = padded.abs().amax(-1, keepdim=True).clamp(min=1e-30) / most
    return ((padded / scale).round() * scale).flatten(1)[:, : weight.shape[1]]


def bits_of(name: str, bits: int, wide: Sequence[str]) -> int:
    return 8 if name.split(".")[-2] in wide else bits


@torch.no_grad()
def in_bits(model: Any, bits: int, wide: Sequence[str] = ()) -> Any:
    """A copy with its matrices in so many bits, those of `wide` modules in 8."""
    found = copy.deepcopy(model)
    for name, weight in matrices(found).items():
        weight.copy_(rounded(weight, bits_of(name, bits, wide)))
    return found


@torch.no_grad()
def loss(model: Any, tokens: torch.Tensor) -> float:
    """Held-out nats a token."""
    parts = [model(input_ids=ids, labels=ids, use_cache=False).loss * len(ids) for ids in tokens.split(8)]
    return (sum(parts) / len(tokens)).item()


@torch.no_grad()
def inputs(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What each linear module reads, (tokens, inputs)."""
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        kept.append(given[0].flatten(0, -2))

    hooks = [each.register_forward_pre_hook(keep) for each in model.modules() if isinstance(each, nn.Linear)]
    model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return kept


def kurtosis(numbers: torch.Tensor) -> float:
    centered = numbers.double() - numbers.double().mean()
    return (centered.pow(4).mean() / centered.square().mean().square()).item() - 3


def spread(numbers: torch.Tensor) -> float:
    """The largest range of an input (rows, inputs) over the median one's."""
    ranges = numbers.abs().amax(0)
    return (ranges.max() / ranges.median()).item()


def median(numbers: Sequence[float]) -> float:
    return torch.tensor(numbers).median().item()


@torch.no_grad()
def change(writers: Sequence[nn.Module], readers: Sequence[nn.Module], matrix: torch.Tensor) -> None:
    """Another basis of what lies between linear modules: writers y -> y G, readers W -> G^-1 W."""
    inverse = torch.linalg.inv(matrix)
    for writer in writers:
        table = isinstance(writer, nn.Embedding)
        writer.weight.copy_(writer.weight @ matrix if table else matrix.T @ writer.weight)
        if getattr(writer, "bias", None) is not None:
            writer.bias.copy_(writer.bias @ matrix)
    for reader in readers:
        reader.weight.copy_(reader.weight @ inverse.T)


def columns(readers: Sequence[nn.Module]) -> torch.Tensor:
    """RMS of what each input is multiplied by."""
    return torch.stack([reader.weight.square().mean(0) for reader in readers]).mean(0).sqrt()


Modules = list[nn.Module]


def spaces(model: Any) -> Iterator[tuple[Modules, Modules, list[tuple[nn.Module, Modules]]]]:
    """Of each space of the stream whose modules are all there: writers, readers, and norms, each with what reads it."""
    modules: dict[str, Any] = dict(model.named_modules())
    found = graph(Architecture.from_config(json.loads(model.config.to_json_string())))
    for space in found.spaces:
        writers, readers = ([modules.get(port.module) for port in ports] for ports in (space.writers, space.readers))
        norms = dict.fromkeys(name for name, _ in space.norms)
        if None not in (*writers, *readers):
            yield writers, readers, [(modules[name], [modules[each] for each in found.through(name)]) for name in norms]


def readers_of_values(layer: nn.Module) -> list[nn.Module]:
    """What reads a layer's values, if they are whole."""
    attention, mlp = layer.self_attn, layer.mlp
    if attention.v_proj is None:
        return []
    return [each for each in ([attention.o_proj] if attention.o_proj else [mlp.gate_proj, mlp.up_proj]) if each]


def change_values(layer: nn.Module, matrix: torch.Tensor, config: Any) -> None:
    """Another basis of each key-value head's values, by matrices (key-value heads, dh, dh)."""
    group = config.num_attention_heads // config.num_key_value_heads
    change([layer.self_attn.v_proj], [], torch.block_diag(*matrix))
    change([], readers_of_values(layer), torch.block_diag(*matrix.repeat_interleave(group, 0)))


@torch.no_grad()
def rotate(model: Any) -> None:
    """By random orthogonal matrices, each space of the stream that is whole, and each head's values. Norms without
    gains do not notice, so their gains move into what reads them first (QuaRot, arXiv:2404.00456).
    """
    config, generator = model.config, torch.Generator().manual_seed(0)

    def orthogonal(*shape: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64)).Q.to(model.dtype)

    for writers, readers, norms in spaces(model):
        for norm, through in norms:
            change([], through, (1 / norm.weight).diag())
            norm.weight.fill_(1)
        change(writers, readers, orthogonal(config.hidden_size, config.hidden_size))
    for layer in model.model.layers:
        if readers_of_values(layer):
            change_values(layer, orthogonal(config.num_key_value_heads, config.head_dim, config.head_dim), config)


@torch.no_grad()
def scale(model: Any) -> None:
    """So that all numbers that share a scale have the same range: each input of each matrix, where that is free (the
    stream or the gain of the norm that it is read through, values, the FFN's inner units), has columns of RMS 1. But
    not the head, where the rows of rare tokens would have the say: that doubles the bundled model's int4 loss.
    """
    config, head = model.config, model.lm_head
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for writers, readers, norms in spaces(model):
        for norm, through in norms:
            if head not in through:
                by = columns(through)
                norm.weight.mul_(by)
                change([], through, by.diag())
        if not norms and head not in readers:
            change(writers, readers, columns(readers).diag())
    writers = [model.model.embed_tokens]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if config.stream_basis == "q" and config.residual == "none":
            # The stream is the queries, whose scale can go to the keys, if RoPE's pairs and a group's heads share it.
            by = columns([attention.k_proj, attention.v_proj]).log().view(groups, -1, 2, size // 2)
            by = by.mean((1, 2), keepdim=True).exp()
            whole = by.expand(groups, heads // groups, 2, size // 2).flatten()
            change(writers, [attention.k_proj, attention.v_proj], whole.diag())
            change([attention.k_proj], [], (1 / by.expand(groups, 1, 2, size // 2).flatten()).diag())
        if values := readers_of_values(layer):
            by = columns(values).log().view(groups, -1, size).mean(1).exp()
            change_values(layer, torch.diag_embed(by), config)
        change([mlp.up_proj], [mlp.down_proj], columns([mlp.down_proj]).diag())
        writers = [mlp.down_proj]


def changed(model: Any, tokens: torch.Tensor, make: Callable[[Any], None]) -> Any:
    """A copy in another basis, which must be the same function."""
    found = copy.deepcopy(model).double()
    before = loss(found, tokens[:4])
    make(found)
    assert abs(loss(found, tokens[:4]) - before) < 1e-8
    return found.float()


def cost(model: Any, tokens: torch.Tensor, bits: int, wide: Sequence[str] = ()) -> str:
    """What so few bits add to the loss."""
    added = loss(in_bits(model, bits, wide), tokens) - loss(model, tokens)
    return f"{added:.4f}" if added < 10 else "over 10"


def size(model: Any, wide: Sequence[str] = ()) -> str:
    """KB in int4, with scales in 16 bits."""
    sizes = (each.numel() * (bits_of(name, 4, wide) + 16 / GROUP) / 8 for name, each in matrices(model).items())
    return f"{sum(sizes) / 1e3:,.0f}"


def report(name: str, model: Any, tokens: torch.Tensor) -> None:
    """A row of the table: a model, the same function in other bases, and with 8 bits for what gives q, k and v."""
    weights, read = matrices(model).values(), inputs(model, tokens[:8])
    cells = [name, size(model), f"{loss(model, tokens):.3f}"]
    for measure in (kurtosis, spread):
        cells += [f"{median([measure(each) for each in those]):.1f}" for those in (weights, read)]
    cells += [cost(model, tokens, 8), cost(model, tokens, 4)]
    cells += [cost(changed(model, tokens, make), tokens, 4) for make in (scale, rotate)]
    cells += [cost(model, tokens, 4, PROJECTIONS), size(model, PROJECTIONS)]
    print(f"| {' | '.join(cells)} |", flush=True)


def report_fused(name: str, folder: Path, bases: Sequence[str], tokens: torch.Tensor) -> None:
    """A skipless model, and what fuse makes of it."""
    report(name, load(folder, torch.float32), tokens)
    for basis in bases:
        with tempfile.TemporaryDirectory() as temporary:
            skipless.fuse(folder, Path(temporary) / "fused", basis=basis, dtype="float32")
            report(f"{name}, fused by {basis}", load(Path(temporary) / "fused", torch.float32), tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokens", type=int, default=614_400)
    arguments = parser.parse_args()
    folders = {kind: trained(kind, arguments.work, arguments.tokens) for kind in (*WHOLE, FUSED)}
    tokens = held_out(arguments.work, SEQUENCES)
    header = ["", "KB", "loss", "kurtosis: weights", "inputs", "ranges: weights", "inputs", "int8", "int4"]
    header += ["scaled", "rotated", "projections int8", "KB"]
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|", flush=True)
    for kind in WHOLE:
        report(kind, load(folders[kind], torch.float32), tokens)
    report_fused(FUSED, folders[FUSED], ("q", "k", "v", "pivoted"), tokens)
    report_fused("bundled", BUNDLED, ("q", "pivoted"), held_out_of_bundled(2 * SEQUENCES))


if __name__ == "__main__":
    main()

"""What of a model with skips and norms can be moved within its own layout: no tensor goes, some become neutral.

A norm gives x = n g + c, with n the normalized stream, gain g and bias c (LayerNorm's), and matrices read x W + b:

    norms    W -> diag(g) W, b -> b + c W; then g = 1, c = 0
    biases   K's, of what RoPE does not rotate: adds q b_K to all of a query's scores, which the softmax takes away
             again (no family described here caps the scores of such a model); then b_K = 0
             V's: the softmax's rows sum to 1, so P's bias takes b_V P in (each head its own part); then b_V = 0

Seams of such a model: the same shapes before and after, so that it loads wherever it did.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache

from skipless.architecture.config import Architecture, Module
from skipless.architecture.graph import Graph, graph
from skipless.architecture.seams import Seam

# The kinds that can be asked for, in the order in which they are moved: what norms give becomes a bias of K and V.
FOLDS = ("norms", "biases")


@lru_cache(8)
def folds(architecture: Architecture) -> tuple[Seam, ...]:
    """What can be moved, in order, and what stays, with the reason in Seam.blocked.

    Ways: "fold" (a norm into what reads it), "key_bias", "value_bias". saves: the numbers that become neutral.
    """
    modules = {module.name: module for module in architecture.modules()}
    spaces = graph(architecture)
    norms = [_norm(architecture, norm, spaces, modules) for norm in architecture.norm_modules()]
    biases = [seam for layer in range(architecture.num_hidden_layers) for seam in _biases(architecture, layer, modules)]
    return (*norms, *biases)


def staying(every: Iterable[Seam]) -> tuple[str, ...]:
    """What stays, and why: a sentence for each reason, with the same tensor of many layers in one."""
    names_of: dict[tuple[str, str], list[str]] = {}
    for seam in every:
        if seam.blocked:
            name = seam.writers[0]
            names_of.setdefault((name.rpartition(".")[2], seam.blocked), []).append(name)
    return tuple(
        f"{names[0]}{f' (and in {len(names) - 1} more layers)' if len(names) > 1 else ''} stays as it is: {reason}"
        for (_, reason), names in names_of.items()
    )


def _norm(architecture: Architecture, norm: Module, spaces: Graph, modules: Mapping[str, Module]) -> Seam:
    readers = spaces.through(norm.name)
    layer = int(norm.name.split(".")[2]) if norm.name.startswith("model.layers.") else 0
    unable = [name for name in readers if name in modules and not modules[name].bias]
    blocked = None
    if ".self_attn." in norm.name:
        blocked = "it is a norm of queries or keys, which no matrix reads"
    elif not readers:
        blocked = "what it gives joins the stream, or is the stream, which other norms and the skips read, too"
    elif "model.embed_tokens" in readers:
        blocked = (
            "tie_word_embeddings: its reader, the head, is the table of the embeddings; an untied copy of it as the "
            "head could take the gain in"
        )
    elif any(name not in modules for name in readers):
        blocked = "some of what reads it is not there any more"
    elif norm.bias and unable:
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in unable))
        blocked = f"it has a bias, and its readers {kinds} have none to take it in"
    if norm.name == "model.norm":
        layer = architecture.num_hidden_layers
    numbers = norm.outputs * (1 + norm.bias)
    return Seam("norms", layer, norm.outputs, (norm.name,), readers, {"fold": ()}, numbers, blocked=blocked)


def _biases(architecture: Architecture, layer: int, modules: Mapping[str, Module]) -> Iterable[Seam]:
    keys, values, p = (f"model.layers.{layer}.self_attn.{name}_proj" for name in "kvo")
    biased = {name for name in (keys, values, p) if name in modules and modules[name].bias}
    blocks, unrotated = architecture.num_key_value_heads, architecture.unrotated
    blocked = None
    if not unrotated:
        blocked = f"position_type {architecture.position_type!r}: keys are rotated, so that it differs from key to key"
    elif architecture.qk_norm:
        blocked = "qk_norm: keys are normalized with it"
    if keys in biased:
        own: dict[str, tuple[str, ...]] = {"key_bias": ()}
        yield Seam("biases", layer, unrotated, (keys,), (), own, blocks * unrotated, blocks=blocks, blocked=blocked)
    if values in biased:
        blocked = None if p in biased else "o_proj has no bias to take it in"
        ways: dict[str, tuple[str, ...]] = {"value_bias": ()}
        size = architecture.head_dim
        yield Seam("biases", layer, size, (values,), (p,), ways, blocks * size, blocks=blocks, blocked=blocked)

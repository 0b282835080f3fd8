"""How much of a model carries no information: parameters less the rank of the Jacobian of all its outputs, by formula.

A space that some matrices write and others read has a group of changes of basis that change nothing: GL(d), if only
linear maps read it; O(d), if an RMSNorm does; what remains of it where a tied table both writes and reads it. To these
come scalings within the layers. Letters as in arXiv:2404.12362; certificate.py counts the rank itself.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from skipless.architecture.config import HOMOGENEOUS, OUTPUT_NORMS, PRE_NORM, Architecture
from skipless.architecture.graph import Space, graph
from skipless.architecture.seams import KINDS, Seam, reasons, seams
from skipless.errors import InputError

# Bytes of a weight in half precision.
HALF = 2


@dataclass(frozen=True)
class Limit:
    """How many of `parameters` carry no information, and how many of those can be removed.

    terms: what carries no information, by where it is. at_least: why there may be more, or "". removed: what rewriting
    removes, by kind of seam. blocked: why other kinds stay.
    """

    parameters: int
    terms: dict[str, int]
    at_least: str
    removed: dict[str, int]
    blocked: tuple[str, ...]

    @property
    def removable(self) -> int:
        """All terms."""
        return sum(self.terms.values())


def limit(architecture: Architecture) -> Limit:
    """The formula, and what `fuse` can remove of it where weights are stored in half precision."""
    a = architecture
    if a.stream_basis or a.p_removed or a.values_removed or a.keys_removed or a.head_removed or a.first_layer_removed:
        raise InputError("config.json: expected a model that has not been fused, for which there is a formula")
    possible = [seam for seam in seams(architecture) if not seam.blocked]
    unpaid = {seam.kind: reason for seam in reversed(possible) if (reason := seam.unpaid(HALF))}
    return Limit(
        parameters=sum(math.prod(shape) for shape in architecture.tensors().values()),
        terms={name: count for name, count in terms(architecture).items() if count},
        at_least=_unknown(architecture),
        removed=saved(closable(architecture)),
        blocked=(
            *reasons(seams(architecture, values="values" not in unpaid, norms=True)),
            *(f"the {kind} seams: {reason}" for kind, reason in unpaid.items()),
        ),
    )


def closable(architecture: Architecture, itemsize: float = HALF) -> list[Seam]:
    """The seams that one fuse closes if it is asked for all kinds that go together; a weight takes `itemsize` bytes."""
    kinds = list(KINDS)
    while True:
        open_seams = seams(architecture, values="values" in kinds or None, norms="norms" in kinds)
        every = [seam for seam in open_seams if seam.kind in kinds and not seam.spared(kinds)]
        blocked = {seam.kind for seam in every if seam.blocked or seam.unpaid(itemsize)}
        if not blocked:
            return every
        if "stream" in blocked and "values" in kinds and not _stream_blocked(architecture):
            blocked = {"values"}  # without them, V's columns can be passed through
        kinds = [kind for kind in kinds if kind not in blocked]


def saved(closing: Iterable[Seam]) -> dict[str, int]:
    """How many weights closing seams saves, by kind."""
    saves: dict[str, int] = {}
    for seam in closing:
        saves[seam.kind] = saves.get(seam.kind, 0) + seam.saves
    return saves


def _stream_blocked(architecture: Architecture) -> bool:
    return any(seam.blocked for seam in seams(architecture, norms=True) if seam.kind == "stream")


def terms(architecture: Architecture) -> dict[str, int]:
    """What carries no information, by where it is."""
    a = architecture
    d, layers, heads, size = a.hidden_size, a.num_hidden_layers, a.num_key_value_heads, a.head_dim
    tied = a.tie_word_embeddings
    experts = sum(len(a.experts(layer)) * a.ffn_width(layer) for layer in range(layers))
    units = (a.ffn_type != "mlp") + (a.hidden_act in HOMOGENEOUS)
    routers = sum(a.has_experts(layer) for layer in range(layers)) * min(d, a.query_width if a.p_alone else d)
    gains = (2 if a.norm_type == "layer" else 1) * d * sum(_foldable(a, norm) for norm in a.norm_names())
    shaped = a.num_attention_heads * (a.attention_shaping is not None)
    if a.norm_type == "none" and (a.residual == "attention" or (a.residual == "both" and not tied)):
        shaped *= 2  # alpha, too: a skip beside a token's own value, x (1 + alpha V P), is a change of basis
    branches = [name for name in a.gain_tensors(0) if ".self_attn." not in name]
    if a.norm_type != "none":  # which see a skip's scale
        branches = [name for name in branches if not name.endswith("skip_gain")]
    return {
        "stream and P": _spaces(a),
        "values": layers * heads * size**2,
        "queries and keys": layers * _queries_and_keys(a),
        "FFN units": units * experts,
        "router": routers,
        "norm gains": gains,
        "trainable gains": layers * (shaped + len(branches)),
        "positions": d * (a.position_type == "learned" and not (tied or a.has_norm("model.embed_norm"))),
        "biases": _biases(a),
    }


def _queries_and_keys(a: Architecture) -> int:
    """A layer's changes of basis of queries and keys: what commutes with RoPE's rotations; with norms, scalings."""
    if a.qk_norm is not None:
        return a.rotated // 2 + a.unrotated if a.qk_norm == "head_dim" else 0
    return a.num_key_value_heads * (a.rotated + a.unrotated**2)


def _biases(a: Architecture) -> int:
    """Numbers that biases have too many.

    V's bias may move into P's, P's into M's, and a constant of the stream into what writes and what reads it. K's does
    nothing where no rotation stands before the softmax.
    """
    if not a.attention_bias or a.norm_type != "none" or a.residual != "none" or a.ffn_type == "moe":
        return 0
    d, e, layers, parallel = a.hidden_size, a.value_width, a.num_hidden_layers, a.block_type == "parallel"
    numbers = layers * e
    if not a.qk_norm:
        numbers += layers * a.num_key_value_heads * a.unrotated
    if a.mlp_bias:
        numbers += layers * d + (layers - 1) * d
    if not a.tie_word_embeddings and (a.mlp_bias or not parallel):
        numbers += d  # in the table's rows
    return numbers


def _foldable(a: Architecture, norm: str) -> bool:
    stays = norm == "model.embed_norm" or norm.rpartition(".")[2] in OUTPUT_NORMS
    return not stays and not (norm == "model.norm" and a.tie_word_embeddings)


def _spaces(a: Architecture) -> int:
    """The dimensions of the groups of all spaces between layers."""
    d, total, tied, inputs = a.hidden_size, 0, [], {module.name: module.inputs for module in a.modules()}
    spaces = graph(a).spaces
    for space in spaces:
        if space.written_tied and space.read_tied:  # the table written with is the one read with
            total += 0 if a.has_norm("model.norm") else _rotations(a, space)
        elif space.written_tied or space.read_tied:
            tied.append(space)
        else:
            total += _changes(a, space)
        if a.norm_type == "layer" and not _bare(space):  # what it adds to all components alike is not seen
            total += sum(inputs[port.module] for port in space.writers)
    if tied:  # one group for the table's both ends
        seen = any(space.read_tied and _normed(space) for space in tied)
        total += 0 if seen else min(_changes(a, space) for space in tied)
    for layer in range(a.num_hidden_layers):
        if a.p_alone and a.query_width < d:  # beside d^2, as P is narrower than the stream
            total += d * a.query_width + (d - a.query_width) * a.ffn_read_width(layer) - d**2
    return total


def _normed(space: Space) -> bool:
    """Whether something reads it through a norm."""
    return any(port.norms for port in space.readers)


def _bare(space: Space) -> bool:
    """Whether something reads it without a norm."""
    return not all(port.norms for port in space.readers)


def _changes(a: Architecture, space: Space) -> int:
    """Dimensions of GL(d), or of the rotations that the norms allow."""
    d = a.hidden_size
    if any(norm.rpartition(".")[2] in OUTPUT_NORMS for port in space.writers for norm in port.norms):
        return 0  # whose gains are of this basis
    if not _normed(space):
        return d**2
    writers = [port.module for port in space.writers]
    if writers == ["model.embed_tokens"] and len(space.places) == 1 and not _bare(space):
        # normalized rows are a table like any other; layer-normalized ones have no mean
        return d**2 if a.norm_type == "rms" else d * (d - 1)
    return _rotations(a, space)


def _rotations(a: Architecture, space: Space) -> int:
    """Dimensions of O(d), or, if a layer norm reads the space, of the rotations that leave the mean alone."""
    d = a.hidden_size - (_normed(space) and a.norm_type == "layer")
    return d * (d - 1) // 2


def _unknown(a: Architecture) -> str:
    """Why the formula may fall short, or ""."""
    narrow = min(a.ffn_read_width(layer) for layer in range(a.num_hidden_layers)) < a.hidden_size
    biased = (a.attention_bias or a.mlp_bias or a.gate_bias or a.qkv_bias) and (
        a.norm_type != "none" or a.residual != "none" or a.ffn_type == "moe"
    )
    usual = set(PRE_NORM) == set(a.norms)
    reasons = {
        "the FFN is narrower than the stream": narrow or a.intermediate_size < a.hidden_size,
        "norm_eps 0 makes norms blind to scale": a.norm_type != "none" and a.norm_eps == 0,
        "biases meet norms, skips or experts": biased,
        "heads are narrower than the stream that they write": not a.p_alone and a.query_width < a.hidden_size,
        "the embeddings are normalized or projected": a.has_norm("model.embed_norm") or a.embedding_size is not None,
        "norms of queries and keys take all heads together": a.qk_norm == "heads",
        "layer norms stand in some places alone": a.norm_type == "layer" and not usual,
        "layers differ": bool(a.dense_layers),
        "positions are learned": a.position_type == "learned",
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)

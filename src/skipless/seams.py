"""Seams: the spaces that some matrices write and others read, with only linear maps on both sides.

Any invertible G may be put into a seam of width r - writers W -> W G, readers W -> G^-1 W - without changing the
function, so r^2 weights carry no information, and one r x r block can be made the identity and left out.
Row vectors, y = x W + b (arXiv:2404.12362, Fig. 1 and 2). Here is only who writes and who reads; eliminate.py does it.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from skipless.architecture import Architecture


@dataclass(frozen=True)
class Seam:
    """One seam, as data. Modules are named as in the checkpoint.

    kind: "stream" (between one layer's output and the next one's Q, K, V) or "p" (between P and M), with its layer.
    writers, readers: the modules whose outputs, inputs lie in the seam's space, of `width` dimensions.
    bias_takers: the modules that take in the bias of the module that goes.
    duals: modules whose outputs the seam's tied table reads transposed (the last O, when the head is the embedding).
    identities: name of a way to close the seam -> the modules that go. A way by which one module goes makes it the
        identity; by "pivoted", `width` columns of the readers [Q|K|V] become the identity, the other columns one
        module, `rest`, and `order` is the index tensor that puts the outputs back in their places.
    followers: further readers, which take in the basis and keep their shape (M, where it stands beside the attention).
    saves: weights (biases and indices not counted) that closing it removes.
    blocked: why the seam cannot be closed; None if it can. pending: why fuse cannot close it yet, although it can be.
    """

    kind: str
    layer: int
    width: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    identities: dict[str, tuple[str, ...]] = dataclasses.field(hash=False)
    saves: int
    bias_takers: tuple[str, ...] = ()
    duals: tuple[str, ...] = ()
    rest: str = ""
    order: str = ""
    followers: tuple[str, ...] = ()
    blocked: str | None = None
    pending: str | None = None

    def way(self, basis: str) -> str:
        """How it is closed when stream seams are closed by `basis`; a P-M seam has only one way."""
        return basis if self.kind == "stream" else "p"

    def removed(self, basis: str) -> tuple[str, ...]:
        """The modules that go when stream seams are closed by `basis`."""
        return self.identities[self.way(basis)]

    @property
    def refusal(self) -> str | None:
        """Why it cannot be closed, in a sentence, or None."""
        reason = self.blocked or self.pending
        return reason and f"the {self.kind} seam of layer {self.layer} is blocked by {reason}"

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module that closing the seam reads or rewrites."""
        return (*self.writers, *self.readers, *self.followers, *self.duals)


def seams(architecture: Architecture) -> list[Seam]:
    """The seams that are still open, in the order of computation, blocked ones included with the reason."""
    found = []
    for layer in range(architecture.num_hidden_layers):
        if not architecture.stream_closed(layer):
            found.append(_stream_seam(architecture, layer))
        if not architecture.p_removed:
            found.append(_p_seam(architecture, layer))
    return found


def closed(architecture: Architecture, closing: Iterable[Seam], basis: str) -> Architecture:
    """The architecture after closing these seams, stream seams by `basis` ("q", "k", "v" or "pivoted").

    Every P-M seam is closed or none, as config.json has one switch for them all.
    """
    closing = list(closing)
    stream = {seam.layer for seam in closing if seam.kind == "stream"}
    p_removed = architecture.p_removed or any(seam.kind == "p" for seam in closing)
    still_open = [seam.layer for seam in seams(architecture) if seam.kind == "stream" and seam.layer not in stream]
    own_biases = {module.name for module in architecture.modules() if module.bias}
    gained = set()
    if architecture.attention_bias:
        for seam in closing:
            gained |= set(seam.bias_takers) - own_biases
    if not architecture.tie_word_embeddings:
        gained.discard("model.embed_tokens")  # every row of an untied table takes the bias in
    order = {module.name: index for index, module in enumerate(architecture.modules())}
    return dataclasses.replace(
        architecture,
        stream_basis=basis if stream else architecture.stream_basis,
        layers_open=tuple(still_open) if stream or architecture.stream_basis else (),
        p_removed=p_removed,
        folded_biases=tuple(sorted({*architecture.folded_biases, *gained}, key=order.__getitem__)),
    )


def _stream_seam(architecture: Architecture, layer: int) -> Seam:
    """Seam i of identities "stream": written by the embeddings (i = 0) or O of layer i - 1, read by Q, K, V.

    In a parallel layer P writes it, too, and M reads it.
    """
    attention = f"model.layers.{layer}.self_attn"
    duals: tuple[str, ...] = ()
    if layer:
        writers = _outputs(architecture, layer - 1)
    else:
        writers = ("model.project_in" if architecture.embedding_size else "model.embed_tokens",)
        if architecture.position_type == "learned":
            writers += ("model.position_embeddings",)
        if architecture.tie_word_embeddings and not architecture.embedding_size:
            duals = _outputs(architecture, architecture.num_hidden_layers - 1)
    parallel = architecture.block_type == "parallel"
    blocked = None
    if architecture.residual != "none":
        blocked = (
            f"residual {architecture.residual!r}: a skip connection carries the stream past layer {layer}'s matrices, "
            f"so its basis cannot be chosen there alone"
        )
    elif architecture.norm_type != "none":
        blocked = (
            f"norm_type {architecture.norm_type!r}: model.layers.{layer}.input_layernorm stands between "
            f"{' and '.join(writers[:2])} and q, k, v_proj, and is not linear"
        )
    d, widths = architecture.hidden_size, architecture.projections
    identities: dict[str, tuple[str, ...]] = {
        name: (f"{attention}.{name}_proj",) for name, width in widths.items() if width == d
    }
    readers = tuple(f"{attention}.{name}_proj" for name in widths)
    if sum(widths.values()) >= d:
        identities["pivoted"] = readers
    elif blocked is None:
        blocked = (
            f"q, k and v_proj of layer {layer} having {sum(widths.values())} outputs together, fewer than hidden_size "
            f"({d}): no {d} of them can stand for the stream"
        )
    return Seam(
        kind="stream",
        layer=layer,
        width=d,
        writers=writers,
        readers=readers,
        identities={name: gone for name, gone in identities.items() if architecture.stream_basis in (None, name)},
        rest=f"{attention}.rest_proj",
        order=f"{attention}.column_order",
        saves=d**2,
        bias_takers=writers[:1],
        duals=duals,
        followers=architecture.ffn_readers(layer) if parallel else (),
        blocked=blocked,
    )


def _outputs(architecture: Architecture, layer: int) -> tuple[str, ...]:
    """What a layer writes its output with."""
    attention = f"model.layers.{layer}.self_attn.o_proj"
    outputs = tuple(f"{ffn}.down_proj" for ffn in architecture.experts(layer))
    return (*outputs, attention) if architecture.block_type == "parallel" else outputs


def _p_seam(architecture: Architecture, layer: int) -> Seam:
    """Written by P, read by M (and the gate; router and experts): M* = P M.

    Where P is wider than the stream (D > d), merging would cost weights, and d of P's rows become the identity instead.
    """
    d, heads = architecture.hidden_size, architecture.query_width
    o_proj = f"model.layers.{layer}.self_attn.o_proj"
    readers = architecture.ffn_readers(layer)
    shown = " and ".join(readers) if len(readers) < 3 else f"model.layers.{layer}.mlp's router and experts"
    blocked = pending = None
    if architecture.block_type == "parallel":
        blocked = (
            f"block_type 'parallel': {o_proj}'s output is added to the FFN's, and nothing reads it alone; from each "
            f"stream seam d^2 weights go, of Q, K, V or of P, not of both"
        )
    elif architecture.residual != "none":
        blocked = (
            f"residual {architecture.residual!r}: a skip connection joins or leaves the stream between {o_proj} and "
            f"{shown}"
        )
    elif architecture.norm_type != "none":
        blocked = (
            f"norm_type {architecture.norm_type!r}: model.layers.{layer}.post_attention_layernorm stands between "
            f"{o_proj} and {shown}, and is not linear"
        )
    elif heads > d:
        pending = (
            f"{o_proj} is ({d}, {heads}): merging it would make {shown} larger, as heads * head_dim "
            f"({heads}) exceeds hidden_size ({d}); close the others with --remove stream"
        )
    routed = architecture.has_experts(layer)
    width = (len(readers) - routed) * architecture.ffn_width(layer) + routed * architecture.num_local_experts
    return Seam(
        kind="p",
        layer=layer,
        width=d,
        writers=(o_proj,),
        readers=readers,
        identities={"p": (o_proj,)},
        bias_takers=readers,
        saves=d**2 if heads > d else heads * d + (d - heads) * width,
        blocked=blocked,
        pending=pending,
    )

"""Seams: the spaces that some matrices write and others read, with only linear maps on both sides.

Any invertible G may be put into a seam of width r - writers W -> W G, readers W -> G^-1 W - without changing the
function, so r^2 weights carry no information, and one r x r block can be made the identity and left out.
Row vectors, y = x W + b (arXiv:2404.12362, Fig. 1 and 2). Here is only who writes and who reads; removals/ does it.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

from skipless.architecture.config import HOMOGENEOUS, Architecture
from skipless.architecture.graph import Place, Port, Space, graph

# What becomes the identity when stream seams are closed: a projection, or the best columns of all three.
BASES = ("q", "k", "v", "pivoted")
AUTO = "auto"
# What is removed unless something else is asked for.
REMOVABLE = ("stream", "p")
# What a model with skips and norms can lose.
COMPACT = ("norms", "values", "queries")
# Of an int32.
INDEX_BYTES = 4
# What gives up d^2 weights at a stream seam of a parallel model: Q, K, V that read it, or P that writes it.
PARALLEL_REMOVES = ("readers", "p")


@dataclass(frozen=True)
class Seam:
    """One seam, as data. Modules are named as in the checkpoint.

    kind: where it is:
        "stream"        between one layer's output and the next one's Q, K, V
        "p"             between P and M
        "values"        between V and P, head by head
        "queries"       between K and Q, head by head; of what RoPE does not rotate
        "head"          between the last layer and the logits
        "norms"         between a norm's gain, or a norm of the embeddings, and what reads it
        "first_layer"   between the token table and layer 0's attention
    layer: that of its readers; for "p" and "values", P's own.
    writers, readers: the modules whose outputs, or inputs, lie in the seam's space, of `width` dimensions (in each of
    `blocks` heads).
    identities: name of a way to close the seam -> the modules that go, or lose a block:
        "q", "k", "v"   this module becomes the identity
        "pivoted"       `width` columns of the readers do, the other columns become one module, `rest`
        "head"          the same, of lm_head, which keeps its name
        "p"             the writer merges into the readers
        "rows"          `width` rows of the first writer (of each block's columns) become the identity; of K, whose
                        seam Q reads transposed
        "gain"          the norm's gain merges into the readers
        "table"         the norm is applied to the table's rows once and for all
        "lookup"        all of the readers are, and what they give is in the table, in the embedding's place
    kept: the module of those columns of the writer that lie in no block, and stay as they are (K's rotated ones).
    order: the index tensor that puts passed and stored columns (rows) in their places. indices: how many it has, where
    they may take more bytes than the block that they replace.
    bias_takers: the modules that take in the bias of the module that goes.
    duals: modules whose outputs the seam's tied table reads transposed (the last O, when the head is the embedding).
    followers: further readers, which take in the basis and keep their shape (V, if its heads lose a block of their own;
        M, where it stands beside the attention).
    through: a norm between writer and readers that is redundant and goes with the seam.
    mixed: the tensors by which the writer's output is shaped and scaled before it is read (arXiv:2311.01906).
    scales: by module, the gains that a bias is multiplied or divided by when it moves past them: those between the
    module and the stream that the readers read, each with its exponent, 1 or -1.
    saves: weights (biases and indices not counted) that closing it removes, less those that it adds.
    blocked: why the seam cannot be closed; None if it can. taken: the kind of seam that the space's weights go with
    instead, if that is why.
    gains, norms: norms whose gain is gone, and norms that are gone, once it is closed.
    seen: by reader or follower that reads before all writers have written, how many have.
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
    kept: str = ""
    order: str = ""
    followers: tuple[str, ...] = ()
    through: str = ""
    mixed: tuple[str, ...] = ()
    blocked: str | None = None
    blocks: int = 1
    taken: str = ""
    gains: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    indices: int = 0
    seen: dict[str, int] = dataclasses.field(default_factory=dict, hash=False)
    scales: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict, hash=False)

    def way(self, basis: str) -> str:
        """How it is closed when stream seams are closed by `basis`; seams of other kinds have only one way."""
        return basis if self.kind == "stream" else next(iter(self.identities))

    def removed(self, basis: str) -> tuple[str, ...]:
        """The modules that go when stream seams are closed by `basis`."""
        return self.identities[self.way(basis)]

    @property
    def refusal(self) -> str | None:
        """Why it cannot be closed, in a sentence, or None."""
        return self.blocked and f"the {self.kind} seam of layer {self.layer} is blocked by {self.blocked}"

    def unpaid(self, itemsize: float) -> str | None:
        """Why closing it saves nothing where a weight takes `itemsize` bytes, in a sentence, or None."""
        saved, spent = int(self.saves * itemsize), self.indices * INDEX_BYTES
        if spent <= saved:
            return None
        return (
            f"{self.order}: expected at most the {saved:,} bytes of the weights that it replaces, found {spent:,}; "
            f"leave {self.kind} out of --remove"
        )

    def spared(self, kinds: Collection[str]) -> bool:
        """Whether it stays open when these kinds are asked for, and is not refused, as its weights go with another."""
        return self.kind in REMOVABLE and self.taken in kinds

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module that closing the seam reads or rewrites."""
        through = (self.through,) if self.through else ()
        return (*self.writers, *through, *self.readers, *self.followers, *self.duals)

    def bias_share(self, writer: str) -> float:
        """The part of this writer's bias that is in the stream; an expert's, on average, as their weights sum to 1."""
        layer, _, expert = writer.partition(".experts.")
        return 1 / sum(name.startswith(f"{layer}.experts.") for name in self.writers) if expert else 1.0


@dataclass(frozen=True)
class Wanted:
    """What the seams depend on beside the architecture.

    parallel_removes: in a parallel model, "readers" (d^2 weights go from Q, K, V, and P is blocked) or "p" (from P, and
    Q, K, V are blocked from layer 1 on). values: whether the value seams will be, or have been, closed: then V's
    columns cannot be passed through. first_layer: whether layer 0 will be, or has been, precomputed: then its matrices
    give up nothing else. Its seam is there only for whoever asks for it, as the model may grow.
    """

    parallel_removes: str = "readers"
    values: bool = False
    first_layer: bool = False


def seams(
    architecture: Architecture,
    parallel_removes: str = "readers",
    values: bool | None = None,
    norms: bool = False,
    first_layer: bool = False,
    queries: bool = False,
) -> list[Seam]:
    """The seams that are still open, in the order in which they are closed, blocked ones included with the reason.

    parallel_removes, values, first_layer: as in Wanted (values None: whether they have been). norms: whether the norms
    seams will be closed first; one that goes into the table then blocks nothing. queries: whether those between K and Q
    are asked for, as they exclude others.
    """
    values = architecture.values_removed if values is None else values
    wanted = Wanted(parallel_removes, values, first_layer or architecture.first_layer_removed)
    beside = partial(_beside_table, architecture, wanted)
    open_seams = [seam for each in _norm_seams(architecture, wanted) for seam in beside(each)]
    gone = [seam for seam in open_seams if norms and seam.norms]
    left = closed(architecture, gone, "") if gone else architecture
    asked = [find for kind, find in KINDS.items() if kind != "norms" and (queries or kind != "queries")]
    open_seams += [seam for find in asked for each in find(left, wanted) for seam in beside(each)]
    order = list(KINDS)

    def turn(seam: Seam) -> tuple[bool, bool, int, int]:
        """The table of layer 0 takes in what all others have left."""
        return seam.kind == "first_layer", seam.kind != "norms", seam.layer, order.index(seam.kind)

    return sorted(open_seams, key=turn)


def _beside_table(architecture: Architecture, wanted: Wanted, seam: Seam) -> Iterable[Seam]:
    """What becomes of a seam where layer 0 goes, or has gone, into the table.

    It is gone if all that it would give up goes there. It is blocked if it would rewrite what is there already, or if a
    skip past layer 0 takes its basis, too.
    """
    if not wanted.first_layer or seam.kind == "first_layer":
        return (seam,)
    looked_up = {*_first_layer_readers(architecture), *architecture.first_layer_norms}
    given = any(looked_up.issuperset(gone) for gone in seam.identities.values() if gone)
    if given and not (seam.kind == "stream" and len(graph(architecture).before(0).places) > 1):
        return ()
    rewritten = architecture.first_layer_removed and {"model.embed_tokens", *looked_up}.intersection(seam.modules)
    if seam.blocked or not (given or rewritten):
        return (seam,)
    reason = "first_layer, by which the table holds what layer 0 makes of it: close it in a run before that one"
    return (dataclasses.replace(seam, blocked=reason, mixed=(), scales={}),)


def as_it_is(architecture: Architecture, itemsize: float) -> list[Seam]:
    """The seams that fuse closes in a model with skips and norms, where a weight takes `itemsize` bytes."""
    every = seams(architecture, values=True, norms=True, queries=True)
    return [seam for seam in every if seam.kind in COMPACT and not (seam.blocked or seam.unpaid(itemsize))]


def reasons(every: Iterable[Seam]) -> tuple[str, ...]:
    """What stays when these seams are closed, and why: each kind's first reason; kinds that share one, together."""
    first: dict[str, str] = {}
    for seam in every:
        if seam.blocked:
            first.setdefault(seam.kind, seam.blocked)
    kinds: dict[str, list[str]] = {}
    for kind, reason in first.items():
        kinds.setdefault(reason, []).append(kind)
    joined = {reason: ", ".join(stay[:-1]) + " and " * (len(stay) > 1) + stay[-1] for reason, stay in kinds.items()}
    return tuple(f"the {stay} seams: {reason}" for reason, stay in joined.items())


def closed(architecture: Architecture, closing: Iterable[Seam], basis: str) -> Architecture:
    """The architecture after closing these seams, stream seams by `basis` ("q", "k", "v" or "pivoted").

    Every P-M seam is closed or none, as config.json has one switch for them all; so are the value seams.
    """
    closing = list(closing)
    kinds = {seam.kind for seam in closing}
    stream = {seam.layer for seam in closing if seam.kind == "stream"}
    still_open = [
        layer
        for layer in range(architecture.num_hidden_layers)
        if not architecture.stream_closed(layer) and layer not in stream
    ]
    gains = [name for seam in closing for name in seam.gains]
    norms = [name for seam in closing for name in (seam.through, *seam.norms) if name]
    looked_up = architecture.first_layer_removed or "first_layer" in kinds
    own_biases = {module.name for module in architecture.modules() if module.bias}
    moves = {"stream": architecture.qkv_biased, "values": architecture.qkv_biased}
    moves["p"] = (moves["values"] and "values" in kinds) or any(name.endswith(".o_proj") for name in own_biases)
    gained = set()
    for seam in closing:
        if moves.get(seam.kind):
            gained |= {*seam.bias_takers, *(seam.followers if seam.kind == "stream" else ())} - own_biases
    if not architecture.tie_word_embeddings:
        gained.discard("model.embed_tokens")  # every row of an untied table takes the bias in
    after = dataclasses.replace(
        architecture,
        stream_basis=basis if stream else architecture.stream_basis,
        layers_open=tuple(still_open) if stream or architecture.stream_basis else (),
        p_removed=architecture.p_removed or "p" in kinds,
        values_removed=architecture.values_removed or "values" in kinds,
        keys_removed=architecture.keys_removed or "queries" in kinds,
        head_removed=architecture.head_removed or "head" in kinds,
        first_layer_removed=looked_up,
        gains_removed=(*architecture.gains_removed, *gains),
        norms_removed=(*architecture.norms_removed, *norms),
        folded_biases=(),
    )
    there = [module.name for module in after.modules()]  # P, that takes V's bias in, may have merged
    return dataclasses.replace(
        after, folded_biases=tuple(name for name in there if name in {*architecture.folded_biases, *gained})
    )


def _attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


def _joined(names: Sequence[str]) -> str:
    """Names as a sentence has them: both of two, the first of more."""
    return " and ".join(names) if len(names) < 3 else f"{names[0]} and others"


def _names(ports: Iterable[Port]) -> tuple[str, ...]:
    return tuple(port.module for port in ports)


def _not_linear(architecture: Architecture, space: Space) -> str | None:
    """The norm that stands between a space and what writes or reads it, or None."""
    for norm, port in space.norms:
        if len(space.places) > 1:
            first, last = space.places[0].layer, space.places[-1]
            past = last.layer - (last.kind == "s")
            layers = f"layers {first} to {past}" if first < past else f"layer {past}"
            return (
                f"residual {architecture.residual!r} and norm_type {architecture.norm_type!r}: skip connections join "
                f"the stream of {layers} into one space, with one basis, and {norm} stands between it and "
                f"{port.module}, and is not linear"
            )
        reads = port in space.readers
        writers, readers = _names(space.writers), graph(architecture).through(norm) if reads else _names(space.readers)
        return (
            f"norm_type {architecture.norm_type!r}: {norm} stands between "
            f"{_joined(writers if reads else (port.module,))} and {_joined(readers)}, and is not linear"
        )
    return None


def _given_up(architecture: Architecture, space: Space) -> str:
    """What a space that skip connections join gives up, and where."""
    first = space.layers[0]
    by = f"Q, K and V of layer {first}" if first < architecture.num_hidden_layers else "the head"
    return (
        f"residual {architecture.residual!r}: skip connections join what {_joined(_names(space.writers))} write into "
        f"one space, which gives up hidden_size^2 = {architecture.hidden_size**2:,} weights once, of {by}"
    )


def _heads_pass(architecture: Architecture, space: Space) -> str | None:
    """Why a space that P has been removed from has a basis that cannot be chosen, or None."""
    attention = [port for port in space.writers if port.module.endswith(".o_proj")]
    if not architecture.p_removed or not attention or len(space.writers) == 1:
        return None
    return (
        f"p_removed: the heads of layer {attention[0].module.split('.')[2]} are added to the stream as they are, which "
        f"fixes its basis; of each stream seam d^2 weights go, of Q, K, V or of P, not of both"
    )


def _bias_stays(architecture: Architecture, takers: Sequence[str]) -> str | None:
    """Why a bias cannot move into what is written at a space's first place, or None."""
    if not architecture.qkv_biased:
        return None
    if architecture.embedding_multiplier is not None and "model.embed_tokens" in takers:
        return "embedding_multiplier: q, k and v_proj have biases, and what would take them in is multiplied by it"
    if any(".experts." in name for name in takers) and not architecture.norm_topk_prob:
        return (
            "norm_topk_prob false: q, k and v_proj have biases, and routing weights that do not sum to 1 would scale "
            "the bias that moves into the experts"
        )
    return None


def _takers(architecture: Architecture, space: Space) -> tuple[str, ...]:
    """The modules at a space's first place that take a bias in.

    Positions do not; nor does P where the FFN does, which is always but for experts whose weights do not sum to 1.
    """
    names = _names(space.starts)
    attention = tuple(name for name in names if name.endswith(".o_proj"))
    if attention and architecture.ffn_type == "moe" and not architecture.norm_topk_prob:
        return attention
    return tuple(name for name in names if not name.endswith((".o_proj", "position_embeddings"))) or names


def _scales(architecture: Architecture, space: Space, at: Place) -> dict[str, dict[str, int]]:
    """Seam.scales: by module of a space, the gains between it and the stream at a place; none if no biases move."""
    if not (architecture.residual_gains and architecture.qkv_biased):
        return {}
    skips = [
        f"model.layers.{before.layer}.{'attention' if before.kind == 's' else 'ffn'}_skip_gain"
        for before, _ in pairwise(space.places)
    ]
    scales: dict[str, dict[str, int]] = {}
    here = space.places.index(at)
    for port in (*space.writers, *space.readers):
        there, writes = space.places.index(port.place), port in space.writers
        onwards = there <= here if writes else there >= here
        gains = dict.fromkeys(skips[min(there, here) : max(there, here)], 1 if onwards else -1)
        if writes and port.module.startswith("model.layers."):
            branch = "attention" if port.module.endswith(".o_proj") else "ffn"
            gains[f"model.layers.{port.module.split('.')[2]}.{branch}_gain"] = 1
        if gains:
            scales[port.module] = gains
    return scales


def _gains(scales: dict[str, dict[str, int]]) -> tuple[str, ...]:
    """The tensors that are named in Seam.scales."""
    return tuple(dict.fromkeys(gain for gains in scales.values() for gain in gains))


def _stream_seams(architecture: Architecture, wanted: Wanted) -> list[Seam]:
    layers = range(architecture.num_hidden_layers)
    return [_stream_seam(architecture, layer, wanted) for layer in layers if not architecture.stream_closed(layer)]


def _stream_seam(architecture: Architecture, layer: int, wanted: Wanted) -> Seam:
    """The seam of the space that Q, K, V of a layer read: one of them, or d of their columns, becomes the identity.

    What else reads it (M, in a parallel layer or past a skip) takes the basis in.
    """
    attention, parallel = _attention(layer), architecture.block_type == "parallel"
    spaces = graph(architecture)
    space = spaces.before(layer)
    writers, takers, taken = _names(space.writers), _takers(architecture, space), ""
    duals: tuple[str, ...] = ()
    blocked = _not_linear(architecture, space) or _heads_pass(architecture, space)
    if blocked is None and layer != space.layers[0]:
        blocked, taken = _given_up(architecture, space), "stream"
    blocked = blocked or _bias_stays(architecture, takers)
    if blocked is None and architecture.qkv_biased and "lm_head" in _names(space.readers):
        blocked = "attention_bias: a bias of Q would move into the stream that lm_head reads, which has none to undo it"
    if space.written_tied and not architecture.embedding_size:
        last = spaces.before(architecture.num_hidden_layers)
        duals = _names(last.writers) if last is not space else ()
        blocked = blocked or _tied(architecture, space, last)
    if blocked is None and parallel and layer and wanted.parallel_removes == "p":
        blocked, taken = "--parallel-removes p: its d^2 weights go from P of the layer before", "p"
    if blocked is None and architecture.values_removed:
        blocked = (
            "values_removed: v_proj passes inputs of the stream through, which fixes its basis; close both at once, of "
            "the original"
        )
    if blocked is None and architecture.keys_removed:
        blocked = "keys_removed: k_proj passes inputs of the stream through, which fixes its basis"
    d, widths = architecture.hidden_size, dict(architecture.projections)
    chosen = {name: width for name, width in widths.items() if not (name == "v" and wanted.values)}
    identities: dict[str, tuple[str, ...]] = {
        name: (f"{attention}.{name}_proj",) for name, width in chosen.items() if width == d
    }
    readers = tuple(f"{attention}.{name}_proj" for name in chosen)
    if sum(chosen.values()) >= d:
        identities["pivoted"] = readers
    elif blocked is None:
        blocked = (
            f"{', '.join(list(chosen)[:-1])} and {list(chosen)[-1]}_proj of layer {layer} having "
            f"{sum(chosen.values())} outputs together, fewer than hidden_size ({d}): no {d} of them can stand for the "
            f"stream"
        )
    scales = {} if blocked else _scales(architecture, space, Place("s", layer))
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
        bias_takers=takers,
        duals=duals,
        followers=tuple(name for name in _names(space.readers) if name not in readers),
        mixed=_gains(scales),
        blocked=blocked,
        taken=taken,
        seen=space.seen,
        scales=scales,
    )


def _tied(architecture: Architecture, first: Space, last: Space) -> str | None:
    """Why the last layer cannot make up for what the first stream seam does to a tied head, or None."""
    if first is last:
        reason: str | None = (
            f"residual {architecture.residual!r}, by which skip connections join what it writes and what it reads into "
            f"one space"
        )
    elif len(last.places) > 1:
        others = [name for name in _names(last.readers) if name != "model.embed_tokens"]
        reason = (
            f"residual {architecture.residual!r}, by which {_joined(others)} would have to take in the inverse of what "
            f"the table does"
        )
    else:
        reason = _not_linear(architecture, last) or _heads_pass(architecture, last)
    return reason and (
        f"tie_word_embeddings: the table is the head, too, and there is {reason}; leave it open with --layers-open 0"
    )


def _value_seams(architecture: Architecture, wanted: Wanted) -> list[Seam]:
    if architecture.values_removed:
        return []
    return [_value_seam(architecture, layer) for layer in range(architecture.num_hidden_layers)]


def _value_seam(architecture: Architecture, layer: int) -> Seam:
    """The seams between each head of V and what reads it: the rows of P, or of M with P merged (MatShrink).

    They lie within a layer, so that skips and norms do not matter. Shaped attention is linear in v, too.
    """
    attention, size, heads = _attention(layer), architecture.head_dim, architecture.num_key_value_heads
    readers = architecture.ffn_readers(layer) if architecture.p_removed else (f"{attention}.o_proj",)
    blocked = None
    if architecture.p_removed and not architecture.p_merged:
        blocked = (
            f"p_removed: heads of layer {layer} pass through {'o_proj' if architecture.p_rows else 'to the stream'} as "
            f"they are; close both at once, of the original"
        )
    elif architecture.stream_basis in ("v", "pivoted"):
        blocked = (
            f"stream_basis {architecture.stream_basis!r}: v_proj is not there any more; fuse the original with "
            f"--remove stream,p,values, which passes through columns of Q and K alone"
        )
    elif size >= architecture.hidden_size:
        blocked = f"head_dim {size}: v_proj has no more than {architecture.hidden_size} inputs, and none would be left"
    return Seam(
        kind="values",
        layer=layer,
        width=size,
        blocks=heads,
        writers=(f"{attention}.v_proj",),
        readers=readers,
        identities={"rows": (f"{attention}.v_proj",)},
        order=f"{attention}.value_order",
        indices=heads * size,
        bias_takers=readers,
        mixed=(
            *(name for name in architecture.gain_tensors(layer) if name.startswith(attention)),
            *(_attention_gain(architecture, layer) if architecture.p_removed else ()),
        ),
        saves=heads * size**2,
        blocked=blocked,
    )


def _query_seams(architecture: Architecture, wanted: Wanted) -> list[Seam]:
    if architecture.keys_removed:
        return []
    return [_query_seam(architecture, layer) for layer in range(architecture.num_hidden_layers)]


def _query_seam(architecture: Architecture, layer: int) -> Seam:
    """Between each head of K and the queries of its group: scores are x Q K^T y^T, where nothing stands between.

    Within a layer, so that skips and norms do not matter. A bias of K adds the same to all of a query's scores, which
    the softmax takes away again, so it goes, too; Q's takes part. Where RoPE rotates a part of each head, all of this
    holds for the other part.
    """
    attention, size, heads = _attention(layer), architecture.unrotated, architecture.num_key_value_heads
    return Seam(
        kind="queries",
        layer=layer,
        width=size,
        blocks=heads,
        writers=(f"{attention}.k_proj",),
        readers=(f"{attention}.q_proj",),
        identities={"rows": (f"{attention}.k_proj",)},
        kept=f"{attention}.k_rope_proj" if architecture.rotated else "",
        order=f"{attention}.key_order",
        indices=heads * size,
        saves=heads * size**2,
        blocked=architecture.keys_stay,
    )


def _p_seams(architecture: Architecture, wanted: Wanted) -> list[Seam]:
    if architecture.p_removed:
        return []
    return [_p_seam(architecture, layer, wanted) for layer in range(architecture.num_hidden_layers)]


def _p_seam(architecture: Architecture, layer: int, wanted: Wanted) -> Seam:
    """The seam of the space that P writes. If P writes it alone, it merges into what reads it, M* = P M.

    M is the FFN's first matrix, its gate, or router and experts. If P is wider than the stream (D > d), so that merging
    would cost weights, or if something else writes the space, too, d of its rows become the identity instead.
    """
    d, heads = architecture.hidden_size, architecture.query_width
    o_proj, space = f"{_attention(layer)}.o_proj", graph(architecture).after_attention(layer)
    if len(space.writers) > 1:
        return _joined_p_seam(architecture, layer, space, wanted)
    readers = _names(space.readers)
    norms, through = architecture.norms_after_attention(layer), ""
    blocked = None
    if norms:
        reason = _norm_matters(architecture, layer, norms)
        if reason is None:
            through = norms[0]
        else:
            shown = _joined(readers) if len(readers) < 3 else f"model.layers.{layer}.mlp's router and experts"
            blocked = (
                f"norm_type {architecture.norm_type!r}: {norms[0]} stands between {o_proj} and {shown}, and is not "
                f"linear; it is not redundant, as {reason}"
            )
    width = architecture.ffn_read_width(layer)
    merged = architecture.p_fits
    return Seam(
        kind="p",
        layer=layer,
        width=d,
        writers=(o_proj,),
        readers=readers,
        identities={"p" if merged else "rows": (o_proj,)},
        order="" if merged else f"{_attention(layer)}.row_order",
        bias_takers=readers if merged else (),
        through=through,
        mixed=_attention_gain(architecture, layer) if merged and architecture.qkv_biased else (),
        saves=heads * d + (d - heads) * width if merged else d**2,
        blocked=blocked,
    )


def _attention_gain(architecture: Architecture, layer: int) -> tuple[str, ...]:
    """The trainable gain of the attention's branch, if there is one: what P writes, or, without P, the heads."""
    name = f"model.layers.{layer}.attention_gain"
    return (name,) if name in architecture.gain_tensors(layer) else ()


def _joined_p_seam(architecture: Architecture, layer: int, space: Space, wanted: Wanted) -> Seam:
    """The seam of a space that P writes together with others: rows of P go, if no columns of the readers do."""
    d, heads, layers = architecture.hidden_size, architecture.query_width, architecture.num_hidden_layers
    o_proj = f"{_attention(layer)}.o_proj"
    writers = (o_proj, *(name for name in _names(space.writers) if name != o_proj))
    readers, taken = _names(space.readers), ""
    blocked = _not_linear(architecture, space)
    if blocked is None and len(space.places) > 1:
        blocked, taken = _given_up(architecture, space), "stream"
    elif blocked is None and wanted.parallel_removes != "p":
        taken = "stream"
        blocked = (
            f"block_type 'parallel': {o_proj}'s output is added to the FFN's, and nothing reads it alone. Each of the "
            f"{layers + 1} stream seams gives up hidden_size^2 = {d**2:,} weights, of Q, K, V that read it or of P "
            f"that writes it, not of both: rewriting cannot remove Q and P; choose with --parallel-removes readers or p"
        )
    blocked = blocked or _bias_stays(architecture, writers[1:]) or _rows_stay(architecture, layer)
    scales = {} if blocked else _scales(architecture, space, space.places[-1])
    return Seam(
        kind="p",
        layer=layer,
        width=d,
        writers=writers,
        readers=readers,
        identities={"rows": (o_proj,)},
        order=f"{_attention(layer)}.row_order",
        bias_takers=writers[1:] if heads == d else (),
        mixed=_gains(scales),
        saves=d**2,
        blocked=blocked,
        taken=taken,
        scales=scales,
    )


def _rows_stay(architecture: Architecture, layer: int) -> str | None:
    """Why the rows of a parallel layer's P cannot become the identity, or None."""
    d, heads, layers = architecture.hidden_size, architecture.query_width, architecture.num_hidden_layers
    if architecture.stream_basis and architecture.layers_open != tuple(range(1, layers)):
        return f"stream_basis {architecture.stream_basis!r}: of its stream seams Q, K, V have given up d^2 weights"
    if architecture.values_removed and layer + 1 < layers:
        return (
            "values_removed: v_proj passes inputs of the stream through, which fixes its basis; close both at once, of "
            "the original"
        )
    if heads < d:
        return f"heads * head_dim ({heads}) being less than hidden_size ({d}): {heads} rows cannot stand for the stream"
    if architecture.tie_word_embeddings:
        return (
            "tie_word_embeddings: the table reads what the last layer's P writes, and p_removed is one switch for all "
            "layers; as many weights go with --parallel-removes readers"
        )
    if architecture.head_removed:
        return "head_removed: logits are outputs of the last layer as they are, which fixes its basis"
    return None


def _head_seams(architecture: Architecture, wanted: Wanted) -> list[Seam]:
    """The seam of the space that lm_head reads: d of its columns become the identity."""
    d, last = architecture.hidden_size, architecture.num_hidden_layers
    space, taken = graph(architecture).before(last), ""
    if architecture.head_removed:
        return []
    blocked = None
    if architecture.tie_word_embeddings:
        blocked = "tie_word_embeddings: lm_head is the table of the embeddings"
    elif architecture.embedding_size:
        blocked = "embedding_size: lm_head reads project_out, which would have to merge with it"
    elif architecture.head_bias:
        blocked = "head_bias: logits that are the stream itself have nothing to take their bias in"
    elif architecture.vocab_size <= d:
        blocked = (
            f"vocab_size {architecture.vocab_size}: no more than hidden_size ({d}) logits, and no row would be left"
        )
    elif architecture.block_type == "parallel" and wanted.parallel_removes == "p" and not architecture.p_removed:
        blocked, taken = "--parallel-removes p: its d^2 weights go from P of the last layer", "p"
    else:
        blocked = _not_linear(architecture, space) or _heads_pass(architecture, space)
        if blocked is None and space.layers[0] < last:
            blocked, taken = _given_up(architecture, space), "stream"
    seam = Seam(
        kind="head",
        layer=last,
        width=d,
        writers=_names(space.writers),
        readers=("lm_head",),
        identities={"head": ("lm_head",)},
        rest="lm_head",
        order="lm_head.column_order",
        indices=architecture.vocab_size,
        saves=d**2,
        followers=tuple(name for name in _names(space.readers) if name != "lm_head"),
        blocked=blocked,
        taken=taken,
        seen=space.seen,
    )
    return [seam]


def _first_layer_readers(architecture: Architecture) -> tuple[str, ...]:
    """The modules of layer 0 between the stream and any attention."""
    before = dataclasses.replace(architecture, first_layer_removed=False)
    names = [module.name for module in before.layer_modules(0)]
    rooms = (".self_attn.", ".mlp.") if architecture.block_type == "parallel" else (".self_attn.",)
    return tuple(name for name in names if any(room in name for room in rooms) and not name.endswith(".o_proj"))


def _first_layer_seams(architecture: Architecture, wanted: Wanted) -> list[Seam]:
    """Between the token table and layer 0's attention, where a token meets no other (arXiv:2402.13388)."""
    if architecture.first_layer_removed or not wanted.first_layer:
        return []
    readers, norms = _first_layer_readers(architecture), architecture.first_layer_norms
    blocked, saves = architecture.first_layer_stays, 0
    if blocked is None:
        removed = (*architecture.norms_removed, *norms)
        before = dataclasses.replace(architecture, folded_biases=())
        after = dataclasses.replace(before, first_layer_removed=True, norms_removed=removed)
        table, *_ = after.modules()
        gone = sum(module.inputs * module.outputs for module in before.layer_modules(0) if module.name in readers)
        saves = gone - table.inputs * (table.outputs - architecture.hidden_size)
    gains = architecture.gain_tensors(0) if architecture.block_type == "parallel" else {}
    order = architecture.index_tensors().keys() & {f"{_attention(0)}.value_order"}
    mixed = (*order, *(name for name in gains if name.endswith(("ffn_gain", "skip_gain"))))
    return [
        Seam(
            kind="first_layer",
            layer=0,
            width=architecture.hidden_size,
            writers=("model.embed_tokens",),
            readers=(*norms, *readers),
            identities={"lookup": (*norms, *readers)},
            saves=saves,
            mixed=mixed,
            blocked=blocked,
            norms=norms,
        )
    ]


def _norm_matters(architecture: Architecture, layer: int, norms: list[str]) -> str | None:
    """Why the norm before a serial layer's FFN changes what the model computes, or None.

    RMSNorm scales each token's y by 1 / s, s^2 = mean(y^2) + eps. A bias-free FFN with an activation of degree k gives
    that factor on, to the power of k (a GLU: k + 1), and the next RMSNorm, with eps = 0, takes it away again.
    """
    after = f"model.layers.{layer + 1}.input_layernorm" if layer + 1 < architecture.num_hidden_layers else "model.norm"
    if architecture.norm_type != "rms" or norms != [f"model.layers.{layer}.post_attention_layernorm"]:
        return "only a single RMSNorm is of degree 0"
    if architecture.ffn_type == "moe":
        return "a router's choice is not homogeneous"
    if architecture.hidden_act not in HOMOGENEOUS:
        return f"hidden_act {architecture.hidden_act!r} is not homogeneous ({', '.join(HOMOGENEOUS)} are)"
    folded = any(name.startswith(f"model.layers.{layer}.mlp.") for name in architecture.folded_biases)
    if architecture.mlp_bias or architecture.gate_bias or folded:
        return "its FFN has biases"
    if not architecture.has_norm(after):
        return f"the FFN's output is not normalized again ({after})"
    if architecture.norm_eps:
        return (
            f"norm_eps is {architecture.norm_eps:g}: the output of {after} would change by about norm_eps / 2 times "
            f"the difference of the inverse mean squares of its inputs (0 with norm_eps 0)"
        )
    return None


def _norm_seams(architecture: Architecture, wanted: Wanted) -> list[Seam]:
    """Gains that fold into what reads them, and a norm of the embeddings that folds into their table."""
    norm_seams = []
    for norm in architecture.norm_names():
        if not architecture.has_norm(norm) or norm in architecture.gains_removed:
            continue
        if norm == _table_norm(architecture):
            norm_seams.append(_norm_seam(architecture, norm, "table", ("model.embed_tokens",)))
        elif readers := _norm_readers(architecture, norm):
            norm_seams.append(_norm_seam(architecture, norm, "gain", readers))
    return norm_seams


def _norm_seam(architecture: Architecture, norm: str, way: str, readers: tuple[str, ...]) -> Seam:
    d, biased = architecture.hidden_size, architecture.norms_biased
    blocked = None
    if way == "gain" and biased and not set(readers) <= _biased(architecture):
        blocked = f"norm_type 'layer': {norm} has a bias, and not all of its readers have one to take it in"
    layer = int(norm.split(".")[2]) if norm.startswith("model.layers.") else 0
    if norm == "model.norm":
        layer = architecture.num_hidden_layers
    identities: dict[str, tuple[str, ...]] = {way: (norm,)}
    gains, norms = ((norm,), ()) if way == "gain" else ((), (norm,))
    return Seam(
        "norms", layer, d, (norm,), readers, identities, d * (1 + biased), blocked=blocked, gains=gains, norms=norms
    )


@lru_cache(8)
def _biased(architecture: Architecture) -> frozenset[str]:
    """The modules that have a bias."""
    return frozenset(module.name for module in architecture.modules() if module.bias)


def _table_norm(architecture: Architecture) -> str | None:
    """The norm that reads nothing but the token table: it can be applied to the table's rows. Learned positions are
    added after a norm of the embeddings.
    """
    multiplied = architecture.embedding_multiplier is not None
    if architecture.tie_word_embeddings or architecture.embedding_size or multiplied:
        return None
    space, first = graph(architecture).before(0), "model.layers.0.input_layernorm"
    if written := space.writers[0].norms:
        return written[0]
    alone = len(space.places) == 1 and all(port.norms == (first,) for port in space.readers)
    return first if alone and architecture.position_type != "learned" else None


def _norm_readers(architecture: Architecture, norm: str) -> tuple[str, ...]:
    """The matrices that read a norm's output and nothing else; none for norms that something else reads, too."""
    prefix, _, name = norm.rpartition(".")
    if norm == "model.norm" and (architecture.tie_word_embeddings or architecture.embedding_size):
        return ()
    if name == "post_attention_layernorm" and architecture.p_removed and architecture.p_merged:
        return ()
    if name == "input_layernorm" and (
        architecture.stream_closed(int(prefix.split(".")[2]))
        or architecture.values_removed
        or architecture.keys_removed
    ):
        return ()  # some of q, k and v are the norm's output as it is
    return graph(architecture).through(norm)


# The kinds of seams that can be asked for, and what finds those of a model that are open, in the order of closing.
KINDS: dict[str, Callable[[Architecture, Wanted], list[Seam]]] = {
    "norms": _norm_seams,
    "stream": _stream_seams,
    "values": _value_seams,
    "queries": _query_seams,
    "p": _p_seams,
    "head": _head_seams,
    "first_layer": _first_layer_seams,
}

"""The graph of a model: the spaces between its matrices, what writes and reads each of them, and through which norms.

The stream stands at places: s_i before layer i (s_L, of L layers, before the head) and, in serial layers, y_i between
the attention of layer i and its FFN. A skip connection joins the places before and after what it passes into one space:
what is written at the one is read at the other, so that they have one basis. Every other place is a space of its own.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

from skipless.architecture.config import Architecture


class Place(NamedTuple):
    """Where the stream stands: ("s", i) before layer i, ("y", i) after its attention."""

    kind: str
    layer: int


@dataclass(frozen=True)
class Port:
    """A module whose outputs (a writer's) or inputs (a reader's) are the stream at a place, and the norms between."""

    module: str
    place: Place
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Space:
    """hidden_size dimensions with one basis. places, writers, readers: in the order of computation.

    written_tied, read_tied: whether the token table, if it is the head, too, writes, or (transposed) reads it.
    """

    places: tuple[Place, ...]
    writers: tuple[Port, ...]
    readers: tuple[Port, ...]
    written_tied: bool = False
    read_tied: bool = False

    @cached_property
    def starts(self) -> tuple[Port, ...]:
        """The writers at its first place: what they add is added at every place."""
        return tuple(port for port in self.writers if port.place == self.places[0])

    @cached_property
    def seen(self) -> dict[str, int]:
        """By reader at a place before the last writer's: how many of the writers have written before it reads."""
        wrote = Counter(port.place for port in self.writers)
        counts = dict(zip(self.places, accumulate(wrote[place] for place in self.places), strict=True))
        early = ((port.module, counts[port.place]) for port in self.readers)
        return {module: count for module, count in early if count < len(self.writers)}

    @cached_property
    def norms(self) -> tuple[tuple[str, Port], ...]:
        """The norms between the space and what writes or reads it, each with its module: none is linear."""
        return tuple((norm, port) for port in (*self.writers, *self.readers) for norm in port.norms)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers whose Q, K and V read it; for the head, the number of layers."""
        return tuple(place.layer for place in self.places if place.kind == "s")


@dataclass(frozen=True)
class Graph:
    """The spaces of an architecture, in the order of their first places."""

    spaces: tuple[Space, ...]

    @cached_property
    def _of_place(self) -> dict[Place, Space]:
        return {place: space for space in self.spaces for place in space.places}

    def before(self, layer: int) -> Space:
        """The space that a layer reads; with the number of layers, the one that the head reads."""
        return self._of_place[Place("s", layer)]

    def after_attention(self, layer: int) -> Space:
        """The space that a layer's P writes."""
        serial = self._of_place.get(Place("y", layer))
        return self.before(layer + 1) if serial is None else serial

    @cached_property
    def _through(self) -> dict[str, list[str]]:
        readers: dict[str, list[str]] = {}
        for space in self.spaces:
            for port in space.readers:
                for norm in port.norms:
                    readers.setdefault(norm, []).append(port.module)
        return readers

    def through(self, norm: str) -> tuple[str, ...]:
        """The modules that read what a norm gives."""
        return tuple(self._through.get(norm, ()))


@lru_cache(8)
def graph(architecture: Architecture) -> Graph:
    """The spaces of a model as it was before anything was removed from it but norms."""
    a, layers, serial = architecture, architecture.num_hidden_layers, architecture.block_type == "serial"
    places = [Place("s", 0)]
    joins: list[tuple[Place, Place]] = []
    for i in range(layers):
        s, y, after = Place("s", i), Place("y", i), Place("s", i + 1)
        places += [y, after] if serial else [after]
        if serial and a.residual in ("attention", "both"):
            joins.append((s, y))
        if serial and a.residual in ("ffn", "both"):
            joins.append((y, after))
        if not serial and a.residual == "both":
            joins.append((s, after))
    members: dict[Place, list[Place]] = {place: [place] for place in places}
    for before, after in joins:  # in order: all that stands after is what one join has added
        members[before].append(after)
        members[after] = members[before]
    writers, readers = _by_place(_writers(a)), _by_place(_readers(a))
    spaces = [
        Space(
            places=tuple(inside),
            writers=tuple(port for each in inside for port in writers.get(each, ())),
            readers=tuple(port for each in inside for port in readers.get(each, ())),
            written_tied=a.tie_word_embeddings and Place("s", 0) in inside,
            read_tied=a.tie_word_embeddings and Place("s", layers) in inside,
        )
        for place, inside in members.items()
        if inside[0] == place
    ]
    return Graph(tuple(spaces))


def _by_place(ports: Iterable[Port]) -> dict[Place, list[Port]]:
    by_place: dict[Place, list[Port]] = {}
    for port in ports:
        by_place.setdefault(port.place, []).append(port)
    return by_place


def _there(architecture: Architecture, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if architecture.has_norm(name))


def _writers(a: Architecture) -> Iterable[Port]:
    """All that writes, in the order of computation; in a parallel layer, the FFN before P."""
    norms, first = _there(a, ("model.embed_norm",)), Place("s", 0)
    yield Port("model.project_in" if a.embedding_size else "model.embed_tokens", first, norms)
    if a.position_type == "learned":
        yield Port("model.position_embeddings", first)  # added after that norm
    for i in range(a.num_hidden_layers):
        layer, after = f"model.layers.{i}", Place("s", i + 1)
        serial = a.block_type == "serial"
        written = _there(a, (f"{layer}.attention_output_norm", *[f"{layer}.attention_stream_norm"] * serial))
        attention = Port(f"{layer}.self_attn.o_proj", Place("y", i) if serial else after, written)
        norms = _there(a, (f"{layer}.ffn_output_norm", f"{layer}.ffn_stream_norm"))
        ffn = [Port(f"{ffn}.down_proj", after, norms) for ffn in a.experts(i)]
        yield from (attention, *ffn) if serial else (*ffn, attention)


def _readers(a: Architecture) -> Iterable[Port]:
    """All that reads, in the order of computation."""
    for i in range(a.num_hidden_layers):
        layer, serial = f"model.layers.{i}", a.block_type == "serial"
        first = _there(a, (f"{layer}.input_layernorm",))
        second = _there(a, (f"{layer}.post_attention_layernorm",))
        yield from (Port(f"{layer}.self_attn.{name}_proj", Place("s", i), first) for name in a.projections)
        place, norms = (Place("y", i), second) if serial else (Place("s", i), second or first)
        yield from (Port(name, place, norms) for name in a.ffn_readers(i))
    head = "model.embed_tokens" if a.tie_word_embeddings else "lm_head"
    norms = _there(a, ("model.norm",))
    yield Port("model.project_out" if a.embedding_size else head, Place("s", a.num_hidden_layers), norms)

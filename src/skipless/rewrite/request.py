"""What is to be removed: which seams, in which basis, stored in which dtype. fuse does it, audit foretells it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch

from skipless.algebra.forecast import Forecast
from skipless.algebra.tolerances import coarsest, dtype_name
from skipless.architecture.config import Architecture
from skipless.architecture.folds import FOLDS, folds, staying
from skipless.architecture.seams import AUTO, BASES, COMPACT, KINDS, PARALLEL_REMOVES, REMOVABLE, Seam, seams
from skipless.checkpoint.reader import TensorInfo
from skipless.dtypes import DTYPE_NAMES
from skipless.errors import InputError

# How the result is laid out: as a skipless model, or as the source's family has it, names and shapes alike.
LAYOUTS = ("skipless", "family")
# "auto" takes q, whose model is simpler and needs no gather, up to this multiple of pivoted's error.
AS_GOOD = 1.1


@dataclass(frozen=True)
class Request:
    """The options that fuse and audit have in common.

    basis: what becomes the identity: the projection "q", "k" or "v" (Fig. 1 b, c, d), "pivoted" (the best d columns of
        all three), or "auto": "q" or "pivoted", whichever suits the weights
    dtype: that of every tensor of the result (None: each keeps its own)
    rest_dtype: that of rest_proj, "float32" or None
    layers_open: layers whose stream seam stays open
    remove: the kinds of seams to close, of seams.KINDS, or in a family's layout of folds.FOLDS (None: the usual ones)
    parallel_removes: what goes in a parallel model, where Q and P cannot both: "readers" (Q, or what the basis says)
        or "p"
    layout: one of LAYOUTS for another family's model (None: the usual one); None for a skipless model
    """

    basis: str = AUTO
    dtype: str | None = None
    rest_dtype: str | None = None
    layers_open: tuple[int, ...] = ()
    remove: tuple[str, ...] | None = None
    parallel_removes: str = "readers"
    layout: str | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of seams asked for."""
        usual = {"family": FOLDS, "skipless": COMPACT}.get(self.layout or "", REMOVABLE)
        return usual if self.remove is None else self.remove

    def of(self, family: str | None) -> Self:
        """The same, for a model of this family (None: a skipless one), in a layout that it can have.

        Raises InputError for a layout or another option that it cannot have.
        """
        if self.layout not in (None, *LAYOUTS):
            raise InputError(f"layout: expected {' or '.join(LAYOUTS)}, found {self.layout!r}")
        if family is None and self.layout == "family":
            raise InputError("layout: expected skipless for a skipless model, found 'family'; leave it out")
        if family is None:
            own = dataclasses.replace(self, layout=None)
            return dataclasses.replace(own, remove=own.kinds)
        for name in ("basis", "rest_dtype", "layers_open", "parallel_removes"):
            usual = getattr(Request(), name)
            if (found := getattr(self, name)) != usual:
                raise InputError(
                    f"{name}: expected none for a model with skips and norms, none of whose stream seams can be "
                    f"closed; found {found!r}"
                )
        return dataclasses.replace(self, layout=self.layout or "family")

    def seams(self, source: Architecture) -> list[Seam]:
        """The open seams asked for, blocked or not. Raises InputError for options that make no sense."""
        if self.dtype is not None and self.dtype not in DTYPE_NAMES:
            raise InputError(f"dtype: expected one of {', '.join(DTYPE_NAMES)}, found {self.dtype!r}")
        if self.layout == "family":
            return self._folds(source)
        if self.basis not in (AUTO, *BASES):
            raise InputError(f"basis: expected one of {', '.join((AUTO, *BASES))}, found {self.basis!r}")
        if self.rest_dtype is not None and (self.rest_dtype != "float32" or self.basis not in (AUTO, "pivoted")):
            raise InputError(
                f"rest_dtype: expected 'float32' with basis 'pivoted', found {self.rest_dtype!r} with {self.basis!r}"
            )
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise InputError(f"remove: expected some of {', '.join(KINDS)}; found {unknown[0]!r}")
        if "queries" in self.kinds and (others := {"stream", "first_layer"}.intersection(self.kinds)):
            raise InputError(
                f"remove: expected queries without stream and first_layer, which rewrite Q and K, too; found "
                f"{', '.join(sorted(others))}"
            )
        if self.parallel_removes not in PARALLEL_REMOVES:
            raise InputError(
                f"parallel_removes: expected {' or '.join(PARALLEL_REMOVES)}, found {self.parallel_removes!r}"
            )
        if beyond := sorted(layer for layer in self.layers_open if not 0 <= layer < source.num_hidden_layers):
            raise InputError(f"layers_open: expected layers 0..{source.num_hidden_layers - 1}, found {beyond[0]}")
        if source.stream_basis is not None and self.basis not in (AUTO, source.stream_basis):
            raise InputError(
                f"basis: expected {source.stream_basis!r}, in which this model is already fused; found {self.basis!r}"
            )
        asked = [
            seam
            for seam in self.every(source)
            if seam.kind in self.kinds and not (seam.kind == "stream" and seam.layer in self.layers_open)
        ]
        asked = [seam for seam in asked if not seam.spared(self.kinds)]  # their weights go elsewhere (self.note)
        if self.layout == "skipless":
            return self._possible(asked)
        if self.basis == "v" and {"stream", "values"} <= set(self.kinds):
            raise InputError(
                "basis: expected one without v with --remove stream,values, as heads of V cannot be the stream and "
                "lose a block, too; found 'v'"
            )
        for seam in asked:
            if not (seam.blocked or seam.kind != "stream" or self.basis in (AUTO, *seam.identities)):
                raise InputError(
                    f"basis: expected a square projection, found {self.basis}_proj ("
                    f"{source.projections[self.basis]}, {source.hidden_size}) in layer {seam.layer}; use "
                    f"{' or '.join(f'--basis {name}' for name in seam.identities)}"
                )
        return asked

    def _possible(self, asked: list[Seam]) -> list[Seam]:
        """The seams of another family's model that can be closed.

        Raises InputError for a kind that was asked for by name if none of its seams can.
        """
        for kind in self.remove or ():
            own = [seam for seam in asked if seam.kind == kind]
            if all(seam.blocked for seam in own):
                raise InputError((own and own[0].refusal) or f"remove: {kind}: nothing to remove: this model has none")
        return [seam for seam in asked if not seam.blocked]

    def _folds(self, source: Architecture) -> list[Seam]:
        """What can be moved within a family's layout, of the kinds asked for. Raises InputError for other options."""
        if unknown := sorted(set(self.kinds) - set(FOLDS)):
            raise InputError(
                f"remove: expected some of {', '.join(FOLDS)} for a model with skips and norms, found {unknown[0]!r}: "
                f"norms and skip connections block its stream and P-M seams, and its layout has a place for every "
                f"block; skipless audit says what could go"
            )
        every = folds(source)
        for kind in self.remove or ():
            if not any(seam.kind == kind and not seam.blocked for seam in every):
                reasons = staying(seam for seam in every if seam.kind == kind)
                raise InputError(f"remove: {kind}: nothing to move: {reasons[0] if reasons else 'this model has none'}")
        return [seam for seam in every if seam.kind in self.kinds and not seam.blocked]

    def every(self, source: Architecture) -> list[Seam]:
        """All open seams, as they are when what is asked for is closed."""
        values, norms, first_layer, queries = (
            kind in self.kinds for kind in ("values", "norms", "first_layer", "queries")
        )
        return seams(source, self.parallel_removes, values or None, norms, first_layer, queries)

    def note(self, source: Architecture) -> str:
        """What stays although it was asked for, as its weights go elsewhere, and why; or ""."""
        if self.layout == "family":
            return "\n".join(staying(seam for seam in folds(source) if seam.kind in self.kinds))
        if self.layout == "skipless":
            gone = {name for seam in self.seams(source) for name in seam.writers}
            norms = [seam for seam in folds(source) if seam.kind == "norms" and seam.writers[0] not in gone]
            others = [seam for seam in self.every(source) if seam.kind not in ("norms", "queries")]
            return "\n".join(staying(seam for seam in (*norms, *others) if seam.kind in self.kinds))
        spared = [seam for seam in self.every(source) if seam.kind in self.kinds and seam.spared(self.kinds)]
        if source.block_type != "parallel" or source.residual != "none":
            kinds = " and ".join(dict.fromkeys(seam.kind for seam in spared))
            return f"{kinds} seams stay, in {len(spared)} places: {spared[0].blocked}" if spared else ""
        if not {"stream", "p"} <= set(self.kinds):
            return ""
        d, layers = source.hidden_size, source.num_hidden_layers
        kept = "P" if self.parallel_removes == "readers" else "Q, K and V of the layers after the first"
        return (
            f"{kept} stay: in a parallel layer P's output is added to the FFN's, so that each of the {layers + 1} "
            f"stream seams gives up hidden_size^2 = {d**2:,} weights, of what reads it or of P, not of both "
            f"(--parallel-removes); without Q and P such a model has to be trained from scratch"
        )

    def stored(self, tensors: Mapping[str, TensorInfo], seam: Seam, way: str) -> str:
        """The coarsest dtype of what is written when a seam of a checkpoint with these tensors is closed by `way`."""
        if self.dtype is not None:
            return self.dtype
        gone = seam.identities[way]
        kept = [name for name in seam.modules if name not in gone]
        if gone == seam.readers and self.rest_dtype is None:
            kept.append(seam.readers[0])  # of whose dtype the rest is
        return dtype_name(coarsest(tensors[f"{name}.weight"].dtype for name in kept))

    def unpaid(self, tensors: Mapping[str, TensorInfo], seam: Seam, way: str) -> str | None:
        """Why closing a seam by `way` would make this checkpoint no smaller, in a sentence, or None."""
        if not seam.indices:
            return None
        own = tensors[f"{seam.identities[way][0]}.weight"].dtype
        return seam.unpaid((own if self.dtype is None else getattr(torch, self.dtype)).itemsize)

    def decide(
        self,
        source: Architecture,
        tensors: Mapping[str, TensorInfo],
        asked: Iterable[Seam],
        forecast: Callable[[Seam], Forecast],
    ) -> tuple[str, str]:
        """The basis, one for the whole model, and why, if that was left open.

        It is "q", whose model is the simplest, if in every layer its expected error, as stored, is at most AS_GOOD
        times that of "pivoted"; else "pivoted". asked: the seams asked for. forecast: gives a stream seam's, by q and
        pivoted; it is called seam by seam until one decides.
        """
        if self.basis != AUTO:
            return self.basis, ""
        if source.stream_basis is not None:
            return source.stream_basis, "the basis in which this model is already fused"
        stream = [seam for seam in asked if seam.kind == "stream" and not seam.blocked]
        if not stream:
            return "q", ""
        if self.rest_dtype is not None:
            return "pivoted", f"only its rest_proj can be stored in {self.rest_dtype}"
        if any("q" not in seam.identities for seam in stream):
            return "pivoted", f"q_proj is ({source.query_width}, {source.hidden_size}), not square"
        worst = 0.0
        for seam in stream:
            foretold = forecast(seam)
            dtypes = {way: self.stored(tensors, seam, way) for way in ("q", "pivoted")}
            by_q, pivoted = (foretold.ways[way].worst(dtype) for way, dtype in dtypes.items())
            if not foretold.ways["q"].usable:
                return "pivoted", (
                    f"the condition number of layer {seam.layer}'s q_proj is {foretold.ways['q'].condition:.1e}"
                )
            if by_q > AS_GOOD * pivoted:
                expected = {"pivoted": pivoted, "q": by_q, "original": max(foretold.original[dtypes["q"]].values())}
                errors = ", ".join(f"{name} {error:.1e}" for name, error in expected.items())
                return "pivoted", f"expected error of layer {seam.layer} in {dtypes['pivoted']}: {errors}"
            worst = max(worst, by_q / pivoted if 0 < pivoted < math.inf else 1.0)
        return "q", f"expected errors at most {worst:.2f} times those of pivoted, in every layer"

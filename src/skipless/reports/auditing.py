"""What can be removed, and is it safe? Condition numbers, ranks, and the expected error of each way to close each seam.

Of any model: where skips and norms block a seam, of one with the same matrices and without them.
One seam at a time is in memory, and nothing is written.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path

import torch

from skipless.algebra.forecast import Forecast, Way, letter
from skipless.algebra.spectrum import Spectrum, spectrum
from skipless.algebra.tolerances import coarsest, dtype_name
from skipless.architecture.folds import FOLDS
from skipless.architecture.seams import AUTO, BASES, REMOVABLE, Seam
from skipless.checkpoint.opening import Reader, as_skipless, open_source
from skipless.checkpoint.reader import CheckpointReader
from skipless.dtypes import DTYPE_NAMES
from skipless.errors import InputError
from skipless.removals import forecast
from skipless.reports.counting import left_out_by_fuse, moved_by_fuse, removable_as_is
from skipless.rewrite.casting import underflows
from skipless.rewrite.forecasting import Together, forecast_group, together
from skipless.rewrite.modules import read_seam
from skipless.rewrite.planning import connected, in_turn
from skipless.rewrite.probe import stored_in
from skipless.rewrite.request import Request


@dataclass(frozen=True)
class SeamAudit:
    """An open seam.

    asked: whether it is to be closed. blocked: why it cannot be in this model, or None. matrices: q, k, v or p ->
    spectrum. For a model with these matrices and without skips and norms - original, ways: as in Forecast. problems:
    way -> dtype -> why closing it so is not safe. stored: way -> the dtype in which it would be stored. These four are
    empty if even such a model's seam could not be closed, and for norms, which lose nothing but by rounding.
    """

    kind: str
    layer: int
    asked: bool
    blocked: str | None
    matrices: Mapping[str, Spectrum]
    original: Mapping[str, Mapping[str, float]]
    ways: Mapping[str, Way]
    problems: Mapping[str, Mapping[str, str]]
    stored: Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """What a request would do.

    basis, reason: by which stream seams are closed, and why. forecasts: of the seams that it closes. problems: why a
    seam is not safe. together: what all of them lose together.
    """

    basis: str
    reason: str
    forecasts: Mapping[Seam, Forecast]
    problems: Mapping[Seam, str]
    together: Together | None

    @property
    def safe(self) -> bool:
        """Whether all of it is."""
        return not self.problems and (self.together is None or not self.together.problem)


@dataclass(frozen=True)
class Audit:
    """Every open seam, and whether what was asked for is safe.

    - basis, reason: by which stream seams would be closed, and why
    - problems: why this model's fuse would not be safe
    - if_skipless: the same, of a model with its matrices and without skips and norms
    - alternatives: options of fuse that would be safe, if those asked for are not
    - as_is: what can be removed exactly beside seams, weights and biases by kind (counting.removable_as_is)
    - by_fuse, stays, left_out: of that, what fuse moves in another family's layout; what it leaves there, and why; what
      it does not store in a skipless layout (as in counting.Count)
    - parameters: how many there are in all
    - moves: how many numbers a fuse in the family's layout would move, if that was asked for
    - together: what all that was asked for loses on the way through the layers, in the coarsest dtype of storage
    """

    family: str
    basis: str
    reason: str
    seams: tuple[SeamAudit, ...]
    problems: tuple[str, ...]
    if_skipless: tuple[str, ...]
    alternatives: tuple[str, ...]
    as_is: Mapping[str, int]
    by_fuse: int | None
    stays: tuple[str, ...]
    left_out: int | None
    parameters: int
    moves: int = 0
    together: Together | None = None

    @property
    def layout(self) -> str | None:
        """The layout in which fuse does what was asked for, if it is not the one that it takes by itself."""
        return "skipless" if self.by_fuse is not None and not self.moves else None

    @property
    def safe(self) -> bool:
        """Whether all that was asked for can be removed, within the tolerance of the dtype of storage."""
        return not self.problems


def audit(
    model: str | Path,
    *,
    basis: str = AUTO,
    dtype: str | None = None,
    rest_dtype: str | None = None,
    layers_open: Iterable[int] = (),
    remove: Iterable[str] | None = None,
    parallel_removes: str = "readers",
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """What each open seam of a checkpoint would lose by being closed, and whether `fuse` would be safe.

    The checkpoint may be of any family that is described (checkpoint/family.py), or a GGUF file: skips and norms block
    seams, and the forecast is for the same matrices without them.
    What is asked for is what fuse would remove with the same options (request.Request); other seams are reported, too.
    Errors are relative to the root mean square of q, k, v or M's outputs (where a tied table is rewritten, of the
    logits, too), for white inputs of the writers (algebra/forecast.py). `progress` is called with the number of seams
    done and their total. Raises InputError for a checkpoint that contradicts its config and for options that make no
    sense.
    """
    opened = open_source(Path(model), device)
    source, reader = opened.architecture, opened.reader
    skipless = source if source.norm_type == "none" else source.skipless()
    kinds = None if remove is None else tuple(remove)
    request = Request(basis, dtype, rest_dtype, tuple(layers_open), kinds, parallel_removes)
    parameters = sum(info.weights for info in reader.tensors.values() if not info.is_index)
    as_is, family = removable_as_is(source), opened.family
    by_fuse, stays = moved_by_fuse(family, source)
    kept = stored_in(reader.tensors) if dtype is None else getattr(torch, dtype)
    refusal = () if family == "skipless" else _not_skipless(Path(model))
    left_out = None if refusal else left_out_by_fuse(family, source, {}, kept.itemsize)
    if by_fuse is not None and kinds and set(kinds) <= set(FOLDS):
        moving = request.of(family)
        moves = sum(seam.saves for seam in moving.seams(source))
        stays = tuple(moving.note(source).splitlines())
        return Audit(family, basis, "", (), (), (), (), as_is, by_fuse, stays, left_out, parameters, moves)
    asked = request.seams(skipless)
    every = [seam for seam in request.every(skipless) if seam.kind in {*REMOVABLE, *request.kinds}]
    refusals = {(seam.kind, seam.layer): seam for seam in request.every(source)}
    closing = connected(seam for seam in asked if not seam.refusal)
    later = {seam: after for group in closing for seam, _, after in in_turn(group)}
    forecasts: dict[Seam, Forecast] = {}
    groups: dict[tuple[Seam, ...], dict[str, dict[Seam, Forecast]]] = {}
    audits: dict[Seam, SeamAudit] = {}
    for done, seam in enumerate(every):
        progress(done, len(every))
        possible = not seam.refusal
        affines = read_seam(source, seam, reader.tensor)
        named = seam.readers if seam.rest else seam.writers[:1] if seam.kind != "first_layer" else ()
        matrices = [name for name in named if name in affines and affines[name].weight.ndim == 2]  # no norm's gain
        stored = {way: request.stored(reader.tensors, seam, way) for way in seam.identities if possible}
        foretold = Forecast(seam, {}, {})
        if possible:
            after = later.get(seam, frozenset())
            foretold = forecast(seam, affines, DTYPE_NAMES, rest_dtype=rest_dtype, later=after)
            foretold = forecasts[seam] = dataclasses.replace(foretold, left={})
        audits[seam] = SeamAudit(
            kind=seam.kind,
            layer=seam.layer,
            asked=seam in asked,
            blocked=refusals[seam.kind, seam.layer].blocked,
            matrices={letter(name): spectrum(affines[name].weight) for name in matrices},
            original=foretold.original,
            ways=foretold.ways,
            problems=_problems(foretold),
            stored=stored,
        )
    progress(len(every), len(every))
    norms = [seam for seam in request.every(source) if seam.kind == "norms" and "norms" in request.kinds]
    for seam in norms:
        audits[seam] = SeamAudit(seam.kind, seam.layer, True, seam.blocked, {}, {}, {}, {}, {})

    @cache
    def cast(dtype: str) -> dict[str, str]:
        """Why matrices cannot be cast to a dtype, by their names."""
        kept, read = dict.fromkeys(reader.tensors, getattr(torch, dtype)), _Whole(reader)
        return {each.name: str(each) for each in underflows(reader.tensors, kept, read)}

    def copied(request: Request) -> list[str]:
        """The same, of those that no seam of a request rewrites."""
        rewritten = {name for seam in request.seams(skipless) for name in seam.modules}
        problems = {} if request.dtype is None else cast(request.dtype)
        return [problem for name, problem in problems.items() if name.rpartition(".")[0] not in rewritten]

    def one_by_one(closing: Iterable[Seam], basis: str) -> dict[Seam, Forecast]:
        """The forecasts of seams; those that rewrite the same modules are closed one after the other."""
        forecasts_of: dict[Seam, Forecast] = {}
        for group in map(tuple, connected(closing)):
            if not any(after & {*seam.readers, *seam.followers} for seam, _, after in in_turn(group)):
                forecasts_of |= {seam: forecasts[seam] for seam in group}
                continue
            known = groups.setdefault(group, {})
            if basis not in known:
                read = partial(read_seam, source, read=reader.tensor)
                known[basis] = forecast_group(group, basis, read, DTYPE_NAMES, rest_dtype)
            forecasts_of |= known[basis]
        return forecasts_of

    def answer(request: Request) -> Answer:
        """What a request would do, skips and norms left out."""
        asked = request.seams(skipless)
        basis, reason = request.decide(skipless, reader.tensors, asked, forecasts.__getitem__)
        closing = [seam for seam in asked if not seam.refusal]
        foretold = one_by_one(closing, basis)
        stored = {seam: request.stored(reader.tensors, seam, seam.way(basis)) for seam in closing}
        unpaid = {seam: request.unpaid(reader.tensors, seam, seam.way(basis)) for seam in closing}
        problems = {
            seam: seam.refusal or unpaid[seam] or foretold[seam].problem(seam.way(basis), stored[seam])
            for seam in asked
        }
        dtype = dtype_name(coarsest(getattr(torch, name) for name in stored.values())) if stored else None
        expected = None if dtype is None else together(skipless, forecasts, foretold, basis, dtype)
        return Answer(basis, reason, foretold, {seam: each for seam, each in problems.items() if each}, expected)

    chosen = answer(request)
    for seam, foretold in chosen.forecasts.items():  # as they are one after the other
        ways = {**audits[seam].ways, **foretold.ways}
        unsafe = {**audits[seam].problems, **_problems(foretold)}
        audits[seam] = dataclasses.replace(audits[seam], original=foretold.original, ways=ways, problems=unsafe)
    blocked = _refusals([*norms, *(refusals[seam.kind, seam.layer] for seam in asked if not seam.refusal)])
    blocked = (*(refusal if kinds else ()), *blocked)
    lossy = copied(request)
    unsafe_seams = [problem for seam, problem in chosen.problems.items() if not seam.refusal]
    problems = (*_refusals(chosen.problems), *unsafe_seams, *lossy)
    if not problems and chosen.together is not None and chosen.together.problem:
        problems = (chosen.together.problem,)
    alternatives = []
    others = _others(request, [seam.layer for seam in chosen.problems if seam.kind == "stream"])
    for option, other in others if problems and not blocked else ():
        with suppress(InputError):  # a basis that this model cannot have
            wanted = other.seams(skipless)  # without values, its stream seams are not the ones that were read
            if wanted and audits.keys() >= set(wanted) and answer(other).safe and not copied(other):
                alternatives.append(option)
    return Audit(
        family=opened.family,
        basis=chosen.basis,
        reason=chosen.reason,
        seams=tuple(audits.values()),
        problems=(*blocked, *_refusals(chosen.problems)) if blocked else problems,
        if_skipless=problems,
        alternatives=tuple(alternatives),
        as_is=as_is,
        by_fuse=by_fuse,
        stays=stays,
        left_out=left_out,
        parameters=parameters,
        together=chosen.together,
    )


def _problems(foretold: Forecast) -> dict[str, dict[str, str]]:
    """By way and dtype, why closing a seam so is not safe."""
    return {
        way: {name: problem for name in foretold.original if (problem := foretold.problem(way, name))}
        for way in foretold.ways
    }


class _Whole:
    """Reads rows of a checkpoint's tensors, of each of which all is read at once, and kept until the next."""

    def __init__(self, reader: Reader):
        self._read = lru_cache(1)(reader.tensor)

    def __call__(self, name: str, rows: slice | None = None) -> torch.Tensor:
        whole = self._read(name)
        return whole if rows is None else whole[rows]


def _not_skipless(model: Path) -> tuple[str, ...]:
    """Why no skipless model computes what a folder's does: its layout has a place for every block."""
    if model.suffix != ".gguf":  # of which all that can be opened are ordinary Llamas or skipless models
        try:
            as_skipless(CheckpointReader(model))
        except InputError as error:
            return (str(error),)
    return ()


def _refusals(asked: Iterable[Seam]) -> tuple[str, ...]:
    """Why seams cannot be closed at all: the first one's reason for each kind."""
    by_kind: dict[str, list[Seam]] = {}
    for seam in asked:
        if seam.refusal:
            by_kind.setdefault(seam.kind, []).append(seam)
    return tuple(
        f"{blocked[0].refusal}{f' (and in {len(blocked) - 1} more layers)' if len(blocked) > 1 else ''}"
        for blocked in by_kind.values()
    )


def _others(request: Request, layers: Iterable[int]) -> Iterator[tuple[str, Request]]:
    """Requests that differ from this one in one option of fuse; layers: those that might stay open."""
    for basis in BASES:
        yield f"--basis {basis}", dataclasses.replace(request, basis=basis)
    for name in DTYPE_NAMES:
        yield f"--dtype {name}", dataclasses.replace(request, dtype=name)
    if layers := tuple(sorted({*request.layers_open, *layers})):
        yield f"--layers-open {','.join(map(str, layers))}", dataclasses.replace(request, layers_open=layers)
    for kind in request.kinds if len(request.kinds) > 1 else ():
        yield f"--remove {kind}", dataclasses.replace(request, remove=(kind,))

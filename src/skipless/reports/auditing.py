"""What can be removed, and is it safe? Condition numbers, ranks, and the expected error of each way to close each seam.

Of any model: where skips and norms block a seam, of one with the same matrices and without them.
One seam at a time is in memory, and nothing is written.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch

from skipless.algebra.forecast import Forecast, Way, letter
from skipless.algebra.spectrum import Spectrum, spectrum
from skipless.architecture.seams import REMOVABLE, Seam
from skipless.checkpoint.opening import Reader, open_source
from skipless.dtypes import DTYPE_NAMES
from skipless.errors import InputError
from skipless.removals import forecast
from skipless.reports.counting import removable_as_is
from skipless.rewrite.casting import underflows
from skipless.rewrite.modules import read_seam
from skipless.rewrite.request import AUTO, BASES, Request


@dataclass(frozen=True)
class SeamAudit:
    """An open seam. asked: whether it is to be closed. blocked: why it cannot be in this model, or None.

    matrices: q, k, v or p -> spectrum. original, ways: as in Forecast, for a model with these matrices and without
    skips and norms; problems: way -> dtype -> why closing it so is not safe; stored: way -> the dtype in which it would
    be. The last four are empty if even such a model's could not be closed, and of norms, which lose nothing but by
    rounding.
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
class Audit:
    """Every open seam, and the answer: basis, by which stream seams would be closed, and why; what would not be safe.

    problems: of this model; if_skipless: of one with its matrices and without skips and norms. alternatives: options of
    fuse that would make it safe, if as it was asked for it is not. as_is: what can be removed exactly beside seams,
    weights and biases by kind (counting.removable_as_is); parameters: how many there are in all.
    """

    family: str
    basis: str
    reason: str
    seams: tuple[SeamAudit, ...]
    problems: tuple[str, ...]
    if_skipless: tuple[str, ...]
    alternatives: tuple[str, ...]
    as_is: Mapping[str, int]
    parameters: int

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
    remove: Iterable[str] = REMOVABLE,
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
    request = Request(basis, dtype, rest_dtype, tuple(layers_open), tuple(remove), parallel_removes)
    asked = request.seams(skipless)
    every = [seam for seam in request.every(skipless) if seam.kind in {*REMOVABLE, *request.remove}]
    refusals = {(seam.kind, seam.layer): seam for seam in request.every(source)}
    forecasts: dict[Seam, Forecast] = {}
    audits: dict[Seam, SeamAudit] = {}
    for done, seam in enumerate(every):
        progress(done, len(every))
        possible = not seam.refusal
        affines = read_seam(source, seam, reader.tensor)
        matrices = seam.readers if seam.rest else seam.writers[:1]
        stored = {way: request.stored(reader.tensors, seam, way) for way in seam.identities if possible}
        foretold = Forecast(seam, {}, {})
        if possible:
            foretold = forecasts[seam] = forecast(seam, affines, DTYPE_NAMES, rest_dtype=rest_dtype)
        audits[seam] = SeamAudit(
            kind=seam.kind,
            layer=seam.layer,
            asked=seam in asked,
            blocked=refusals[seam.kind, seam.layer].blocked,
            matrices={letter(name): spectrum(affines[name].weight) for name in matrices if name in affines},
            original=foretold.original,
            ways=foretold.ways,
            problems={
                way: {name: problem for name in foretold.original if (problem := foretold.problem(way, name))}
                for way in foretold.ways
            },
            stored=stored,
        )
    progress(len(every), len(every))
    norms = [seam for seam in request.every(source) if seam.kind == "norms" and "norms" in request.remove]
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

    def answer(request: Request) -> tuple[str, str, dict[Seam, str]]:
        """The basis, why, and the problems of a request, skips and norms left out."""
        asked = request.seams(skipless)
        basis, reason = request.decide(skipless, reader.tensors, asked, forecasts.__getitem__)
        found = {}
        for seam in asked:
            problem = seam.refusal
            if not problem:
                way = seam.way(basis)
                foretold = audits[seam].problems[way].get(request.stored(reader.tensors, seam, way))
                problem = request.unpaid(reader.tensors, seam, way) or foretold
            if problem:
                found[seam] = problem
        return basis, reason, found

    basis, reason, found = answer(request)
    blocked = _refusals([*norms, *(refusals[seam.kind, seam.layer] for seam in asked if not seam.refusal)])
    lossy = copied(request)
    problems = (*_refusals(found), *(problem for seam, problem in found.items() if not seam.refusal), *lossy)
    alternatives = []
    others = _others(request, [seam.layer for seam in found if seam.kind == "stream"])
    for option, other in others if problems and not blocked else ():
        with suppress(InputError):  # a basis that this model cannot have
            wanted = other.seams(skipless)  # without values, its stream seams are not the ones that were read
            if wanted and audits.keys() >= set(wanted) and not answer(other)[2] and not copied(other):
                alternatives.append(option)
    return Audit(
        family=opened.family,
        basis=basis,
        reason=reason,
        seams=tuple(audits.values()),
        problems=(*blocked, *_refusals(found)) if blocked else problems,
        if_skipless=problems,
        alternatives=tuple(alternatives),
        as_is=removable_as_is(source),
        parameters=sum(info.weights for info in reader.tensors.values() if not info.is_index),
    )


class _Whole:
    """Reads rows of a checkpoint's tensors, of each of which all is read at once, and kept until the next."""

    def __init__(self, reader: Reader):
        self._read = lru_cache(1)(reader.tensor)

    def __call__(self, name: str, rows: slice | None = None) -> torch.Tensor:
        whole = self._read(name)
        return whole if rows is None else whole[rows]


def _refusals(asked: Iterable[Seam]) -> tuple[str, ...]:
    """Why seams cannot be closed at all: of each kind, the first one's reason."""
    found: dict[str, list[Seam]] = {}
    for seam in asked:
        if seam.refusal:
            found.setdefault(seam.kind, []).append(seam)
    return tuple(
        f"{blocked[0].refusal}{f' (and in {len(blocked) - 1} more layers)' if len(blocked) > 1 else ''}"
        for blocked in found.values()
    )


def _others(request: Request, layers: Iterable[int]) -> Iterator[tuple[str, Request]]:
    """Requests that differ from this one in one option of fuse; layers: those that might stay open."""
    for basis in BASES:
        yield f"--basis {basis}", dataclasses.replace(request, basis=basis)
    for name in DTYPE_NAMES:
        yield f"--dtype {name}", dataclasses.replace(request, dtype=name)
    if layers := tuple(sorted({*request.layers_open, *layers})):
        yield f"--layers-open {','.join(map(str, layers))}", dataclasses.replace(request, layers_open=layers)
    for kind in request.remove if len(request.remove) > 1 else ():
        yield f"--remove {kind}", dataclasses.replace(request, remove=(kind,))

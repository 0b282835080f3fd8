"""What can be removed, and is it safe? Condition numbers, ranks, and the expected error of each way to close each seam.

One seam at a time is in memory, and nothing is written.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from skipless.checkpoint.reader import CheckpointReader
from skipless.dtypes import DTYPE_NAMES
from skipless.errors import InputError
from skipless.prediction import Forecast, Way, forecast, letter
from skipless.request import AUTO, BASES, REMOVABLE, Request
from skipless.seams import Seam, seams
from skipless.source import read_architecture, read_seam
from skipless.spectrum import Spectrum, spectrum


@dataclass(frozen=True)
class SeamAudit:
    """An open seam. asked: whether it is to be closed. blocked: why it cannot be, or None.

    matrices: q, k, v or p -> spectrum, of those that could go. original, ways: as in Forecast. problems: way -> dtype
    -> why closing it so is not safe. stored: way -> the dtype in which it would be. The last four are empty if it is
    blocked.
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

    alternatives: options of fuse that would make it safe, if as it was asked for it is not.
    """

    basis: str
    reason: str
    seams: tuple[SeamAudit, ...]
    problems: tuple[str, ...]
    alternatives: tuple[str, ...]

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
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """What each open seam of a skipless checkpoint would lose by being closed, and whether `fuse` would be safe.

    What is asked for is what fuse would remove with the same options (request.Request); other seams are reported, too.
    Errors are relative to the root mean square of q, k, v or M's outputs (where a tied table is rewritten, of the
    logits, too), for white inputs of the writers (prediction.py). `progress` is called with the number of seams done
    and their total. Raises InputError for a checkpoint that contradicts its config and for options that make no sense.
    """
    reader = CheckpointReader(Path(model), device)
    source = read_architecture(reader)
    request = Request(basis, dtype, rest_dtype, tuple(layers_open), tuple(remove))
    asked = request.seams(source)
    every = seams(source)
    forecasts: dict[Seam, Forecast] = {}
    audits: dict[Seam, SeamAudit] = {}
    for done, seam in enumerate(every):
        progress(done, len(every))
        affines = read_seam(source, seam, reader.tensor)
        names = dict.fromkeys(name for gone in seam.identities.values() for name in gone)
        matrices = {letter(name): spectrum(affines[name].weight) for name in names}
        stored = {way: request.stored(reader.tensors, seam, way) for way in seam.identities if not seam.blocked}
        foretold = Forecast(seam, {}, {})
        if not seam.blocked:
            foretold = forecasts[seam] = forecast(seam, affines, DTYPE_NAMES, rest_dtype=rest_dtype)
        audits[seam] = SeamAudit(
            kind=seam.kind,
            layer=seam.layer,
            asked=seam in asked,
            blocked=seam.blocked,
            matrices=matrices,
            original=foretold.original,
            ways=foretold.ways,
            problems={
                way: {name: problem for name in foretold.original if (problem := foretold.problem(way, name))}
                for way in foretold.ways
            },
            stored=stored,
        )
    progress(len(every), len(every))

    def answer(request: Request) -> tuple[str, str, dict[Seam, str]]:
        """The basis, why, and the problems of a request."""
        asked = request.seams(source)
        basis, reason = request.decide(source, reader.tensors, asked, forecasts.__getitem__)
        found = {}
        for seam in asked:
            problem = seam.refusal
            if not problem:
                way = seam.way(basis)
                problem = audits[seam].problems[way].get(request.stored(reader.tensors, seam, way))
            if problem:
                found[seam] = problem
        return basis, reason, found

    basis, reason, found = answer(request)
    alternatives = []
    for option, other in _others(request, [seam.layer for seam in found if seam.kind == "stream"]) if found else ():
        with suppress(InputError):  # a basis that this model cannot have
            if other.seams(source) and not answer(other)[2]:
                alternatives.append(option)
    return Audit(basis, reason, tuple(audits.values()), tuple(found.values()), tuple(alternatives))


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

"""What can be removed, and is it safe? Condition numbers, ranks, and the expected error of each way to close each seam.

One seam at a time is in memory, and nothing is written.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from skipless.checkpoint.reader import CheckpointReader
from skipless.eliminate import Affine
from skipless.fusion import AUTO, BASES, REMOVABLE, choose_basis, load, read_architecture, requested, stored_in
from skipless.prediction import Forecast, Way, forecast, letter
from skipless.seams import Seam, seams
from skipless.spectrum import Spectrum, spectrum

# In which errors are always given, beside the dtype asked for.
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class SeamAudit:
    """An open seam. blocked: why it cannot be closed, or None. dtype: in which it would be stored.

    matrices: q, k, v or p -> spectrum, of those that could go. original, ways: as in Forecast. problems: way -> dtype
    -> why closing it so is not safe. The last three are empty if it is blocked.
    """

    kind: str
    layer: int
    blocked: str | None
    dtype: str
    matrices: Mapping[str, Spectrum]
    original: Mapping[str, Mapping[str, float]]
    ways: Mapping[str, Way]
    problems: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Audit:
    """Every open seam, and the answer: basis, by which stream seams would be closed, and why; what would not be safe.

    alternatives: options of fuse with which all that was asked for is safe, if as it was asked for it is not.
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
    layers_open: Iterable[int] = (),
    remove: Iterable[str] = REMOVABLE,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """What each open seam of a skipless checkpoint would lose by being closed, and whether `fuse` would be safe.

    The options are those of fuse (fusion.py), and what is asked for is what fuse would remove with them; other
    seams are reported, too. Errors are relative to the root mean square of q, k, v or M's outputs, for white inputs of
    the writers (prediction.py). `progress` is called with the number of seams done and their total. Raises InputError
    for a checkpoint that contradicts its config and for options that make no sense.
    """
    reader = CheckpointReader(Path(model), device)
    source = read_architecture(reader)
    asked = requested(source, basis, dtype, layers_open, remove)
    every = seams(source)
    stored = {seam: stored_in(reader, seam, dtype) for seam in every}
    forecasts: dict[Seam, Forecast] = {}
    audits: dict[Seam, SeamAudit] = {}
    for done, seam in enumerate(every):
        progress(done, len(every))
        affines = load(source, seam, reader.tensor)
        if seam.blocked is None:
            forecasts[seam] = forecast(seam, affines, tuple(dict.fromkeys((*DTYPES, stored[seam]))))
        audits[seam] = _audit(seam, stored[seam], affines, forecasts.get(seam, Forecast(seam, {}, {})))
    progress(len(every), len(every))
    reason = ""
    if basis == AUTO:
        stream = {seam: stored[seam] for seam in asked if seam.kind == "stream" and seam in forecasts}
        basis, reason = choose_basis(source, stream, [forecasts[seam] for seam in stream])

    def problems(basis: str, dtype: str | None) -> tuple[str, ...]:
        found = (
            seam.refusal or audits[seam].problems.get(seam.way(basis), {}).get(dtype or stored[seam]) for seam in asked
        )
        return tuple(problem for problem in found if problem)

    found = problems(basis, None)
    ways = [way for way in BASES if all(seam.way(way) in seam.identities for seam in asked)]
    instead = [(f"--basis {way}", way, None) for way in ways] + [(f"--dtype {name}", basis, name) for name in DTYPES]
    alternatives = tuple(option for option, way, name in instead if found and not problems(way, name))
    return Audit(basis, reason, tuple(audits.values()), found, alternatives)


def _audit(seam: Seam, dtype: str, affines: Mapping[str, Affine], forecast: Forecast) -> SeamAudit:
    names = dict.fromkeys(name for gone in seam.identities.values() for name in gone)
    problems = {
        way: {name: problem for name in forecast.original if (problem := forecast.problem(way, name))}
        for way in forecast.ways
    }
    return SeamAudit(
        kind=seam.kind,
        layer=seam.layer,
        blocked=seam.blocked,
        dtype=dtype,
        matrices={letter(name): spectrum(affines[name].weight) for name in names},
        original=forecast.original,
        ways=forecast.ways,
        problems=problems,
    )

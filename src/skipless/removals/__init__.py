"""Ways to remove a block of weights, one module each: how it is closed, what that costs, and how exact it will be.

architecture/seams.py says which seams a model has, and by which ways each can be closed; a module here ties a way to
the algebra. A new removal is one such module and its entry in WAYS, and its seams' in seams.KINDS (or in folds.py, for
what moves within a family's own layout). Imports algebra, checkpoint and architecture.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from skipless.algebra.affine import Affine
from skipless.algebra.forecast import Forecast
from skipless.architecture.seams import Seam
from skipless.checkpoint.opening import Read
from skipless.removals import columns, first_layer, merge, neutral, rows, table
from skipless.removals.setting import Closed, Setting, Step

__all__ = ["WAYS", "Removal", "forecast", "removal"]


class Removal(Protocol):
    """What a module of this package has."""

    def close(self, seam: Seam, affines: dict[str, Affine], setting: Setting, read: Read) -> Closed:
        """Close one seam. affines: those of seam.modules, which may be taken out after their last use; read: for
        seam.mixed. Raises InputError if that cannot be done exactly.
        """

    def forecast(
        self,
        seam: Seam,
        affines: Mapping[str, Affine],
        dtypes: Sequence[str],
        ways: Iterable[str] | None = None,
        rest_dtype: str | None = None,
        later: frozenset[str] = frozenset(),
    ) -> Forecast:
        """What closing a seam by each of `ways` (None: all there are) will cost in each dtype.

        affines: every module of seam.modules. rest_dtype: that of the rest of pivoted columns, if it is another. later:
        modules that a later seam rewrites again, which are kept in fp64 till then.
        """

    def steps(self, seam: Seam, setting: Setting) -> Iterator[Step]:
        """Its steps of third order, in their order."""

    def memory(self, seam: Seam, setting: Setting) -> float:
        """Bytes that `close` holds at most beside what has been read."""


# By the ways of seam.identities.
WAYS: dict[str, Removal] = {
    "q": columns,
    "k": columns,
    "v": columns,
    "pivoted": columns,
    "head": columns,
    "rows": rows,
    "p": merge,
    "gain": neutral,
    "table": table,
    "lookup": first_layer,
    "fold": neutral,
    "key_bias": neutral,
    "value_bias": neutral,
}


def removal(seam: Seam) -> Removal:
    """The module that closes a seam; all its ways are of one."""
    return WAYS[next(iter(seam.identities))]


def forecast(
    seam: Seam,
    affines: Mapping[str, Affine],
    dtypes: Sequence[str],
    ways: Iterable[str] | None = None,
    rest_dtype: str | None = None,
    later: frozenset[str] = frozenset(),
) -> Forecast:
    """What closing a seam by each of `ways` (None: all there are) will cost in each dtype: see Removal.forecast."""
    return removal(seam).forecast(seam, affines, dtypes, ways, rest_dtype, later)

"""How far from the original an exact rewrite may be, by the dtype in which it is stored or run."""

from collections.abc import Iterable

import torch

# The largest error that an exact rewrite shows, relative to the largest logit or to the root mean square of q, k, v.
# Where the original itself is worse (always so in half precision), the multiple of its own error.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
OWN_ERROR_FACTOR = 2.5


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Of floating-point dtypes, the one that rounds most."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as options and messages call it."""
    return str(dtype).removeprefix("torch.")


def tolerance(dtype: torch.dtype, own_error: float) -> float:
    """What a rewrite may show in `dtype`, where the original shows `own_error`."""
    return max(TOLERANCES.get(dtype, 0.0), OWN_ERROR_FACTOR * own_error)

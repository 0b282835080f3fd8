"""The tolerances that tests hold the library to; `skipless verify` and `skipless audit` use the same numbers."""

import torch

from skipless.algebra.tolerances import OWN_ERROR_FACTOR, TOLERANCES

FP64 = TOLERANCES[torch.float64]
FP32 = TOLERANCES[torch.float32]
HALF = OWN_ERROR_FACTOR

assert (FP64, FP32, HALF) == (1e-9, 1e-4, 2.5)

"""Freed memory is kept for what comes next, as much as may be, and given back in the end."""

import ctypes
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from skipless.rewrite.machine import freed_memory_kept, resident_memory

SIZE = 2**27
GLIBC = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this malloc is not glibc's")
# In a process of its own, whose heap has no holes: pages cleared for an array that is made and freed a few times.
SCRIPT = f"""
import json, resource
import numpy as np
from skipless.rewrite.machine import freed_memory_kept, resident_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        np.ones({SIZE}, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
with freed_memory_kept(resident_memory() + {4 * SIZE}):
    kept, held = faults(), resident_memory()
print(json.dumps([usual, kept, held, resident_memory()]))
"""


@GLIBC
def test_freed_memory_is_used_again_and_in_the_end_given_back():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    usual, kept, held, after = json.loads(run.stdout)
    assert kept < usual / 2
    assert after < held - SIZE / 2


@GLIBC
def test_no_more_is_kept_than_may_be():
    with freed_memory_kept(limit := resident_memory() + SIZE // 2):
        np.ones(SIZE, np.uint8)
        end = time.monotonic() + 10
        while resident_memory() > limit and time.monotonic() < end:
            time.sleep(0.01)
        assert resident_memory() <= limit

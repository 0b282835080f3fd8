"""Freed memory is kept for what comes next, and given back in the end."""

import ctypes
import resource

import pytest
import torch

from skipless.machine import freed_memory_kept, resident_memory

SIZE, ROUNDS = 2**27, 8


def faults():
    """Pages that the system has to clear when a large tensor is made and freed a few times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(ROUNDS):
        torch.ones(SIZE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this malloc is not glibc's")
def test_freed_memory_is_used_again_and_in_the_end_given_back():
    usual = faults()
    with freed_memory_kept():
        assert faults() < usual / 2
        held = resident_memory()
    assert resident_memory() < held - SIZE / 2
    assert faults() > usual / 2

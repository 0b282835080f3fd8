"""Silence transformers' own progress bars where we show ours, or none."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def no_library_bars() -> Iterator[None]:
    """No progress bars of transformers inside the block; afterwards as before."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()

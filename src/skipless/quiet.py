"""Silence libraries where we speak ourselves, or where nothing is to be said."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def no_library_bars() -> Iterator[None]:
    """No progress bars of transformers inside the block; afterwards as before."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


@contextmanager
def errors_only(name: str) -> Iterator[None]:
    """Only errors of the logger of this name inside the block; afterwards as before."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

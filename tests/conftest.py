"""Shapes in the algebra's annotations are checked while tests run; one thread; nothing asks a model hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from more, and busy machines make threads spin
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from jaxtyping import install_import_hook

install_import_hook(
    [f"skipless.{room}" for room in ("basis", "eliminate", "rounding", "prediction")], "beartype.beartype"
)

import pytest
from hypothesis import settings
from transformers.utils import logging

logging.disable_progress_bar()
settings.register_profile("skipless", deadline=None, derandomize=True)
settings.load_profile("skipless")


@pytest.fixture(autouse=True, scope="session")
def _umask():
    """Files are compared with what the usual umask gives."""
    os.umask(0o022)

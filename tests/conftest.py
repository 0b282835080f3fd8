"""Shapes in the algebra's annotations are checked while tests run; one thread; nothing asks a model hub, or reports."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from more, and busy machines make threads spin
os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # of processes that tests start
os.environ["CI"] = "true"  # else OpenVINO reports each conversion, which takes two seconds

from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401  (the hook finds it by its name)

install_import_hook(
    [
        f"skipless.{room}"
        for room in (
            "algebra.affine",
            "algebra.basis",
            "algebra.grids",
            "algebra.stream",
            "algebra.rounding",
            "removals.columns",
            "removals.merge",
            "removals.rows",
        )
    ],
    "tests.shapes.check",
)

import logging

import pytest
from hypothesis import settings
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()
settings.register_profile("skipless", deadline=None, derandomize=True)
settings.load_profile("skipless")


class Deprecations(logging.Handler):
    """What transformers logs, rather than warns of, when something deprecated is used."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.found = []

    def emit(self, record):
        if "deprecated" in record.getMessage():
            self.found.append(record.getMessage())


deprecations = Deprecations()
transformers_logging.set_verbosity_warning()
transformers_logging.disable_default_handler()
transformers_logging.add_handler(deprecations)


@pytest.fixture(autouse=True)
def _no_deprecated_calls():
    """Fails a test in which transformers logs that something is deprecated; warnings do so by pyproject.toml."""
    deprecations.found.clear()
    yield
    assert not deprecations.found


@pytest.fixture(autouse=True, scope="session")
def _umask():
    """Files are compared with what the usual umask gives."""
    os.umask(0o022)


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    """Nobody pulls the plug: fsync only looks whether the file is open."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)
        yield

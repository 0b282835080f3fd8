"""Fixtures that more than one file needs."""

import pytest
import torch

from skipless import fuse
from tests.models import MANY_FILES, build, contents, save


@pytest.fixture
def source(tmp_path):
    return save(build(dtype=torch.float32), tmp_path / "source")


@pytest.fixture
def whole(source, tmp_path):
    """What an uninterrupted fuse in this process writes."""
    fuse(source, tmp_path / "whole", **MANY_FILES)
    return contents(tmp_path / "whole")

"""Fixtures that more than one file needs."""

import pytest
import torch

from skipless import fuse
from tests.models import MANY_FILES, build, contents, save


@pytest.fixture
def source(tmp_path):
    return save(build(dtype=torch.float32), tmp_path / "source")


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """What an uninterrupted fuse of `source` in this process writes."""
    folder = tmp_path_factory.mktemp("whole")
    fuse(save(build(dtype=torch.float32), folder / "source"), folder / "whole", **MANY_FILES)
    return contents(folder / "whole")

"""One small model for all tests of distillation."""

from __future__ import annotations

import pytest
from distilling import save_small


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The folder of a small real pipeline."""
    return save_small(tmp_path_factory.mktemp("small") / "model")

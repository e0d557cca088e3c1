"""Shared by the contract's tests: one case for each registered technique, made once."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from vivace.techniques.base import registry
from vivace.testing import Case

# The samples and faults are third parties': found by name, as another process finds them too.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "faults")]


@functools.cache
def case_of(name: str) -> Case:
    """The case of a registered technique; its runs and its clip shape are remembered between checks."""
    return Case(registry[name])

"""One case for each registered technique, made once for all tests of this folder."""

from __future__ import annotations

import functools

from vivace.techniques.base import registry
from vivace.testing import Case


@functools.cache
def case_of(name: str) -> Case:
    """The case of a registered technique; its runs and its clip shape are remembered between checks."""
    return Case(registry[name])

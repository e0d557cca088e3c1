"""One case for each registered technique, made once for all tests of this folder."""

from __future__ import annotations

import functools
import os

from vivace.techniques.base import registry
from vivace.testing import Case

WHOLE = (
    "first_block_cache",
    "guidance_interval",
    "int8_linear",
    "lora",
    "radial",
    "solver",
    "student_sampler",
    "whole_clip_decode",
)
"""Techniques that get every check in every run."""


def full() -> bool:
    """Whether everything is asked for (`make contract`)."""
    return os.environ.get("VIVACE_CONTRACT") == "full"


@functools.cache
def case_of(name: str) -> Case:
    """The case of a registered technique; its runs and its clip shape are remembered between checks."""
    return Case(registry[name])

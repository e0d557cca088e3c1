"""Randomness per sample: one generator per seed, so that a result does not depend on its batch mates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vivace.core.errors import ConfigError

if TYPE_CHECKING:
    import torch


def generators(seed: int | Sequence[int], samples: int) -> list[torch.Generator]:
    """One CPU generator per sample.

    Args:
        seed: one seed (sample i gets seed + i) or one seed per sample.
        samples: number of samples in the batch.

    Raises:
        ConfigError: the number of seeds is not the number of samples, or a seed is out of range.
    """
    import torch

    seeds = [seed + i for i in range(samples)] if isinstance(seed, int) else list(seed)
    if len(seeds) != samples:
        raise ConfigError(f"{samples} samples need {samples} seeds, got {len(seeds)}.")
    if bad := [s for s in seeds if not 0 <= s < 2**63]:
        raise ConfigError(f"a seed must be from 0 to 2^63-1, not {bad[0]}.")
    return [torch.Generator("cpu").manual_seed(s) for s in seeds]

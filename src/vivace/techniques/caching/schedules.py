"""Sets of computed steps: written for one number of steps, used with another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def power_law(steps: int, count: int, last: int, power: float) -> frozenset[int]:
    """`count` of `steps` steps at last * u^power for even u from 0 to 1, no two the same."""
    spots: list[int] = []
    for i in range(count):
        spot = round(last * (i / max(1, count - 1)) ** power)
        spots.append(max(spot, spots[-1] + 1 if spots else 0))
    return frozenset(min(s, steps - count + i) for i, s in enumerate(spots))


def resampled(computed: Sequence[int], written: int, steps: int) -> frozenset[int]:
    """The schedule `computed` of `written` steps for another number of steps: same share, same shape, step 0 kept."""
    if steps == written:
        return frozenset(computed)
    count = min(steps, max(min(2, steps), round(len(computed) * steps / written)))
    shape = np.asarray(sorted(computed), dtype=float) * (steps - 1) / max(1, written - 1)
    places = np.interp(np.linspace(0, len(shape) - 1, count), np.arange(len(shape)), shape)
    spots: list[int] = []
    for place in places:
        spots.append(max(round(float(place)), spots[-1] + 1 if spots else 0))
    return frozenset(min(s, steps - count + i) for i, s in enumerate(spots))

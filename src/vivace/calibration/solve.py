"""From a wanted share of skipped steps to a threshold, by simulating the policies on calibrated curves.

Every simulator returns one bool for each step, True where the step is skipped. They follow one expert and one
branch; a sum or product starts anew at every computed step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from vivace.core.errors import ConfigError

_LOWEST, _HIGHEST = 1e-6, 1e6


def magcache(
    ratio: Sequence[float], threshold: float, max_skip: int = 2, retention: float = 0.2
) -> list[bool]:
    """MagCache (arXiv 2506.09045).

    A step is skipped while the sum of |1 - product of ratios| since the last computed step stays below the threshold
    and the run of skipped steps does not exceed `max_skip`.

    Args:
        ratio: mean magnitude ratios, one a step.
        threshold: bound of the accumulated error.
        max_skip: longest run of skipped steps.
        retention: share of steps at the start that are always computed.
    """
    out: list[bool] = []
    product, total, run = 1.0, 0.0, 0
    keep = max(1, int(len(ratio) * retention))
    for step, r in enumerate(ratio):
        if step >= keep:
            product, run = product * r, run + 1
            total += abs(1.0 - product)
            if total < threshold and run <= max_skip:
                out.append(True)
                continue
        product, total, run = 1.0, 0.0, 0
        out.append(False)
    return out


def teacache(
    polynomial: Sequence[float],
    time_change: Sequence[float],
    threshold: float,
    first: int = 1,
    last: int = 1,
) -> list[bool]:
    """TeaCache (arXiv 2411.19108): the change of the time embedding, rescaled by a polynomial, is accumulated.

    Args:
        polynomial: coefficients, highest power first.
        time_change: relative L1 change from the step before, one a step.
        threshold: bound of the accumulated change.
        first, last: steps at the ends that are always computed.
    """
    return accumulated(np.abs(np.polyval(polynomial, time_change)).tolist(), threshold, first, last)


def accumulated(
    change: Sequence[float], threshold: float, first: int = 1, last: int = 0, max_skip: int = 0
) -> list[bool]:
    """Any policy that skips while the changes from step to step add up to less than a threshold.

    Args:
        change: one a step; the first is not used.
        threshold: bound of the sum since the last computed step.
        first, last: steps at the ends that are always computed.
        max_skip: longest run of skipped steps; 0 for no limit.
    """
    out: list[bool] = []
    total, run = 0.0, 0
    for step, value in enumerate(change):
        total += value
        free = max(first, 1) <= step < len(change) - last
        if free and total < threshold and (not max_skip or run < max_skip):
            run += 1
            out.append(True)
            continue
        total, run = 0.0, 0
        out.append(False)
    return out


def share(skipped: Sequence[bool]) -> float:
    """Share of skipped steps."""
    return sum(skipped) / len(skipped) if skipped else 0.0


def share_for_speedup(speedup: float) -> float:
    """Share of steps to skip for a number of times fewer evaluations.

    Raises:
        ConfigError: a speed-up below 1.
    """
    if not 1.0 <= speedup < math.inf:
        raise ConfigError(f"a speed-up of {speedup:g} cannot be asked for; it starts at 1.")
    return 1.0 - 1.0 / speedup


def threshold_for(simulate: Callable[[float], float], target: float, tolerance: float = 0.02) -> float:
    """The threshold at which a policy skips `target` of the steps.

    `simulate` need not be continuous: it is a staircase, and the step of it nearest to the target is taken. Bisection
    finds the stair when the share grows with the threshold; a small search around it forgives small dents.

    Args:
        simulate: threshold -> share of skipped steps.
        target: wanted share.
        tolerance: how far the share may be from the target.

    Raises:
        ConfigError: no threshold comes that near; the sentence gives the nearest share.
    """
    tried: dict[float, float] = {}

    def ask(threshold: float) -> float:
        if threshold not in tried:
            tried[threshold] = simulate(threshold)
        return tried[threshold]

    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    for end in (_LOWEST, _HIGHEST):
        ask(end)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ask(math.exp(middle)) < target else (low, middle)
    for offset in np.linspace(-0.5, 0.5, 101):
        ask(math.exp(low + offset))
    # Of two shares equally near the smaller; of its stair the middle, so that no rounding tips it over the edge.
    nearest = min(tried.values(), key=lambda s: (round(abs(s - target), 9), s))
    stair = sorted(t for t, s in tried.items() if s == nearest)
    best = stair[len(stair) // 2]
    if abs(nearest - target) > tolerance:
        raise ConfigError(
            f"no threshold skips {target:.0%} of the steps; the nearest is {nearest:.0%} at {best:.4g}."
        )
    return best

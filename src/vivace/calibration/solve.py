"""From a wanted share of skipped steps to a threshold, by simulating the policies on calibrated curves.

Every simulator returns one bool for each step, True where the step is skipped, and follows the cache engine's rules:
steps at the ends are computed, runs of skipped steps have a cap, and a step at which an expert begins (`starts`) has
nothing to reuse. One branch, the conditional one, decides. The curves are those of the exact trajectory, so a run that
skips, and with it leaves that trajectory a little, may decide otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vivace.calibration.gram import error_rows
from vivace.core.errors import ConfigError

LOWEST, HIGHEST = 1e-6, 1e6
"""Where thresholds are looked for when nothing narrower is said."""
_GRID = 400
"""Thresholds that are tried for a bound on the loss."""
Pairs = Sequence[Sequence[float]]
"""[step][earlier step]: how far a step is from each step before it."""


@dataclass(frozen=True, slots=True)
class Guard:
    """Where a policy is not asked.

    Attributes:
        first, last: steps at the ends that are always computed.
        max_skip: longest run of skipped steps; 0 for no limit.
        starts: steps at which an expert begins.
    """

    first: int = 1
    last: int = 0
    max_skip: int = 0
    starts: Sequence[int] = (0,)


def walk(
    steps: int,
    guard: Guard,
    reuse: Callable[[int, int], bool],
    computed: Callable[[int, int | None], None] | None = None,
) -> list[bool]:
    """The engine's loop over the steps of one sample.

    Args:
        steps: number of steps.
        guard: where the policy is not asked.
        reuse: (step, last computed step) -> whether the policy reuses; asked only where it may.
        computed: (step, last computed step of the same expert or None), called for every computed step.
    """
    out: list[bool] = []
    known: int | None = None
    run = 0
    for step in range(steps):
        if step in guard.starts:
            known, run = None, 0
        free = guard.first <= step < steps - guard.last and (not guard.max_skip or run < guard.max_skip)
        if free and known is not None and reuse(step, known):
            run += 1
            out.append(True)
            continue
        if computed is not None:
            computed(step, known)
        known, run = step, 0
        out.append(False)
    return out


def magcache(
    ratio: Sequence[float],
    threshold: float,
    max_skip: int = 2,
    retention: float = 0.2,
    warmup: int = 1,
    last: int = 0,
    starts: Sequence[int] = (0,),
) -> list[bool]:
    """MagCache (arXiv 2506.09045).

    A step is skipped while the sum of |1 - product of ratios| since the last computed step stays below the threshold
    and the run of skipped steps does not exceed `max_skip`. The method fixes its mask before the run, so the first
    step of a second expert is computed without the sum starting anew.

    Args:
        ratio: mean magnitude ratios, one a step.
        threshold: bound of the accumulated error.
        max_skip: longest run of skipped steps; none at 0.
        retention: share of steps at the start that are always computed.
        warmup: steps at the start that are always computed, whatever the share says.
        last: steps at the end that are always computed.
        starts: steps at which an expert begins.
    """
    out: list[bool] = []
    product, total, run = 1.0, 0.0, 0
    keep = max(1, warmup, int(len(ratio) * retention))
    for step, r in enumerate(ratio):
        product, run = product * r, run + 1
        total += abs(1.0 - product)
        if keep <= step < len(ratio) - last and total < threshold and run <= max_skip:
            out.append(step not in starts)
            continue
        product, total, run = 1.0, 0.0, 0
        out.append(False)
    return out


def accumulated(change: Sequence[float], threshold: float, guard: Guard) -> list[bool]:
    """A policy that skips while changes from step to step add up to less than a threshold: TeaCache (arXiv 2411.19108).

    TeaCache's changes are a polynomial of the time embedding's. They are added as they are: where a fit dips below
    zero it takes away from the sum.

    Args:
        change: one a step; the first is not used.
        threshold: bound of the sum since the last computed step.
        guard: where the policy is not asked.
    """
    total = 0.0

    def reuse(step: int, known: int) -> bool:
        nonlocal total
        if total + change[step] < threshold:
            total += change[step]
            return True
        return False

    def computed(step: int, known: int | None) -> None:
        nonlocal total
        total = 0.0

    return walk(len(change), guard, reuse, computed)


def first_block(change: Pairs, threshold: float, guard: Guard) -> list[bool]:
    """First-block cache: a step is skipped when its first block is near that of the last computed step.

    Args:
        change: relative L1 change of the first block's residual, [step][earlier step].
        threshold: bound of that change.
        guard: where the policy is not asked.
    """
    return walk(len(change), guard, lambda step, known: change[step][known] < threshold)


def easycache(
    inputs: Pairs, outputs: Pairs, sizes: Sequence[float], threshold: float, guard: Guard
) -> list[bool]:
    """EasyCache (arXiv 2507.02860): the input's change times the rate of the last two computed steps is accumulated.

    Args:
        inputs, outputs: mean |difference| of the network's inputs and outputs, [step][earlier step].
        sizes: mean |output|, one a step.
        threshold: bound of the accumulated change, relative to the last computed output.
        guard: where the policy is not asked.
    """
    total, rate = 0.0, math.inf

    def reuse(step: int, known: int) -> bool:
        nonlocal total
        moved = rate * inputs[step][step - 1] / sizes[known]
        if total + moved < threshold:
            total += moved
            return True
        return False

    def computed(step: int, known: int | None) -> None:
        nonlocal total, rate
        total = 0.0
        rate = math.inf if known is None else outputs[step][known] / max(inputs[step][known], 1e-30)

    return walk(len(sizes), guard, reuse, computed)


def mask_error(
    gram: np.ndarray,
    sigmas: Sequence[float],
    skipped: Sequence[bool],
    guidance: float,
    adds_input: bool = False,
) -> float:
    """Predicted error of the final latent when skipped steps hold the last computed output, both branches alike.

    Args:
        gram: (2n, 2n) matrix of `vivace.calibration.gram`.
        sigmas: (n + 1,) noise levels.
        skipped: (n,) True where a step is skipped; the first is not.
        guidance: the guidance scale; 1 for none.
        adds_input: the input's change since the last computed step is added to the held output (caches that reuse
            the residual of the whole network).

    Returns:
        A length, in units of the root mean square length of a conditional output.
    """
    n = len(gram) // 2
    strides = np.diff(np.asarray(sigmas, dtype=np.float64))
    held = error_rows(~np.asarray(skipped), np.arange(n, dtype=np.float64), 0)
    rows = np.zeros((n, 2 * n))
    rows[:, :n] = held
    rows[:, n:] = (guidance - 1.0) * held
    if adds_input:
        known = 0
        for step in range(n):
            if not skipped[step]:
                known = step
                continue
            # x_t - x_R along an Euler path: both branches get the same, so the guidance delta does not see it.
            rows[step, known:step] += strides[known:step]
            rows[step, n + known : n + step] += (guidance - 1.0) * strides[known:step]
    whole = strides @ rows
    return float(np.sqrt(max(float(whole @ gram @ whole), 0.0)))


def share_for_speedup(speedup: float) -> float:
    """Share of the work to skip for a number of times less of it.

    Raises:
        ConfigError: a speed-up below 1.
    """
    if not 1.0 <= speedup < math.inf:
        raise ConfigError(f"a speed-up of {speedup:g} cannot be asked for; it starts at 1.")
    return 1.0 - 1.0 / speedup


def threshold_for(
    simulate: Callable[[float], float],
    target: float,
    tolerance: float = 0.02,
    low: float = LOWEST,
    high: float = HIGHEST,
) -> float:
    """The threshold at which a policy skips `target` of the steps.

    `simulate` need not be continuous: it is a staircase, and the step of it nearest to the target is taken. Bisection
    finds the stair when the share grows with the threshold; a small search around it forgives small dents.

    Args:
        simulate: threshold -> share of skipped steps.
        target: wanted share.
        tolerance: how far the share may be from the target.
        low, high: the thresholds that may be chosen.

    Raises:
        ConfigError: no threshold comes that near; the sentence gives the nearest share.
    """
    tried: dict[float, float] = {}

    def ask(threshold: float) -> float:
        threshold = min(max(threshold, low), high)
        if threshold not in tried:
            tried[threshold] = simulate(threshold)
        return tried[threshold]

    for end in (low, high):
        ask(end)
    below, above = math.log(low), math.log(high)
    for _ in range(60):
        middle = (below + above) / 2
        below, above = (middle, above) if ask(math.exp(middle)) < target else (below, middle)
    for offset in np.linspace(-0.5, 0.5, 101):
        ask(math.exp(below + offset))
    # Of two shares equally near the smaller; of its stair the middle, so that no rounding tips it over the edge.
    nearest = min(tried.values(), key=lambda s: (round(abs(s - target), 9), s))
    best = _middle(simulate, tried, nearest)
    if abs(nearest - target) > tolerance:
        raise ConfigError(
            f"no threshold skips {target:.0%} of the steps; the nearest is {nearest:.0%} at {best:.4g}."
        )
    return best


def _middle(simulate: Callable[[float], float], tried: dict[float, float], share: float) -> float:
    """The middle, on a logarithmic scale, of the widest stair among the tried thresholds that give a share."""
    places = sorted(tried)
    stairs: list[list[int]] = []
    for i, t in enumerate(places):
        if tried[t] == share:
            if stairs and stairs[-1][1] == i - 1:
                stairs[-1][1] = i
            else:
                stairs.append([i, i])

    def edge(inside: int, outside: int) -> float:
        """Where the stair ends between two tried thresholds."""
        if not 0 <= outside < len(places):
            return places[inside]
        on, off = places[inside], places[outside]
        for _ in range(40):
            middle = math.sqrt(on * off)
            on, off = (middle, off) if simulate(middle) == share else (on, middle)
        return on

    ends = [(edge(i, i - 1), edge(j, j + 1)) for i, j in stairs]
    low, high = max(ends, key=lambda e: e[1] / e[0])
    middle = math.sqrt(low * high)
    return middle if simulate(middle) == share else low


def threshold_within(
    simulate: Callable[[float], tuple[float, float]], bound: float, low: float = LOWEST, high: float = HIGHEST
) -> float:
    """The threshold that skips most among those whose predicted loss keeps a bound.

    Args:
        simulate: threshold -> (share of skipped steps, predicted loss); neither needs to be monotone.
        bound: largest loss.
        low, high: the thresholds that may be chosen.

    Raises:
        ConfigError: nothing is skipped, or the bound is not kept, at every threshold.
    """
    tried = {t: simulate(t) for t in np.geomspace(low, high, _GRID).tolist()}
    kept = {t: saved for t, (saved, loss) in tried.items() if loss <= bound and saved > 0.0}
    if not kept:
        least = min((loss for saved, loss in tried.values() if saved > 0.0), default=math.inf)
        if least == math.inf:
            raise ConfigError(
                "no threshold skips anything: with so few steps all of them are always computed."
            )
        raise ConfigError(
            f"no threshold that skips anything keeps the loss at {bound:.4g}; the least is {least:.4g}."
        )
    most = max(kept.values())
    stair = sorted(t for t, saved in kept.items() if saved == most)
    return stair[len(stair) // 2]

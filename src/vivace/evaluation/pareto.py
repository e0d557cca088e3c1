"""Cost against quality: the Pareto front, curves over a knob, and the area between two of them.

Less cost is always better. A curve is straight between its points over the logarithm of the cost and says nothing
outside them. Costs are taken as known: they vary far less than quality does over prompts. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vivace.core.errors import VivaceError
from vivace.evaluation.statistics import Interval, mean_interval, plain


class ParetoError(VivaceError, ValueError):
    """Points that make no curve, or curves that do not overlap."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One contender: cost `x` and quality `y`, both with intervals, which make a box."""

    name: str
    x: Interval
    y: Interval
    prompts: Mapping[int, float] = field(default_factory=dict)
    """Quality by prompt, where single values were kept; then areas get intervals."""

    @property
    def usable(self) -> bool:
        """Whether both coordinates are finite and the cost is positive."""
        return math.isfinite(self.x.value) and math.isfinite(self.y.value) and self.x.value > 0


def front(points: Sequence[Point], *, higher: bool = True) -> list[bool]:
    """Whether each point is on the front: no other costs no more and is at least as good, and better in one of both.

    Points without a finite place are never on it. Equal points are on it together.
    """
    sign = 1.0 if higher else -1.0
    places = [(p.x.value, sign * p.y.value) if p.usable else None for p in points]
    return [
        mine is not None
        and not any(
            other is not None and other != mine and other[0] <= mine[0] and other[1] >= mine[1]
            for other in places
        )
        for mine in places
    ]


def clearly_dominated(point: Point, points: Sequence[Point], *, higher: bool = True) -> bool:
    """Whether another point's box lies wholly on the cheaper and better side of this one's: not a matter of noise."""

    def bounds(i: Interval) -> tuple[float, float]:
        return (i.low, i.high) if math.isfinite(i.low) else (i.value, i.value)

    def beyond(other: Point) -> bool:
        x, y, ox, oy = bounds(point.x), bounds(point.y), bounds(other.x), bounds(other.y)
        return ox[1] <= x[0] and (oy[0] > y[1] if higher else oy[1] < y[0])

    return point.usable and any(o.usable and o is not point and beyond(o) for o in points)


class Curve:
    """Points of one group by rising cost; points of equal cost are averaged.

    Raises:
        ParetoError: fewer than two points of different cost.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = sorted((p for p in points if p.usable), key=lambda p: p.x.value)
        places = np.log([p.x.value for p in self.points])
        self.x, self._where = np.unique(np.round(places, 12), return_inverse=True)
        if len(self.x) < 2:
            raise ParetoError("a curve needs two points of different cost; run another value of the knob.")
        self.y = self._merge(np.array([p.y.value for p in self.points]))

    def _merge(self, values: np.ndarray) -> np.ndarray:
        """Means over points of equal cost; `values` is (points,) or (prompts, points)."""
        weights = np.zeros((len(self.points), len(self.x)))
        weights[np.arange(len(self.points)), self._where] = 1
        return values @ (weights / weights.sum(axis=0))

    def by_prompt(self, prompts: Sequence[int]) -> np.ndarray:
        """Quality (prompts, places) at every place of the curve."""
        return self._merge(np.array([[p.prompts[i] for p in self.points] for i in prompts]))

    def shared(self) -> set[int]:
        """Prompts for which every point has a value."""
        return set.intersection(*(set(p.prompts) for p in self.points))

    def weights(self, x: float) -> np.ndarray:
        """Weights over the places that give the curve at log cost x; x lies within the curve."""
        i = int(np.clip(np.searchsorted(self.x, x) - 1, 0, len(self.x) - 2))
        share = min(max((x - self.x[i]) / (self.x[i + 1] - self.x[i]), 0.0), 1.0)
        out = np.zeros(len(self.x))
        out[i], out[i + 1] = 1 - share, share
        return out

    def area_weights(self, low: float, high: float) -> np.ndarray:
        """Weights over the places that give the curve's mean between two log costs: the trapezium rule, exact here."""
        knots = np.unique(np.concatenate([[low, high], self.x[(self.x > low) & (self.x < high)]]))
        rows = np.array([self.weights(k) for k in knots])
        widths = np.diff(knots)
        return ((rows[:-1] + rows[1:]) / 2 * widths[:, None]).sum(axis=0) / (high - low)


def curves_by_group(points: Mapping[str, Sequence[Point]]) -> dict[str, Curve]:
    """Curves of the groups that have at least two points of different cost."""
    found = {}
    for name, members in points.items():
        try:
            found[name] = Curve(members)
        except ParetoError:
            continue
    return found


def area_between(a: Curve, b: Curve) -> Interval:
    """Mean difference a minus b in quality over the costs that both cover.

    The interval is over prompts where every point has their values. A trapezium is linear in its corners, so every
    prompt has an area of its own, and their mean is the area.

    Raises:
        ParetoError: the curves cover no common cost.
    """
    low, high = _overlap(a, b)
    mine, theirs = a.area_weights(low, high), b.area_weights(low, high)
    value = float(mine @ a.y - theirs @ b.y)
    return _over_prompts(a, b, mine, theirs, value)


def quality_at_cost(a: Curve, b: Curve, cost: float) -> Interval:
    """Difference a minus b in quality at one cost.

    Raises:
        ParetoError: the cost is outside of a curve.
    """
    low, high = _overlap(a, b)
    x = math.log(cost)
    if not low - 1e-9 <= x <= high + 1e-9:
        raise ParetoError(
            f"the cost {cost:.4g} is outside of what both curves cover, {math.exp(low):.4g} to {math.exp(high):.4g}."
        )
    mine, theirs = a.weights(x), b.weights(x)
    return _over_prompts(a, b, mine, theirs, float(mine @ a.y - theirs @ b.y))


def cost_at_quality(
    curve: Curve, quality: float, *, higher: bool = True, y: np.ndarray | None = None
) -> float:
    """The least cost at which a curve is at least as good as `quality`; NaN where it never is.

    Also NaN where the cheapest point is better already: how little would do is then unknown.

    Args:
        y: qualities at the curve's places instead of its own.
    """
    sign = 1.0 if higher else -1.0
    values = sign * (curve.y if y is None else y) - sign * quality
    if values[0] > 0:
        return math.nan
    reached = np.flatnonzero(values >= 0)
    if not reached.size:
        return math.nan
    i = int(reached[0])
    if i == 0 or values[i] == 0:
        return float(np.exp(curve.x[i]))
    share = values[i - 1] / (values[i - 1] - values[i])
    return float(np.exp(curve.x[i - 1] + share * (curve.x[i] - curve.x[i - 1])))


def speed_up_at_quality(
    a: Curve, b: Curve, quality: float, *, higher: bool = True, draws: int = 2000, seed: int = 0
) -> Interval:
    """Cost of b over cost of a where both have this quality: above 1, a is cheaper. NaN where one curve lacks it.

    The interval is a percentile bootstrap over prompts; draws in which a curve misses the quality are left out, and
    there is no interval when they are more than one in twenty.
    """
    value = cost_at_quality(b, quality, higher=higher) / cost_at_quality(a, quality, higher=higher)
    shared = sorted(a.shared() & b.shared())
    if len(shared) < 2 or not math.isfinite(value):
        return Interval(value, math.nan, math.nan, len(shared), "interpolated")
    first, second = a.by_prompt(shared), b.by_prompt(shared)
    picks = np.random.default_rng(seed).integers(len(shared), size=(draws, len(shared)))
    ratios = np.array(
        [
            cost_at_quality(b, quality, higher=higher, y=second[p].mean(axis=0))
            / cost_at_quality(a, quality, higher=higher, y=first[p].mean(axis=0))
            for p in picks
        ]
    )
    ratios = ratios[np.isfinite(ratios)]
    if len(ratios) < 0.95 * draws:
        return Interval(
            value, math.nan, math.nan, len(shared), "interpolated; too close to an end for an interval"
        )
    low, high = np.quantile(ratios, [0.025, 0.975])
    how = f"interpolated; percentile bootstrap over prompts, {draws} draws"
    return Interval(value, min(float(low), value), max(float(high), value), len(shared), how)


def area_dict(a: str, b: str, area: Interval) -> dict[str, Any]:
    """An area as the board holds it."""
    return {
        "a": a,
        "b": b,
        "value": plain(area.value),
        "low": plain(area.low),
        "high": plain(area.high),
        "note": area.how,
    }


def _overlap(a: Curve, b: Curve) -> tuple[float, float]:
    low, high = max(a.x[0], b.x[0]), min(a.x[-1], b.x[-1])
    if high - low <= 1e-9:
        raise ParetoError("the curves cover no common cost; run values of the knobs that meet.")
    return float(low), float(high)


def _over_prompts(a: Curve, b: Curve, mine: np.ndarray, theirs: np.ndarray, value: float) -> Interval:
    shared = sorted(a.shared() & b.shared())
    span = f"costs {math.exp(max(a.x[0], b.x[0])):.4g} to {math.exp(min(a.x[-1], b.x[-1])):.4g}"
    if len(shared) < 2:
        return Interval(value, math.nan, math.nan, 0, f"{span}; no single values, so no interval")
    found = mean_interval(a.by_prompt(shared) @ mine - b.by_prompt(shared) @ theirs)
    return Interval(found.value, found.low, found.high, found.n, f"{span}; {found.how}")


__all__ = [
    "Curve",
    "ParetoError",
    "Point",
    "area_between",
    "area_dict",
    "clearly_dominated",
    "cost_at_quality",
    "curves_by_group",
    "front",
    "quality_at_cost",
    "speed_up_at_quality",
]

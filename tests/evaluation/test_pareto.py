"""Fronts and curves against hand-made ones, areas against integrals, their intervals against simulated truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vivace.evaluation.pareto import (
    Curve,
    ParetoError,
    Point,
    area_between,
    area_dict,
    clearly_dominated,
    cost_at_quality,
    curves_by_group,
    front,
    quality_at_cost,
    speed_up_at_quality,
)
from vivace.evaluation.statistics import Interval


def point(
    x: float, y: float, dx: float = 0.0, dy: float = 0.0, prompts: dict[int, float] | None = None
) -> Point:
    return Point(
        name=f"{x}", x=Interval(x, x - dx, x + dx, 1), y=Interval(y, y - dy, y + dy, 1), prompts=prompts or {}
    )


def curve(*pairs: tuple[float, float]) -> Curve:
    return Curve([point(x, y) for x, y in pairs])


def noisy(rng: np.random.Generator, costs: list[float], truth: list[float], base: np.ndarray) -> Curve:
    """Prompts share `base` over all points; every point has noise of its own."""
    members = []
    for x, y in zip(costs, truth, strict=True):
        values = dict(enumerate(y + base + 0.1 * rng.normal(size=len(base))))
        members.append(point(x, float(np.mean(list(values.values()))), prompts=values))
    return Curve(members)


def test_front() -> None:
    points = [
        point(1, 1),
        point(2, 3),
        point(2, 2),
        point(3, 3),
        point(4, 5),
        point(5, math.nan),
        point(0, 9),
    ]
    assert front(points) == [True, True, False, False, True, False, False]
    lower = [point(1, 5), point(2, 6), point(2, 4)]
    assert front(lower, higher=False) == [True, False, True]
    assert front([point(1, 1), point(1, 1)]) == [True, True]
    assert front([]) == []


def test_front_equals_the_definition() -> None:
    rng = np.random.default_rng(0)
    places = rng.integers(1, 6, size=(40, 2)).astype(float)
    got = front([point(x, y) for x, y in places])
    for (x, y), mine in zip(places, got, strict=True):
        beaten = any((a <= x and b > y) or (a < x and b >= y) for a, b in places)
        assert mine is not beaten


def test_clear_domination_needs_separate_boxes() -> None:
    good, near, far = point(1, 5, 0.1, 0.5), point(2, 4.8, 0.1, 0.5), point(2, 3, 0.1, 0.5)
    points = [good, near, far]
    assert not clearly_dominated(near, points)
    assert clearly_dominated(far, points)
    assert not clearly_dominated(good, points)
    assert clearly_dominated(good, [good, point(0.5, 4, 0.1, 0.1)], higher=False)


def test_area_of_a_constant_gap() -> None:
    a, b = curve((1, 2), (4, 4), (16, 6)), curve((2, 2), (8, 4), (32, 6))
    area = area_between(a, b)
    # Both rise by 1 for each doubling; a is half a doubling-step pair ahead: 1 in y.
    assert area.value == pytest.approx(1.0)
    assert math.isnan(area.low)
    assert "costs 2 to 16" in area.how
    assert area_between(b, a).value == pytest.approx(-1.0)
    assert area_dict("a", "b", area)["low"] is None


def test_area_equals_the_integral() -> None:
    rng = np.random.default_rng(0)
    a = curve(*zip(np.cumsum(rng.random(5)) + 1, rng.random(5), strict=True))
    b = curve(*zip(np.cumsum(rng.random(6)) + 0.5, rng.random(6), strict=True))
    low, high = max(a.x[0], b.x[0]), min(a.x[-1], b.x[-1])
    grid = np.linspace(low, high, 200_001)
    gap = np.interp(grid, a.x, a.y) - np.interp(grid, b.x, b.y)
    assert area_between(a, b).value == pytest.approx(float(gap.mean()), abs=1e-5)


def test_area_intervals_cover() -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(300):
        base = rng.normal(size=25)
        a = noisy(rng, [1, 2, 4], [1, 2, 3], base)
        b = noisy(rng, [1, 4], [0.8, 2.8], base)
        area = area_between(a, b)
        hits += area.low <= 0.2 <= area.high
        assert area.n == 25
        # The spread that prompts share cancels.
        assert area.high - area.low < 0.2
    assert 0.91 <= hits / 300 <= 0.985


def test_area_uses_prompts_that_all_points_have() -> None:
    a = Curve([point(1, 1, prompts={0: 1, 1: 1, 2: 9}), point(2, 2, prompts={0: 2, 1: 2})])
    b = Curve([point(1, 0, prompts={0: 0, 1: 0, 5: 4}), point(2, 0, prompts={0: 0, 1: 0})])
    area = area_between(a, b)
    assert (area.n, area.value) == (2, pytest.approx(1.5))


def test_curves_that_do_not_meet() -> None:
    with pytest.raises(ParetoError, match="no common cost"):
        area_between(curve((1, 1), (2, 2)), curve((2, 1), (3, 2)))
    with pytest.raises(ParetoError, match="two points"):
        curve((1, 1), (1, 2))
    with pytest.raises(ParetoError, match="two points"):
        curve((1, 1), (0, 2), (2, math.nan))
    groups = curves_by_group({"a": [point(1, 1), point(2, 2)], "b": [point(1, 1)]})
    assert list(groups) == ["a"]


def test_points_of_equal_cost_are_averaged() -> None:
    c = curve((1, 1), (1, 3), (2, 4))
    assert c.y.tolist() == [2, 4]


def test_quality_at_equal_cost() -> None:
    a, b = curve((1, 2), (4, 4)), curve((1, 1), (4, 2))
    assert quality_at_cost(a, b, 2).value == pytest.approx(1.5)
    assert quality_at_cost(a, b, 4).value == pytest.approx(2)
    with pytest.raises(ParetoError, match="outside"):
        quality_at_cost(a, b, 5)


def test_cost_at_quality() -> None:
    c = curve((1, 2), (4, 4), (16, 3), (64, 6))
    assert cost_at_quality(c, 3) == pytest.approx(2)
    assert cost_at_quality(c, 4) == pytest.approx(4)
    assert cost_at_quality(c, 2) == pytest.approx(1)
    assert cost_at_quality(c, 5) == pytest.approx(64 / 4 ** (1 / 3))
    assert math.isnan(cost_at_quality(c, 7))
    assert math.isnan(cost_at_quality(c, 1))
    assert cost_at_quality(curve((1, 4), (4, 2)), 3, higher=False) == pytest.approx(2)


def test_speed_up_at_equal_quality() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=60) * 0.2
    a = noisy(rng, [1, 2, 4, 8], [1, 2, 3, 4], base)
    b = noisy(rng, [2, 4, 8, 16], [1, 2, 3, 4], base)
    found = speed_up_at_quality(a, b, 2.5, draws=500)
    assert found.low < 2 < found.high
    assert found.high / found.low < 1.2
    end = speed_up_at_quality(a, b, float(a.y[0]) + 1e-3, draws=200)
    assert math.isnan(end.low)
    assert math.isnan(speed_up_at_quality(a, b, 9.0).value)
    alone = speed_up_at_quality(curve((1, 2), (4, 4)), curve((2, 2), (8, 4)), 3)
    assert alone.value == pytest.approx(2)
    assert math.isnan(alone.low)

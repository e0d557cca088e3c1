"""Schedules against brute force over every choice of steps."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from vivace.calibration.gram import gram, schedule_error
from vivace.calibration.schedule import Problem, optimal, split
from vivace.core.errors import ConfigError


def made(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(Gram matrix, sigmas) of a smooth trajectory that bends at its ends, with a little noise."""
    rng = np.random.default_rng(seed)
    s = np.linspace(1.0, 0.0, n + 1)
    s = 3 * s / (1 + 2 * s)
    t = s[:-1, None]
    basis = np.concatenate([t**k for k in range(4)] + [np.exp(-12 * t), np.exp(-9 * (1 - t))], 1)
    c, u = (basis @ rng.normal(size=(6, 30)) + 0.02 * rng.normal(size=(n, 30)) for _ in range(2))
    return gram(c, c + 0.2 * (u - c)), s


def choices(n: int, count: int) -> list[tuple[int, ...]]:
    return [(0, *rest) for rest in itertools.combinations(range(1, n), count - 1)]


@pytest.mark.parametrize("objective", ["sum", "max"])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("budget", [3, 5])
def test_paths_are_the_best_without_guidance(objective: str, order: int, budget: int) -> None:
    g, s = made(9, order)
    best = min(schedule_error(g, s, c, None, order)[objective] for c in choices(9, budget))
    found = optimal(Problem(g, s, order=order, objective=objective), budget)
    assert (len(found.cond), found.delta, found.nfe) == (budget, (), budget)
    assert found.error(objective) == pytest.approx(best, rel=1e-9)
    assert found.error("end") == pytest.approx(schedule_error(g, s, found.cond, None, order)["end"])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("order", [0, 1, 2])
def test_end_error_with_guidance_is_near_the_best(seed: int, order: int) -> None:
    g, s = made(8, seed)
    errors = sorted(
        schedule_error(g, s, cond, delta, order, 4.0)["end"]
        for cond in choices(8, 5)
        for delta in itertools.combinations(cond, 3)
        if delta[0] == 0
    )
    found = optimal(Problem(g, s, order=order, guidance=4.0), 5, 3)
    assert set(found.delta) <= set(found.cond)
    assert (len(found.cond), len(found.delta), found.nfe) == (5, 3, 8)
    # A local search: among the best three per cent of all schedules.
    assert found.error("end") <= errors[len(errors) * 3 // 100] + 1e-12


def test_a_budget_is_shared_out_between_the_branches() -> None:
    g, s = made(8, 1)
    best = min(
        schedule_error(g, s, cond, delta, 1, 4.0)["sum"]
        for b in range(4, 8)
        for cond in choices(8, b)
        for delta in itertools.combinations(cond, 8 - b)
        if delta[0] == 0
    )
    found = split(Problem(g, s, order=1, guidance=4.0, objective="sum"), 8)
    assert found.nfe == 8
    assert found.error("sum") <= 1.05 * best
    assert split(Problem(g, s, order=1, guidance=4.0), 16).error("end") == 0.0


def test_rules_are_kept() -> None:
    g, s = made(12, 2)
    for order in (0, 1, 2):
        found = optimal(Problem(g, s, order=order, guidance=4.0, first=2, last=1, max_gap=3), 6, 4)
        steps = [*found.cond, 12]
        assert {0, 1, 11} <= set(found.cond) & set(found.delta)
        assert max(b - a - 1 for a, b in itertools.pairwise(steps)) <= 3
    with pytest.raises(ConfigError, match="2 computed of 12 steps do not fit"):
        optimal(Problem(g, s, max_gap=3), 2)
    with pytest.raises(ConfigError, match="7 guided steps do not fit"):
        optimal(Problem(g, s, guidance=4.0), 6, 7)
    with pytest.raises(ConfigError, match="give between 2 and 24"):
        split(Problem(g, s, guidance=4.0), 25)
    with pytest.raises(ConfigError, match="no objective"):
        optimal(Problem(g, s, objective="best"), 6)


@pytest.mark.parametrize("order", [0, 2])
def test_fifty_steps_are_solved_quickly(order: int) -> None:
    g, s = made(50, 3)
    start = time.process_time()
    found = optimal(Problem(g, s, order=order, guidance=5.0), 20, 12)
    assert time.process_time() - start < 5.0
    every = range(0, 50, 3)
    assert found.error("end") < schedule_error(g, s, every, None, order, 5.0)["end"]

"""Predictors against closed forms: polynomials, published sums, numpy's Hermite polynomials, ODEs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.polynomial import hermite as numpy_hermite

from vivace.techniques.caching.predictors import (
    Bdf,
    Hermite,
    Lagrange,
    Momentum,
    Predictor,
    Taylor,
    differences,
    hermite,
)

UNEVEN = (9.0, 7.0, 6.5, 3.0)


def predict(predictor, nodes, values, at):
    """What a predictor makes of a function's values at `nodes`, newest first."""
    return sum(w * v for w, v in zip(predictor.weights(nodes, at), values, strict=False))


def test_reuse_is_the_newest_value():
    assert predict(Predictor(), UNEVEN, (3.0, 1.0, 2.0, 9.0), 12.0) == 3.0


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("nodes", [UNEVEN, (4.0, 3.0, 2.0, 1.0), (0.1, 0.35, 0.4, 0.9)])
def test_lagrange_is_exact_on_polynomials_of_its_order_and_not_beyond(order, nodes):
    rng = np.random.default_rng(order)
    for at in (nodes[0] + 0.7, nodes[0] - 3.1):
        exact = np.polynomial.Polynomial(rng.normal(size=order + 1))
        assert predict(Lagrange(order), nodes, exact(np.array(nodes)), at) == pytest.approx(exact(at))
        beyond = np.polynomial.Polynomial([0.0] * (order + 1) + [1.0])
        assert predict(Lagrange(order), nodes, beyond(np.array(nodes)), at) != pytest.approx(beyond(at))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_taylor_is_the_published_sum_at_equal_distances(order):
    gap, newest = 5.0, 20.0
    values = [2.0, -1.0, 0.5, 7.0]
    nodes = [newest - gap * j for j in range(4)]
    for k in (1, 2, 3, 4):
        published, backward = 0.0, list(values)
        for i in range(order + 1):
            published += backward[0] / (math.factorial(i) * gap**i) * k**i
            backward = [a - b for a, b in itertools.pairwise(backward)]
        assert predict(Taylor(order), nodes, values, newest + k) == pytest.approx(published)


def test_taylor_of_order_one_is_the_straight_line_at_any_distance():
    assert predict(Taylor(1), (7.0, 2.0), (10.0, 0.0), 9.0) == pytest.approx(14.0)
    # The first forecast after a warm-up at distance 1, the next after a gap of 5: each with its own slope.
    assert predict(Taylor(1), (2.0, 1.0), (4.0, 3.0), 6.0) == pytest.approx(8.0)


def test_differences_are_renewed_step_by_step_as_the_published_loop_does():
    """The cache that holds differences and updates them at each computed step gives the same weights."""
    times, rng = [0.0, 1.0, 2.0, 7.0, 12.0], np.random.default_rng(0)
    values, held = rng.normal(size=5), []
    for i, (time, value) in enumerate(zip(times, values, strict=True)):
        fresh = [value]
        for order in range(min(i, 3)):
            fresh.append((fresh[order] - held[order]) / (time - times[i - 1]))
        held = fresh
    rows = differences(times[::-1][:4])
    assert [sum(w * v for w, v in zip(row, values[::-1], strict=False)) for row in rows] == pytest.approx(
        held
    )


def test_hermite_polynomials_are_numpys():
    for order in range(7):
        for x in (-1.3, 0.0, 0.4, 2.5):
            assert hermite(order, x) == pytest.approx(numpy_hermite.hermval(x, [0.0] * order + [1.0]))


@pytest.mark.parametrize("contraction", [0.3, 0.5, 0.9])
def test_hicache_is_the_published_sum_in_numpys_basis(contraction):
    gap, values = 5.0, np.array([2.0, -1.0, 0.5])
    nodes = (12.0, 7.0, 2.0)
    slopes = (values[0], (values[0] - values[1]) / gap, (values[0] - 2 * values[1] + values[2]) / gap**2)
    for k in (1.0, 4.0):
        series = [d * contraction**i / math.factorial(i) for i, d in enumerate(slopes)]
        published = numpy_hermite.hermval(contraction * k, series)
        assert predict(Hermite(2, contraction), nodes, values, 12.0 + k) == pytest.approx(published)


def test_hicache_of_order_one_is_taylor_with_a_factor_of_twice_the_squared_contraction():
    nodes, values = (6.0, 1.0), (5.0, 1.0)
    straight = predict(Taylor(1), nodes, values, 9.0) - values[0]
    for s in (0.5, 0.7):
        assert predict(Hermite(1, s), nodes, values, 9.0) - values[0] == pytest.approx(2 * s * s * straight)


def test_momentum_ignores_distances():
    assert Momentum(0.4).weights((9.0, 2.0), 30.0) == pytest.approx((1.4, -0.4))
    assert Momentum(0.4).weights((9.0,), 30.0) == (1.0,)


SOLUTIONS = {
    "decay": (lambda t: math.exp(-t), lambda t: math.exp(-t)),
    "oscillation": (lambda t: math.sin(2 * t), lambda t: -4 * math.sin(2 * t)),
    "logistic": (
        lambda t: 1 / (1 + math.exp(-t)),
        lambda t: (s := 1 / (1 + math.exp(-t))) * (1 - s) * (1 - 2 * s),
    ),
}


@pytest.mark.parametrize("name", SOLUTIONS)
@pytest.mark.parametrize("reach", [0.2, 0.8, 1.0])
def test_foca_has_the_error_it_states_on_odes_with_known_solutions(name, reach):
    """Second order in the step, with the stated constants: the calibration takes away up to half of the error."""
    solution, curvature = SOLUTIONS[name]
    for calibrate, constant in ((False, 0.5), (True, 0.25 * (1 + reach / (reach + 1)))):
        errors = []
        for h in (0.02, 0.01, 0.005):
            nodes = [1.0 - j * h for j in range(3)]
            at = 1.0 + reach * h
            error = solution(at) - predict(Bdf(calibrate), nodes, [solution(t) for t in nodes], at)
            errors.append(error)
        assert math.log2(abs(errors[0] / errors[1])) == pytest.approx(2.0, abs=0.15)
        assert errors[-1] / ((reach * 0.005) ** 2 * curvature(1.0)) == pytest.approx(constant, rel=0.05)


def test_foca_is_exact_on_lines_and_not_the_parabola():
    assert predict(Bdf(), (9.0, 7.0, 6.5), (18.0, 14.0, 13.0), 11.0) == pytest.approx(22.0)
    assert predict(Bdf(), (9.0, 7.0), (18.0, 14.0), 11.0) == pytest.approx(22.0)
    square = [t * t for t in (9.0, 7.0, 6.5)]
    assert predict(Bdf(), (9.0, 7.0, 6.5), square, 11.0) < 121.0 - 0.5
    assert Bdf().weights((9.0,), 11.0) == (1.0,)


def test_foca_solves_an_oscillator_better_than_taylor_of_order_one():
    """A trajectory forecast over gaps of five steps: the worst error over a period."""
    solution, worst = math.sin, {}
    for label, predictor in (("foca", Bdf()), ("line", Taylor(1)), ("reuse", Predictor())):
        errors = []
        for newest in range(10, 70, 5):
            nodes = [0.1 * (newest - 5 * j) for j in range(3)]
            values = [solution(t) for t in nodes]
            errors += [
                abs(solution(0.1 * (newest + k)) - predict(predictor, nodes, values, 0.1 * (newest + k)))
                for k in range(1, 5)
            ]
        worst[label] = max(errors)
    assert worst["foca"] < worst["line"] < worst["reuse"]


ALL = [Predictor(), Lagrange(2), Taylor(2), Hermite(2), Momentum(), Bdf(), Bdf(False)]


@pytest.mark.parametrize("predictor", ALL, ids=str)
def test_nothing_moves_when_nothing_changed(predictor):
    for count in range(1, 5):
        nodes = UNEVEN[:count]
        assert predict(predictor, nodes, [3.0] * count, 12.0) == pytest.approx(3.0)
        assert len(predictor.weights(nodes, 12.0)) <= predictor.depth


@pytest.mark.parametrize("predictor", [Lagrange(3), Taylor(3), Bdf()], ids=str)
def test_gain_is_limited_by_fewer_nodes(predictor):
    nodes, at = (12.0, 7.0, 2.0, 1.0), 16.0
    free = predictor.limited(nodes, at)
    assert sum(map(abs, free)) > 2.0
    for gain in (1.0, 2.0, 2.7, 4.0):
        assert sum(map(abs, predictor.limited(nodes, at, gain))) <= gain
    assert predictor.limited(nodes, at, 1.0) == (1.0,)

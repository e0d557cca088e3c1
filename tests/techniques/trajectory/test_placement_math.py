"""Noise levels by rule, and the search for them: against published numbers and exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from diffusers.schedulers import AysSchedules

from vivace.techniques.trajectory import placement_math as m


def test_align_your_steps_is_the_published_schedule():
    """Its noise levels for Stable Diffusion 1.5 are printed to three decimals beside the timesteps."""
    odds = np.array(AysSchedules["StableDiffusionSigmas"][:-1])
    levels = m.align_your_steps(10)
    assert levels[0] == 1.0
    assert levels[1:] == pytest.approx((odds / (1 + odds))[1:], abs=1e-3)
    assert tuple(AysSchedules["StableDiffusionTimesteps"]) == m.AYS_TIMESTEPS


def test_align_your_steps_is_log_linear_between_its_knots():
    ten, nineteen = m.align_your_steps(10), m.align_your_steps(19)
    assert nineteen[2::2] == pytest.approx(ten[1:])
    odds = nineteen / (1 - nineteen + 1e-300)
    assert odds[3:-1:2] == pytest.approx(np.sqrt(odds[2:-2:2] * odds[4::2]))
    for n in (1, 2, 3, 50):
        levels = m.align_your_steps(n)
        assert len(levels) == n
        assert (np.diff(levels) < 0).all()
        assert 0 < levels[-1] <= levels[0] == 1


def test_shift_multiplies_the_odds():
    levels = m.shifted(m.uniform(5), 3.0)
    assert levels == pytest.approx([1, 12 / 13, 9 / 11, 6 / 9, 3 / 7])
    odds = lambda s: s / (1 - s)  # noqa: E731
    assert odds(levels[1:]) == pytest.approx(3 * odds(m.uniform(5)[1:]))


def test_power_spaces_the_root_evenly():
    assert m.power(4, 2.0) == pytest.approx([1, 9 / 16, 1 / 4, 1 / 16])
    assert m.power(4, 1.0) == pytest.approx(m.uniform(4))


def test_a_pipelines_grid_is_told_from_a_users_levels():
    assert m.is_uniform(np.linspace(1.0, 1 / 7, 7).astype(np.float32))
    assert m.is_uniform([1.0, 0.5])
    assert not m.is_uniform([1.0, 0.6])
    assert not m.is_uniform([])


def brute(costs, steps, total):
    """(value, path) of the best chain among all."""
    n = len(costs)
    paths = ((0, *inner, n - 1) for inner in itertools.combinations(range(1, n - 1), steps - 1))
    return min((total(costs[i, j] for i, j in itertools.pairwise(p)), p) for p in paths)


@pytest.mark.parametrize("worst", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_the_cheapest_path_is_that_of_exhaustive_search(steps, worst):
    generator = np.random.default_rng(steps)
    total = max if worst else sum
    for _ in range(20):
        costs = generator.random((8, 8))
        path = m.cheapest_path(np.linspace(1, 0, 8), costs, steps, worst=worst)
        assert len(path) == steps + 1
        value, best = brute(costs, steps, total)
        assert total(costs[i, j] for i, j in itertools.pairwise(path)) == pytest.approx(value)
        if not worst:  # the sum's best chain is unique, the maximum's need not be
            assert tuple(path) == best


def test_sum_and_worst_jump_are_different_aims():
    costs = np.full((4, 4), 9.0)
    costs[0, 1], costs[1, 3] = 0.0, 3.0
    costs[0, 2], costs[2, 3] = 2.0, 2.0
    levels = [1.0, 0.6, 0.3, 0.0]
    assert list(m.cheapest_path(levels, costs, 2)) == [0, 1, 3]
    assert list(m.cheapest_path(levels, costs, 2, worst=True)) == [0, 2, 3]


def test_jump_costs_of_a_path_in_closed_form():
    """v = a + b sigma: an Euler jump from s to t misses by b (s - t)^2 / 2 less what the fine steps themselves miss."""
    sigmas, b = np.array([1.0, 0.8, 0.5, 0.1, 0.0]), np.array([3.0, -4.0])
    velocities = np.array([1.0, 2.0]) + b * sigmas[:, None]
    costs = m.jump_costs(velocities, sigmas)
    fine = [(sigmas[k] - sigmas[k + 1]) ** 2 / 2 for k in range(4)]
    for i, j in itertools.product(range(5), repeat=2):
        if j <= i:
            assert np.isinf(costs[i, j])
        else:
            expected = 5.0 * ((sigmas[i] - sigmas[j]) ** 2 / 2 - sum(fine[i:j]))
            assert costs[i, j] == pytest.approx(expected, abs=1e-12)
    assert np.array_equal(costs, m.jump_costs(velocities[:-1], sigmas))


def test_the_steps_go_where_the_path_bends():
    """A straight path with one bend between nodes 6 and 9: the search spends its steps there."""
    sigmas = np.linspace(1, 0, 17)
    velocities = np.zeros((16, 2))
    velocities[:, 0] = 1.0
    velocities[6:, 1] = [1.0, 2.0, 3.0] + [4.0] * 7
    path = m.cheapest_path(sigmas, m.jump_costs(velocities, sigmas), 5)
    assert set(path) >= {6, 7, 8, 9}


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="1 to 2 steps, not 3"):
        m.cheapest_path([1, 0.5, 0], np.zeros((3, 3)), 3)
    with pytest.raises(ValueError, match=r"shape \(3, 3\)"):
        m.cheapest_path([1, 0.5, 0], np.zeros((2, 2)), 1)
    with pytest.raises(ValueError, match="fall"):
        m.cheapest_path([0, 0.5, 1], np.zeros((3, 3)), 1)
    with pytest.raises(ValueError, match="need 2 velocities"):
        m.jump_costs(np.zeros((5, 2)), [1, 0.5, 0])

"""Kernel and energy distances of paired tables: against slow oracles, and in simulation."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy.stats import energy_distance as scipy_energy

from vivace.core.errors import ConfigError
from vivace.evaluation.two_sample import (
    compare_sets,
    compare_within,
    distance_kernel,
    energy_distance,
    mmd2,
    paired_tables,
    pairs,
    polynomial_kernel,
    robust_scaling,
)

KERNELS = {
    polynomial_kernel: lambda a, b: (float(a @ b) / len(a) + 1.0) ** 3,
    distance_kernel: lambda a, b: -math.dist(a, b),
}


def linear(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x @ y.T


def tables(rng: np.random.Generator, prompts: int, each: int = 1, width: int = 6, shift: float = 0.0):
    """Paired tables as they occur: rows share their prompt, and the rows of a pair share their noise."""
    prompt = np.repeat(rng.normal(size=(prompts, width)), each, axis=0)
    shared = prompt + rng.normal(size=prompt.shape)
    x, y = (shared + 0.7 * rng.normal(size=prompt.shape) for _ in range(2))
    return x, y + shift, np.repeat(np.arange(prompts), each)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_value_is_the_mean_over_pairs_of_different_prompts(kernel) -> None:
    x, y, groups = tables(np.random.default_rng(0), 5, 2, shift=0.4)
    k = KERNELS[kernel]
    wanted = [
        k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i])
        for i in range(10)
        for j in range(10)
        if groups[i] != groups[j]
    ]
    found = compare_sets(pairs(x, y, kernel), groups)
    assert found.value == pytest.approx(np.mean(wanted), rel=1e-9)
    assert found.low <= found.value <= found.high
    assert found.n == 10


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_distance_within_prompts_is_the_mean_of_each_prompts_own(kernel) -> None:
    x, y, _ = tables(np.random.default_rng(1), 4, 3, shift=0.4)
    groups = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 1, 0])  # prompt 3 has one clip and does not count
    k = KERNELS[kernel]
    own = []
    for g in range(3):
        rows = np.flatnonzero(groups == g)
        h = [
            k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i])
            for i in rows
            for j in rows
            if i != j
        ]
        own.append(np.mean(h))
    found = compare_within(pairs(x, y, kernel), groups)
    assert found is not None
    assert found.value == pytest.approx(np.mean(own), rel=1e-9)
    assert found.n == 11
    assert compare_within(pairs(x, y, kernel), np.arange(12)) is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_unpaired_distance_is_its_definition(kernel) -> None:
    rng = np.random.default_rng(2)
    x, y, k = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 0.5, KERNELS[kernel]
    own = [np.mean([k(a, b) for i, a in enumerate(t) for j, b in enumerate(t) if i != j]) for t in (x, y)]
    cross = np.mean([k(a, b) for a in x for b in y])
    assert mmd2(x, y, kernel) == pytest.approx(own[0] + own[1] - 2 * cross, rel=1e-9)


def test_energy_distance_is_scipys_without_its_bias() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=9), rng.normal(size=14) + 1.0
    bias = sum(np.abs(t[:, None] - t[None]).mean() / (len(t) - 1) for t in (x, y))
    assert energy_distance(x[:, None], y[:, None]) == pytest.approx(scipy_energy(x, y) ** 2 - bias, rel=1e-9)


def test_equal_tables_are_at_zero_and_nothing_speaks_against_them() -> None:
    x, _, groups = tables(np.random.default_rng(4), 12)
    found = compare_sets(pairs(x, x.copy(), polynomial_kernel), groups)
    assert (found.value, found.low, found.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    assert found.p == 1.0


@pytest.mark.parametrize("kernel", KERNELS)
def test_sets_of_one_kind(kernel) -> None:
    """Unbiased, p spread evenly, the interval holds 0: 300 simulated comparisons of 20 prompts with two clips each."""
    rng = np.random.default_rng(5)
    found = []
    for k in range(300):
        x, y, groups = tables(rng, 20, 2)
        found.append(compare_sets(pairs(x, y, kernel), groups, k, draws=100, flips=99))
    values, p = np.array([f.value for f in found]), np.array([f.p for f in found])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    assert 0.44 < p.mean() < 0.56
    assert 0.02 < (p <= 0.05).mean() < 0.09
    assert 0.14 < (p <= 0.2).mean() < 0.27
    assert np.mean([f.low <= 0 <= f.high for f in found]) > 0.92


def test_the_unpaired_estimate_is_biased_for_pairs_and_the_paired_one_is_not() -> None:
    rng = np.random.default_rng(6)
    plain, paired = [], []
    for _ in range(100):
        x, y, groups = tables(rng, 12)
        plain.append(mmd2(x, y, linear))
        paired.append(compare_sets(pairs(x, y, linear), groups, draws=2, flips=1).value)
    # x_i and y_i are alike, and only the unpaired estimate compares them: 2 / N of their covariance is missing.
    assert np.mean(plain) < -2 / 12 * 6
    assert abs(np.mean(paired)) < 3 * np.std(paired) / 10


@pytest.mark.parametrize(("kernel", "shift"), [(distance_kernel, 0.4), (polynomial_kernel, 0.7)])
def test_a_shift_is_found(kernel, shift) -> None:
    """The cubic kernel listens to the largest features, so it needs a larger shift of these normal ones."""
    rng = np.random.default_rng(7)
    p = []
    for k in range(40):
        x, y, groups = tables(rng, 20, shift=shift)
        p.append(compare_sets(pairs(x, y, kernel), groups, k, draws=10, flips=199).p)
    assert np.mean(np.array(p) <= 0.05) > 0.8


def test_the_interval_covers_the_truth() -> None:
    """With the linear kernel the squared distance is the squared length of the shift."""
    rng = np.random.default_rng(8)
    held = 0
    for k in range(300):
        x, y, groups = tables(rng, 40, 2, shift=0.5)
        found = compare_sets(pairs(x, y, linear), groups, k, draws=200, flips=1)
        held += found.low <= 6 * 0.5**2 <= found.high
    assert 0.90 <= held / 300 <= 0.985


def test_whole_prompts_are_exchanged() -> None:
    """Clips of one prompt that all moved for one reason are one observation, not many."""
    rng = np.random.default_rng(9)
    x = rng.normal(size=(60, 4))
    moved = np.repeat(rng.normal(size=(6, 4)), 10, axis=0)  # each prompt its own way: no common shift
    h = pairs(x, x + moved, linear)
    by_prompt = compare_sets(h, np.repeat(np.arange(6), 10)).p
    assert by_prompt is not None
    assert by_prompt * 32 == pytest.approx(round(by_prompt * 32))  # 2^5 different exchanges, all tried
    assert by_prompt > 0.1


def test_directions_that_cancel_are_seen_within_prompts_alone() -> None:
    rng = np.random.default_rng(10)
    way = np.repeat(np.tile([1.0, -1.0], 10), 2)[:, None]  # 20 prompts, two clips each
    x = way + 0.3 * rng.normal(size=(40, 1))
    y = -way + 0.3 * rng.normal(size=(40, 1))
    groups = np.repeat(np.arange(20), 2)
    h = pairs(x, y, distance_kernel)
    over_all, within = compare_sets(h, groups), compare_within(h, groups)
    assert within is not None
    assert over_all.low <= 0 <= over_all.high
    assert within.low > 1.0
    assert within.p == pytest.approx(0.001)


def test_order_of_rows_and_names_of_prompts_do_not_matter() -> None:
    x, y, groups = tables(np.random.default_rng(11), 10, 2, shift=0.2)
    one = compare_sets(pairs(x, y, polynomial_kernel), paired_tables(x, y, groups.tolist())[2], 3)
    order = np.random.default_rng(12).permutation(20)
    named = [int(g) * 7 + 100 for g in groups[order]]
    x, y, numbers = paired_tables(x[order], y[order], named)
    two = compare_sets(pairs(x, y, polynomial_kernel), numbers, 3)
    assert (one.value, one.low, one.high, one.p) == pytest.approx((two.value, two.low, two.high, two.p))


def test_four_hundred_clips_take_little_time() -> None:
    x, y, groups = tables(np.random.default_rng(13), 200, 2, width=64)
    started = time.process_time()
    compare_sets(pairs(x, y, polynomial_kernel), groups)
    assert time.process_time() - started < 5.0


def test_robust_scaling_ignores_outliers_and_has_a_floor() -> None:
    table = np.random.default_rng(14).normal(3.0, 2.0, (4001, 2))
    table[:100, 0] = 1e6
    table[:, 1] = 7.0
    scale = robust_scaling(table, floor=0.5)
    assert scale.centre == pytest.approx((3.0, 7.0), abs=0.2)
    assert scale.spread == pytest.approx((2.0, 0.5), abs=0.15)
    assert scale(np.array([[1e9, 6.0]])).tolist() == [[5.0, -2.0]]


@pytest.mark.parametrize(
    ("x", "y", "groups", "says"),
    [
        (np.ones((4, 2)), np.ones((4, 3)), [0, 0, 1, 1], "paired tables"),
        (np.ones((4, 2)), np.ones((4, 2)), [0, 1], "2 groups"),
        (np.ones((4, 2)), np.full((4, 2), np.nan), [0, 0, 1, 1], "not finite"),
        (np.ones((4, 2)), np.ones((4, 2)), [5, 5, 5, 5], "two prompts"),
        (np.ones(4), np.ones(4), [0, 0, 1, 1], "a table"),
    ],
)
def test_tables_that_cannot_be_compared_are_refused(x, y, groups, says) -> None:
    with pytest.raises(ConfigError, match=says):
        paired_tables(x, y, groups)


def test_unpaired_tables_need_two_rows() -> None:
    with pytest.raises(ConfigError, match="two rows or more"):
        mmd2(np.ones((1, 2)), np.ones((3, 2)))

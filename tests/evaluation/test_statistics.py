"""Intervals against simulated truth, tests against closed forms and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vivace.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    estimate,
    holm,
    mean_interval,
    median_interval,
    prompt_means,
    prompts_needed,
    prompts_to_bound,
    ratio_of_medians,
    resampling,
    share_interval,
    t_interval,
)

EXPERIMENTS = 1000
ICC = 0.5


def clips(rng: np.random.Generator, prompts: int, repeats: int) -> np.ndarray:
    """Values (prompts, repeats) of mean 0 and variance 1; half of the variance belongs to the prompt."""
    own = rng.normal(size=(prompts, repeats)) * math.sqrt(1 - ICC)
    return rng.normal(size=(prompts, 1)) * math.sqrt(ICC) + own


def covers(interval: Interval, truth: float = 0.0) -> bool:
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize("repeats", [2, 5])
@pytest.mark.parametrize("prompts", [20, 50, 100])
def test_intervals_over_prompts_cover(prompts: int, repeats: int) -> None:
    rng = np.random.default_rng(prompts + repeats)
    hits = dict.fromkeys(("t", "bca", "percentile", "videos"), 0)
    for _ in range(EXPERIMENTS):
        table = clips(rng, prompts, repeats)
        means, _ = prompt_means(table.ravel(), np.repeat(np.arange(prompts), repeats))
        hits["t"] += covers(t_interval(means))
        hits["bca"] += covers(bootstrap_interval(means, draws=1000))
        hits["percentile"] += covers(bootstrap_interval(means, draws=1000, bca=False))
        hits["videos"] += covers(t_interval(table.ravel()))
    share = {name: count / EXPERIMENTS for name, count in hits.items()}
    assert 0.92 <= share["t"] <= 0.97
    if prompts >= 50:
        assert 0.92 <= share["bca"] <= 0.97
        assert 0.92 <= share["percentile"] <= 0.97
    # What one gets who counts clips as if they were prompts.
    assert share["videos"] < (0.85 if repeats == 5 else 0.92)


def test_t_interval_is_scipys() -> None:
    values = np.random.default_rng(0).gamma(2, size=25)
    found = t_interval(values)
    wanted = stats.ttest_1samp(values, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.value == pytest.approx(values.mean())


def test_bca_is_scipys() -> None:
    values = np.random.default_rng(4).lognormal(sigma=1, size=40)
    found = bootstrap_interval(values, draws=20_000)
    wanted = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="BCa", vectorized=True, rng=np.random.default_rng(1)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=0.02)
    # Skewed to the right: the corrected interval reaches further up than the percentiles.
    assert found.high > bootstrap_interval(values, draws=20_000, bca=False).high


def test_bootstrap_is_seeded_and_keeps_scale() -> None:
    values = np.random.default_rng(0).normal(size=31)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert resampling(31, 100).sum(axis=1) == pytest.approx(np.ones(100))
    shifted = bootstrap_interval(values * 1000 + 5, seed=3)
    assert shifted.low == pytest.approx(bootstrap_interval(values, seed=3).low * 1000 + 5)


def test_few_prompts_use_t_and_many_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    assert mean_interval(rng.normal(size=29)).how.startswith("t interval")
    assert mean_interval(rng.normal(size=30)).how.startswith("BCa")
    assert mean_interval(np.ones(30), binary=True).how.startswith("Wilson")


def test_repeats_are_averaged_first() -> None:
    # Prompt 7 has three repeats and still counts once.
    means, left_out = prompt_means([1, 2, 3, 10, math.nan, math.inf], [7, 7, 7, 2, 2, 4])
    assert means.tolist() == [10, 2]
    assert left_out == 2
    assert prompt_means([math.nan], [0])[0].size == 0


def test_shares_stay_open_at_the_ends() -> None:
    found = share_interval(np.ones(16))
    assert found.value == found.high == 1
    assert 0.7 < found.low < 0.82
    p = stats.binomtest(140, 200).proportion_ci(method="wilson")
    many = share_interval(np.repeat([1.0, 0.0], [140, 60]))
    assert (many.low, many.high) == pytest.approx((p.low, p.high), abs=2e-3)


def test_share_interval_covers() -> None:
    rng = np.random.default_rng(0)
    for truth, prompts, repeats in ((0.9, 40, 1), (0.6, 50, 2), (0.95, 100, 2)):
        strength = 2.0
        p = rng.beta(strength * truth, strength * (1 - truth), size=(2000, prompts, 1))
        means = (rng.random((2000, prompts, repeats)) < p).mean(axis=2)
        share = np.mean([covers(share_interval(m), truth) for m in means])
        assert 0.92 <= share <= 0.98


def test_estimate_of_infinite_and_missing_values() -> None:
    found = estimate([math.inf, 20, 30, math.nan, 40, 50], [0, 0, 1, 1, 2, 3])
    assert found.mean == pytest.approx(np.mean([20, 30, 40, 50]))
    assert (found.left_out, found.samples, found.prompts) == (2, 4, 4)
    assert (found.median, found.worst) == (40, 20)
    all_equal = estimate([math.inf] * 3, [0, 1, 2])
    assert (all_equal.mean, all_equal.low, all_equal.median) == (None, None, math.inf)
    assert estimate([1.0, 3.0], [0, 1], better="lower").worst == 3
    assert estimate([1.0, 3.0], [0, 1], better="same").worst is None
    nothing = estimate([math.nan], [0])
    assert (nothing.mean, nothing.median, nothing.prompts, nothing.left_out) == (None, None, 0, 1)
    assert estimate([2.0], [0]).low is None


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    adjusted = holm([0.02, math.nan, 0.5])
    assert adjusted[0] == pytest.approx(0.04)
    assert math.isnan(adjusted[1])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("effect", "wanted"), [(0.5, 32), (0.3, 88), (0.2, 197), (0.1, 785)])
def test_prompts_needed(effect: float, wanted: int) -> None:
    assert prompts_needed(effect, 1.0, exact=False) == wanted
    assert prompts_needed(-2 * effect, 2.0, exact=False) == wanted
    # The exact power of a t test, from the noncentral t distribution.
    n = prompts_needed(effect, 1.0)
    assert n is not None
    limit = stats.t.ppf(0.975, n - 1)
    power = stats.nct.sf(limit, n - 1, effect * math.sqrt(n))
    assert 0.8 <= power < 0.81


def test_prompts_needed_has_no_answer_for_nothing() -> None:
    assert prompts_needed(0.0, 1.0) is None
    assert prompts_needed(math.nan, 1.0) is None
    assert prompts_needed(1.0, 0.0) == 2


def test_prompts_to_bound_reach_their_power() -> None:
    margin, rng = 0.25, np.random.default_rng(0)
    for sides in (1, 2):
        n = prompts_to_bound(margin, 1.0, sides=sides)
        assert n is not None
        table = rng.normal(size=(4000, n))
        reach = stats.t.ppf(0.95, n - 1) * table.std(axis=1, ddof=1) / math.sqrt(n)
        inside = table.mean(axis=1) - reach > -margin
        if sides == 2:
            inside &= table.mean(axis=1) + reach < margin
        assert 0.78 <= inside.mean() <= 0.83


@pytest.mark.parametrize("runs", [3, 10, 20])
def test_ratio_of_medians_covers(runs: int) -> None:
    rng, hits = np.random.default_rng(runs), 0
    for _ in range(500):
        base, own = rng.lognormal(1, 0.05, size=runs), rng.lognormal(1, 0.05, size=runs) / 2
        hits += covers(ratio_of_medians(base, own, draws=500), 2.0)
    assert 0.92 <= hits / 500 <= 0.985


def test_ratio_pairs_prompts_when_both_made_the_same_clips() -> None:
    rng = np.random.default_rng(0)
    length = rng.lognormal(0, 0.8, size=20)
    ids = [f"{i}.0" for i in range(20)]
    base, own = length * 2 * rng.lognormal(0, 0.01, 20), length * rng.lognormal(0, 0.01, 20)
    other = rng.permutation(20)
    paired = ratio_of_medians(base, own[other], ids, [ids[i] for i in other])
    alone = ratio_of_medians(base, own)
    assert paired.n == 20
    assert "prompts" in paired.how
    assert "runs" in alone.how
    assert math.log(paired.high / paired.low) < 0.5 * math.log(alone.high / alone.low)
    assert covers(paired, 2.0)


def test_ratio_draws_prompts_with_their_repeats() -> None:
    rng = np.random.default_rng(0)
    ids = [f"{i}.{k}" for i in range(15) for k in range(4)]
    slow = np.repeat(rng.lognormal(0, 0.3, 15), 4)
    by_prompt = ratio_of_medians(slow, np.ones(60), ids, ids)
    by_run = ratio_of_medians(slow, np.ones(60))
    assert by_prompt.n == 15
    assert math.log(by_prompt.high / by_prompt.low) > 1.5 * math.log(by_run.high / by_run.low)


def test_ratio_of_few_runs_says_so() -> None:
    one = ratio_of_medians([2.0], [1.0])
    assert one.value == pytest.approx(2)
    assert math.isnan(one.low)
    assert "too few" in one.how
    assert one.to_dict() == {"value": pytest.approx(2.0), "low": None, "high": None, "n": 1}
    assert math.isnan(ratio_of_medians([], [1.0]).value)
    few = ratio_of_medians([2.0, 2.1, 1.9], [1.0, 1.02, 0.98])
    assert few.low < 2 < few.high


@pytest.mark.parametrize("runs", [3, 12])
def test_median_interval_covers(runs: int) -> None:
    rng, hits = np.random.default_rng(runs), 0
    for _ in range(500):
        found = median_interval(rng.lognormal(1, 0.05, size=runs), draws=500)
        hits += covers(found, math.e)
    assert 0.92 <= hits / 500 <= 0.985
    assert math.isnan(median_interval([2.0]).low)
    assert math.isnan(median_interval([]).value)

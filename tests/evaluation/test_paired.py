"""Paired results: verdicts of known truths, exact tests against scipy, false claims under the worst null."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vivace.evaluation.paired import Paired, judge, paired


def verdict(
    mean: float,
    better: str = "higher",
    margin: float | None = 0.1,
    sd: float = 0.1,
    n: int = 100,
    reference: bool = True,
) -> str:
    z = np.random.default_rng(0).normal(size=n)
    d = mean + sd * (z - z.mean()) / z.std(ddof=1)
    result = paired(5 + d, np.full(n, 5.0), range(n), better=better, margin=margin)
    return judge({"x": result}, reference=reference)["x"].verdict


@pytest.mark.parametrize(
    ("mean", "better", "margin", "wanted"),
    [
        (0.05, "higher", 0.1, "better"),
        (0.0, "higher", 0.1, "non-inferior"),
        # Certainly lower, and certainly by less than the margin.
        (-0.05, "higher", 0.1, "non-inferior"),
        (-0.11, "higher", 0.1, "worse"),
        (-0.2, "higher", 0.1, "inferior"),
        (-0.2, "higher", None, "worse"),
        (0.05, "higher", None, "better"),
        (0.0, "higher", None, "no margin"),
        (0.05, "lower", 0.1, "non-inferior"),
        (-0.05, "lower", 0.1, "better"),
        (0.2, "lower", 0.1, "inferior"),
        (0.0, "same", 0.1, "equivalent"),
        (0.05, "same", 0.1, "equivalent"),
        (0.2, "same", 0.1, "inferior"),
        (-0.2, "same", 0.1, "inferior"),
        (0.11, "same", 0.1, "worse"),
        (0.2, "same", None, "worse"),
        (0.0, "same", None, "no margin"),
        (0.0, "higher", 0.001, "undecided"),
        (0.0, "same", 0.001, "undecided"),
    ],
)
def test_verdicts(mean: float, better: str, margin: float | None, wanted: str) -> None:
    assert verdict(mean, better, margin) == wanted


def test_a_departure_is_no_loss_between_two_approximations() -> None:
    assert verdict(0.2, "same", 0.1, reference=False) == "undecided"
    assert verdict(0.2, "same", None, reference=False) == "no margin"
    assert verdict(0.0, "same", 0.1, reference=False) == "equivalent"


def test_few_prompts_are_undecided_not_equal() -> None:
    assert verdict(0.0, margin=0.05, sd=0.5, n=16) == "undecided"
    assert verdict(0.0, "same", margin=0.05, sd=0.5, n=16) == "undecided"


def test_holm_guards_a_family() -> None:
    rng = np.random.default_rng(1)
    false = naive = 0
    for _ in range(250):
        family = {str(i): paired(rng.normal(size=30), np.zeros(30), range(30)) for i in range(6)}
        naive += any(r.p < 0.05 for r in family.values())
        false += any(r.verdict in ("better", "worse") for r in judge(family).values())
    assert false / 250 < 0.09
    assert naive / 250 > 0.18


@pytest.mark.parametrize("better", ["higher", "same"])
def test_false_non_inferiority_is_rare(better: str) -> None:
    """The worst null: the true loss equals the margin."""
    rng, false = np.random.default_rng(2), 0
    for _ in range(500):
        d = rng.normal(-0.3, 1.0, size=40) + np.zeros(40)
        result = judge({"x": paired(d, np.zeros(40), range(40), better=better, margin=0.3)})["x"]
        false += result.verdict in ("non-inferior", "equivalent")
    assert false / 500 < 0.08


def test_pairs_differ_less_than_clips() -> None:
    rng = np.random.default_rng(0)
    prompt = rng.normal(size=50)
    a, b = 10 + prompt + 0.1 * rng.normal(size=50), 10 + prompt + 0.1 * rng.normal(size=50)
    result = paired(a, b, range(50))
    assert result.sd < 0.3
    assert result.difference.low < 0 < result.difference.high
    assert result.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert result.p_wilcoxon == pytest.approx(stats.wilcoxon(a, b, method="asymptotic").pvalue)


def test_repeats_do_not_add_prompts() -> None:
    rng = np.random.default_rng(0)
    d = rng.normal(0.2, 1, size=30)
    once = paired(d, np.zeros(30), range(30))
    copied = paired(np.tile(d, 4), np.zeros(120), list(range(30)) * 4)
    assert copied.p == pytest.approx(once.p)
    assert copied.difference.low == pytest.approx(once.difference.low)
    assert (copied.difference.n, copied.samples) == (30, 120)


def test_mcnemar_for_single_clips_only() -> None:
    a = np.repeat([1.0, 0.0, 1.0, 0.0], [9, 2, 50, 20])
    b = np.repeat([0.0, 1.0, 1.0, 0.0], [9, 2, 50, 20])
    result = paired(a, b, range(81), binary=True, margin=0.05)
    assert result.test.startswith("McNemar")
    assert result.p == pytest.approx(stats.binomtest(9, 11, 0.5).pvalue)
    twice = paired(np.tile(a, 2), np.tile(b, 2), list(range(81)) * 2, binary=True, margin=0.05)
    assert "rule out McNemar" in twice.test
    assert twice.p > 2 * stats.binomtest(18, 22, 0.5).pvalue


def test_no_changed_answer_is_not_certainty() -> None:
    few = judge({"x": paired(np.ones(16), np.ones(16), range(16), binary=True, margin=0.02)})["x"]
    assert few.difference.value == 0
    assert few.difference.low < -0.05
    assert few.verdict == "undecided"
    assert few.p == 1
    many = judge({"x": paired(np.ones(300), np.ones(300), range(300), binary=True, margin=0.02)})["x"]
    assert many.verdict == "non-inferior"


def test_binary_interval_covers() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(600):
        both = rng.choice(4, size=60, p=[0.7, 0.15, 0.09, 0.06])
        a, b = np.isin(both, (0, 2)).astype(float), np.isin(both, (0, 3)).astype(float)
        d = paired(a, b, range(60), binary=True).difference
        hits += d.low <= 0.03 <= d.high
    assert 0.92 <= hits / 600 <= 0.98


def test_infinite_psnr() -> None:
    a = [math.inf, math.inf, 30.0, 31.0, math.nan, math.nan]
    b = [math.inf, 40.0, 29.0, 31.5, 20.0, math.nan]
    result = paired(a, b, range(6))
    # Both infinite: no difference. One infinite: ranked, not averaged. One missing: left out. Both missing: not asked.
    assert result.difference.value == pytest.approx((0 + 1 - 0.5) / 3)
    assert (result.samples, result.left_out) == (3, 2)
    assert result.p_wilcoxon == pytest.approx(stats.wilcoxon([1, -0.5, 100], method="exact").pvalue)
    nothing = paired([math.inf], [1.0], [0])
    assert nothing.samples == 0
    assert math.isnan(nothing.p)


def test_equal_clips_and_constant_shifts() -> None:
    same = judge({"x": paired(np.arange(20.0), np.arange(20.0), range(20), margin=0.1)})["x"]
    assert (same.p, same.p_wilcoxon, same.verdict) == (1, 1, "non-inferior")
    shifted = paired(np.arange(20.0) + 1, np.arange(20.0), range(20))
    assert shifted.p == pytest.approx(2 * 0.5**20)
    two = judge({"x": paired([2.0, 3.0], [1.0, 2.0], range(2))})["x"]
    assert two.verdict == "no margin"


def test_one_prompt_decides_nothing() -> None:
    result = judge({"x": paired([3.0], [1.0], [0], margin=0.1)})["x"]
    assert result.verdict == "undecided"
    assert result.needed is None
    assert result.to_dict()["p"] is None


def test_needed_prompts_decide() -> None:
    """What `needed` promises, kept: that many prompts show non-inferiority in 80 % of repetitions."""
    rng = np.random.default_rng(3)
    first: Paired = paired(rng.normal(0, 1, 400), np.zeros(400), range(400), margin=0.2)
    assert first.needed is not None
    assert 130 < first.needed < 190
    shown = 0
    for _ in range(400):
        d = rng.normal(0, first.sd, first.needed)
        r = judge({"x": paired(d, np.zeros(len(d)), range(len(d)), margin=0.2)})["x"]
        shown += r.verdict in ("non-inferior", "better")
    assert 0.73 <= shown / 400 <= 0.87


@pytest.mark.parametrize("n", [8, 25, 26, 200])
@pytest.mark.parametrize("ties", [False, True])
def test_wilcoxon_is_scipys(n: int, ties: bool) -> None:
    rng = np.random.default_rng(n)
    d = rng.integers(-3, 6, size=n).astype(float) if ties else rng.normal(0.2, 1, size=n)
    method = "exact" if n <= 25 and not ties else "asymptotic"
    wanted = stats.wilcoxon(d, zero_method="wilcox", correction=False, method=method).pvalue
    assert paired(d, np.zeros(n), range(n)).p_wilcoxon == pytest.approx(wanted)


@pytest.mark.parametrize(("prompts", "said"), [(4, "undecided"), (8, "undecided"), (400, "non-inferior")])
def test_a_few_prompts_that_agree_show_nothing(prompts, said):
    """Equal shares on four prompts have no spread, and an interval of width 0 would call them non-inferior."""
    same = [1.0] * prompts
    result = paired(same, same, range(prompts), margin=0.02)
    assert result.difference.low < 0 < result.difference.high
    assert judge({"attributes": result})["attributes"].verdict == said

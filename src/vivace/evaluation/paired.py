"""Paired differences of two contenders in one series: interval, tests, and a verdict against a pre-stated margin.

`No significant difference` is never a result here. A contender is non-inferior when the one-sided 95 % bound of its
loss lies within the margin; where any departure is a loss, both bounds must (two one-sided tests, Schuirmann 1987).
Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vivace.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    holm,
    plain,
    prompt_means,
    prompts_needed,
    prompts_to_bound,
    t_interval,
)

ALPHA = 0.05
EXACT = 25
"""Up to so many prompts the signed-rank test is exact."""
NO_SPREAD = 1e-12
VERDICTS = ("better", "non-inferior", "equivalent", "worse", "inferior", "undecided", "no margin")


@dataclass(frozen=True, kw_only=True)
class Paired:
    """One series of contender a against b. The difference is a minus b, over prompts."""

    difference: Interval
    bounds: tuple[float, float]
    """One-sided 95 % bounds from below and above, which verdicts rest on."""
    bootstrap: Interval
    """BCa, as a second opinion."""
    mean_a: float
    mean_b: float
    better: str
    margin: float | None
    p: float
    test: str
    p_wilcoxon: float
    sd: float
    """Of the prompts' differences."""
    samples: int
    left_out: int
    """Samples whose difference is infinite, or that only one side has a value for."""
    needed: int | None
    needed_for: str
    p_holm: float = math.nan
    verdict: str = "undecided"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "difference": self.difference.to_dict(),
            "verdict": self.verdict,
            "margin": self.margin,
            "p": plain(self.p),
            "p_holm": plain(self.p_holm),
            "test": self.test,
            "needed": self.needed,
            "needed_for": self.needed_for,
            "bounds": [plain(b) for b in self.bounds],
            "bootstrap": self.bootstrap.to_dict(),
            "p_wilcoxon": plain(self.p_wilcoxon),
            "how": self.difference.how,
            "a": plain(self.mean_a),
            "b": plain(self.mean_b),
            "samples": self.samples,
            "left_out": self.left_out,
        }


def paired(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    prompts: Sequence[int] | np.ndarray,
    *,
    better: str = "higher",
    margin: float | None = None,
    binary: bool = False,
) -> Paired:
    """Compare two columns of the same samples.

    Args:
        a, b: values of the candidate and the reference, sample by sample. Both infinite counts as no difference.
        prompts: the prompt of each sample.
        better: `higher`, `lower` or `same`.
        margin: positive, in the unit of the values; None: no claim can be made.
        binary: whether all values are 0 or 1. Then the interval is Agresti and Min's (2005), which stays open when no
            answer changed, and the test is McNemar's exact one where every prompt has one clip.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        d = np.where(np.isinf(first) & (first == second), 0.0, first - second)
    numbers = np.asarray(prompts)
    means, _ = prompt_means(d, numbers)
    used = np.isfinite(d)
    single = len(np.unique(numbers[used])) == int(used.sum())
    if binary:
        difference, low, high, sd = _binary_interval(means)
    else:
        narrow = t_interval(means, 1 - 2 * ALPHA)
        difference, low, high = t_interval(means), narrow.low, narrow.high
        sd = float(np.std(means, ddof=1)) if len(means) > 1 else math.nan
    spread = sd
    if not binary and sd <= NO_SPREAD and _are_shares(first, second):
        # A few prompts that agree do not show that every prompt would: the interval stays open, as for binary values.
        difference, low, high, spread = _binary_interval(means)
    if binary and single:
        p, test = _mcnemar(d[used]), "McNemar, exact"
    elif binary:
        p, test = (
            _t_p(difference.value, sd, len(means)),
            "t on prompt means (several clips a prompt rule out McNemar)",
        )
    else:
        p, test = _mean_p(means, sd), "t on prompt means"
    needed, needed_for = _needed(difference.value, spread, better, margin)
    return Paired(
        difference=difference,
        bounds=(low, high),
        bootstrap=bootstrap_interval(means),
        mean_a=_mean(first[used], numbers[used]),
        mean_b=_mean(second[used], numbers[used]),
        better=better,
        margin=margin,
        p=p,
        test=test,
        p_wilcoxon=_wilcoxon(d, numbers),
        sd=spread,
        samples=int(used.sum()),
        left_out=int((~used & ~(np.isnan(first) & np.isnan(second))).sum()),
        needed=needed,
        needed_for=needed_for,
    )


def judge(family: Mapping[str, Paired], *, reference: bool = True) -> dict[str, Paired]:
    """The verdicts of one family of series, with p values adjusted for its size.

    Args:
        reference: whether b is the exact run. Where a value has no better direction, only a departure from the exact
            run is a loss; between two approximations the verdict is then `equivalent` or `undecided`.
    """
    adjusted = holm([r.p for r in family.values()])
    return {
        name: replace(result, p_holm=p, verdict=verdict(replace(result, p_holm=p), reference=reference))
        for (name, result), p in zip(family.items(), adjusted, strict=True)
    }


def verdict(result: Paired, *, reference: bool = True) -> str:
    """One of `VERDICTS` for a result whose `p_holm` is known.

    inferior: the loss is beyond the margin. better, worse: the difference is significant in its family. non-inferior,
    equivalent: the loss is within the margin (a small but certain loss within it is still non-inferior). undecided:
    more prompts are needed.
    """
    low, high = result.bounds
    margin, certain = result.margin, result.p_holm < ALPHA
    if result.better == "same":
        if margin is not None and -margin < low and high < margin:
            return "equivalent"
        if not reference:
            return "undecided" if margin is not None else "no margin"
        if margin is not None and (low > margin or high < -margin):
            return "inferior"
        return "worse" if certain else ("undecided" if margin is not None else "no margin")
    if result.better == "lower":
        low, high = -high, -low
    gain = result.difference.value if result.better == "higher" else -result.difference.value
    if margin is not None and high < -margin:
        return "inferior"
    if certain and gain > 0:
        return "better"
    if margin is not None and low > -margin:
        return "non-inferior"
    if certain:
        return "worse"
    return "undecided" if margin is not None else "no margin"


def _are_shares(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether all values lie in [0, 1], so that one prompt can move the mean by 1 / n at most."""
    both = np.concatenate([first, second])
    both = both[~np.isnan(both)]
    return bool(both.size) and bool(np.all((both >= 0.0) & (both <= 1.0)))


def _binary_interval(means: np.ndarray) -> tuple[Interval, float, float, float]:
    """95 % interval, 90 % bounds and the adjusted spread of differences of shares, two half pairs added each way."""
    from scipy.special import stdtrit

    n = len(means)
    value = float(np.mean(means)) if n else math.nan
    if n < 2:
        return (
            Interval(value, math.nan, math.nan, n, "too few prompts for an interval"),
            math.nan,
            math.nan,
            math.nan,
        )
    centre = float(means.sum()) / (n + 2)
    sd = math.sqrt((float((means**2).sum()) + 1) / (n + 2) - centre**2)
    error = sd / math.sqrt(n + 2)
    wide, narrow = (float(stdtrit(n - 1, q)) * error for q in (1 - ALPHA / 2, 1 - ALPHA))
    # The shift towards 0 must not push the value out of its own interval.
    low, high = min(max(centre - wide, -1.0), value), max(min(centre + wide, 1.0), value)
    how = "Agresti-Min interval on prompts"
    return Interval(value, low, high, n, how), min(centre - narrow, value), max(centre + narrow, value), sd


def _mcnemar(d: np.ndarray) -> float:
    from scipy.stats import binomtest

    gains, losses = int((d > 0).sum()), int((d < 0).sum())
    return float(binomtest(gains, gains + losses, 0.5).pvalue) if gains + losses else 1.0


def _t_p(mean: float, sd: float, n: int) -> float:
    from scipy.special import stdtr

    if n < 2:
        return math.nan
    return float(2 * stdtr(n - 1, -abs(mean) / (sd / math.sqrt(n))))


def _mean_p(means: np.ndarray, sd: float) -> float:
    n = len(means)
    if n < 2:
        return math.nan
    if sd <= 1e-12 * float(np.abs(means).max()):
        # Equal differences have no spread to judge by; their sign still says something.
        return 1.0 if not means.any() else min(1.0, 2 * 0.5**n)
    return _t_p(float(np.mean(means)), sd, n)


def _wilcoxon(d: np.ndarray, prompts: np.ndarray) -> float:
    """Signed-rank test on prompts; exact for few without ties. An infinite difference is one of the largest rank."""
    from scipy.special import ndtr

    finite = np.abs(d[np.isfinite(d)])
    largest = 2 * float(finite.max()) + 1 if finite.size else 1.0
    means, _ = prompt_means(np.where(np.isinf(d), np.sign(d) * largest, d), prompts)
    means = means[means != 0]
    n = len(means)
    if not n:
        return 1.0 if d.size else math.nan
    _, place, ties = np.unique(np.abs(means), return_inverse=True, return_counts=True)
    if n <= EXACT and ties.max() == 1:
        from scipy.stats import wilcoxon

        result: Any = wilcoxon(means, method="exact")
        return float(result.pvalue)
    ranks = float((np.cumsum(ties) - (ties - 1) / 2)[place][means > 0].sum())
    variance = n * (n + 1) * (2 * n + 1) / 24 - float((ties**3 - ties).sum()) / 48
    return float(2 * ndtr(-abs(ranks - n * (n + 1) / 4) / math.sqrt(variance)))


def _needed(difference: float, sd: float, better: str, margin: float | None) -> tuple[int | None, str]:
    if not math.isfinite(sd):
        return None, ""
    if margin is None:
        return prompts_needed(difference, sd), "80 % power to see a difference of this size"
    sides = 2 if better == "same" else 1
    what = "equivalence" if sides == 2 else "non-inferiority"
    return prompts_to_bound(margin, sd, sides=sides), f"80 % power to show {what} when there is no difference"


def _mean(values: np.ndarray, prompts: np.ndarray) -> float:
    means, _ = prompt_means(values, prompts)
    return float(np.mean(means)) if len(means) else math.nan


__all__ = ["ALPHA", "VERDICTS", "Paired", "judge", "paired", "verdict"]

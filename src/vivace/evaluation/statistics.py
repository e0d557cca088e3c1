"""Intervals and tests whose unit is the prompt.

Clips of one prompt resemble each other, so values are averaged over the repeats of a prompt first and everything else
counts prompts. An interval over clips would be too short (Miller 2024, arXiv 2411.00640); by how much is measured in
`benchmarks/interval_coverage.py`. Verdicts rest on the t distribution, so that interval, test and power agree; the
bootstrap stands beside them. Confidence levels are two-sided unless a name says otherwise. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from vivace.evaluation.record import Estimate

DRAWS = 10_000
"""Bootstrap draws."""
FEW = 30
"""Below so many prompts an interval comes from the t distribution, because the bootstrap is then too short."""
FEW_RUNS = 10
"""Below so many timed runs a ratio's interval comes from the t distribution of logarithms."""


@dataclass(frozen=True)
class Interval:
    """A value with its interval; `low` and `high` are NaN where there are too few values for one."""

    value: float
    low: float
    high: float
    n: int
    """Prompts, or runs."""
    how: str = ""

    def to_dict(self) -> dict[str, Any]:
        """`{"value", "low", "high", "n"}` in plain JSON: None for NaN, the words `inf` and `-inf`."""
        return {"value": plain(self.value), "low": plain(self.low), "high": plain(self.high), "n": self.n}


def plain(value: float | None) -> float | str | None:
    """A number that strict JSON can hold: None for NaN, the words `inf` and `-inf`."""
    if value is None or math.isnan(value):
        return None
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return float(value)


def prompt_means(
    values: Sequence[float] | np.ndarray, prompts: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, int]:
    """Mean over the repeats of each prompt.

    Args:
        values: one number for each sample; NaN and infinities are left out.
        prompts: the prompt of each sample.

    Returns:
        One mean for each prompt that has a finite value, in order of the prompts' numbers; the number of values that
        were left out.
    """
    table = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(table)
    _, place = np.unique(np.asarray(prompts)[finite], return_inverse=True)
    sums = np.bincount(place, table[finite]) if place.size else np.zeros(0)
    return sums / np.bincount(place) if place.size else sums, int((~finite).sum())


def t_interval(means: np.ndarray, confidence: float = 0.95) -> Interval:
    """Student's interval of the mean of prompt means."""
    from scipy.special import stdtrit

    n = len(means)
    value = float(np.mean(means)) if n else math.nan
    if n < 2:
        return Interval(value, math.nan, math.nan, n, "too few prompts for an interval")
    reach = float(stdtrit(n - 1, (1 + confidence) / 2)) * float(np.std(means, ddof=1)) / math.sqrt(n)
    return Interval(value, value - reach, value + reach, n, "t interval on prompt means")


def bootstrap_interval(
    means: np.ndarray, confidence: float = 0.95, *, bca: bool = True, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Cluster bootstrap of the mean: prompts are drawn with all their repeats.

    Args:
        means: one value for each prompt.
        bca: corrected for bias and skewness (Efron 1987); plain percentiles otherwise.
    """
    from scipy.special import ndtr, ndtri

    n = len(means)
    value = float(np.mean(means)) if n else math.nan
    if n < 2:
        return Interval(value, math.nan, math.nan, n, "too few prompts for an interval")
    drawn = resampling(n, draws, seed) @ np.asarray(means, dtype=np.float64)
    levels = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    if bca and np.ptp(means) > 0:
        below = (np.sum(drawn < value) + 0.5 * np.sum(drawn == value)) / draws
        bias = float(ndtri(np.clip(below, 0.5 / draws, 1 - 0.5 / draws)))
        left = means - value
        skew = float(np.sum(left**3) / (6 * np.sum(left**2) ** 1.5))
        shifted = bias + ndtri(levels)
        levels = ndtr(bias + shifted / (1 - skew * shifted))
    low, high = np.quantile(drawn, levels)
    kind = "BCa" if bca else "percentile"
    return Interval(value, float(low), float(high), n, f"{kind} bootstrap over prompts, {draws} draws")


@lru_cache(maxsize=4)
def resampling(n: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Weights `(draws, n)` of a bootstrap of the mean; every row sums to 1.

    Series of equal length get the same weights, so that they are resampled together.
    """
    rng = np.random.default_rng(seed)
    picks = rng.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
    counts = np.bincount(picks.ravel(), minlength=draws * n).reshape(draws, n)
    weights = counts.astype(np.float64) / n
    weights.flags.writeable = False
    return weights


def share_interval(means: np.ndarray, confidence: float = 0.95) -> Interval:
    """Interval of a share of yes/no answers (Wilson 1927), which stays open when all answers are equal.

    With several repeats the number of prompts is corrected for what the repeats add: the effective number is that of
    independent answers with the same standard error.
    """
    from scipy.special import stdtrit

    n = len(means)
    p = float(np.mean(means)) if n else math.nan
    if n < 2:
        return Interval(p, math.nan, math.nan, n, "too few prompts for an interval")
    variance = float(np.var(means, ddof=1)) / n
    effective = max(p * (1 - p) / variance, 1.0) if variance > 0 and 0 < p < 1 else float(n)
    z2 = float(stdtrit(n - 1, (1 + confidence) / 2)) ** 2 / effective
    centre = (p + z2 / 2) / (1 + z2)
    reach = math.sqrt(z2 * p * (1 - p) + z2**2 / 4) / (1 + z2)
    low, high = max(centre - reach, 0.0), min(centre + reach, 1.0)
    return Interval(p, min(low, p), max(high, p), n, "Wilson interval on prompts")


def mean_interval(
    means: np.ndarray, confidence: float = 0.95, *, binary: bool = False, seed: int = 0
) -> Interval:
    """The interval that a table shows: Wilson for yes/no answers, t below `FEW` prompts, else the BCa bootstrap."""
    if binary:
        return share_interval(means, confidence)
    if len(means) < FEW:
        return t_interval(means, confidence)
    return bootstrap_interval(means, confidence, seed=seed)


def estimate(
    values: Sequence[float],
    prompts: Sequence[int],
    *,
    better: str = "higher",
    binary: bool = False,
    seed: int = 0,
) -> Estimate:
    """What a record keeps of one series.

    Args:
        values: one number for each sample. NaN: does not apply. Infinite (PSNR of equal clips): left out of the mean,
            but not of the median and the worst.
        prompts: the prompt of each sample.
        better: `higher`, `lower` or `same`, which decides what the worst is (`same`: there is none).
        binary: whether every value is 0 or 1.
    """
    means, left_out = prompt_means(values, prompts)
    found = mean_interval(means, binary=binary, seed=seed)
    defined = [float(v) for v in values if not math.isnan(v)]
    worst = {"higher": min, "lower": max}.get(better)
    return Estimate(
        mean=_finite(found.value),
        low=_finite(found.low),
        high=_finite(found.high),
        prompts=found.n,
        samples=len(values) - left_out,
        median=_median(defined),
        worst=worst(defined) if worst and defined else None,
        left_out=left_out,
        how=found.how,
    )


def holm(ps: Sequence[float]) -> list[float]:
    """P values adjusted for the size of the family (Holm 1979). NaN stays NaN and does not count."""
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    out, largest = [math.nan] * len(ps), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * ps[index]))
        out[index] = largest
    return out


def prompts_needed(
    effect: float, sd: float, *, power: float = 0.8, alpha: float = 0.05, sides: int = 2, exact: bool = True
) -> int | None:
    """Prompts that show a mean difference of `effect` with the given power.

    Normal approximation, with Guenther's term for the t distribution where `exact` (Guenther 1981).

    Returns:
        None where no number of prompts would do (the effect is 0 or unknown).
    """
    from scipy.special import ndtri

    if not (math.isfinite(effect) and math.isfinite(sd)) or effect == 0:
        return None
    z = float(ndtri(1 - alpha / sides))
    n = ((z + float(ndtri(power))) * sd / abs(effect)) ** 2 + (z * z / 2 if exact else 0)
    return max(2, math.ceil(n - 1e-9))


def prompts_to_bound(
    margin: float, sd: float, *, sides: int, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """Prompts that show a true difference of nil to lie within the margin.

    Args:
        sides: 1 for non-inferiority, 2 for equivalence, where both tests must succeed.
    """
    return prompts_needed(margin, sd, power=power if sides == 1 else (1 + power) / 2, alpha=alpha, sides=1)


def ratio_of_medians(
    base: Sequence[float],
    own: Sequence[float],
    base_ids: Sequence[str] = (),
    own_ids: Sequence[str] = (),
    *,
    confidence: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Median of `base` over median of `own`: a speed-up, with an interval that is symmetric in the logarithm.

    Args:
        base, own: seconds of single runs, all positive.
        base_ids, own_ids: the sample that each run made, `<prompt>.<k>`. Where both made the same samples, prompts are
            drawn for both together; otherwise runs are drawn for each alone.

    Below `FEW_RUNS` runs (or prompts) a bootstrap of a median knows too few values, and the interval is Student's
    (Welch's when unpaired) for the logarithms.
    """
    first, second = np.log(np.asarray(base, dtype=np.float64)), np.log(np.asarray(own, dtype=np.float64))
    n = min(len(first), len(second))
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0, "no runs")
    ratio = float(np.median(first) - np.median(second))
    if (
        paired := len(base_ids) == len(first)
        and sorted(base_ids) == sorted(own_ids)
        and len(set(base_ids)) > 1
    ):
        order = (
            np.argsort(np.asarray(base_ids), kind="stable"),
            np.argsort(np.asarray(own_ids), kind="stable"),
        )
        first, second = first[order[0]], second[order[1]]
        prompts = np.unique([sorted(base_ids)[i].partition(".")[0] for i in range(n)], return_inverse=True)[1]
        n = int(prompts.max()) + 1
        if n < FEW_RUNS:
            reach, how = (
                _t_reach(prompt_means(first - second, prompts)[0], None, confidence),
                "t interval of log ratios",
            )
        else:
            drawn = _medians_by_prompt(first, prompts, draws, seed) - _medians_by_prompt(
                second, prompts, draws, seed
            )
            reach, how = _reach(drawn, ratio, confidence), f"bootstrap over prompts, {draws} draws"
    elif n < FEW_RUNS:
        reach, how = _t_reach(first, second, confidence), "Welch interval of log seconds"
    else:
        rng = np.random.default_rng(seed)
        drawn = np.median(first[rng.integers(len(first), size=(draws, len(first)))], axis=1)
        drawn = drawn - np.median(second[rng.integers(len(second), size=(draws, len(second)))], axis=1)
        reach, how = _reach(drawn, ratio, confidence), f"bootstrap over runs, {draws} draws"
    how = f"ratio of medians; {how}" + ("" if n > 1 else ": too few runs") + (", paired" if paired else "")
    low, high = (
        (math.exp(ratio - reach), math.exp(ratio + reach)) if math.isfinite(reach) else (math.nan, math.nan)
    )
    return Interval(math.exp(ratio), low, high, n, how)


def median_interval(
    values: Sequence[float], *, confidence: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Interval of the median of timed runs, symmetric in the logarithm; Student's below `FEW_RUNS` runs."""
    logs = np.log(np.asarray(values, dtype=np.float64))
    n = len(logs)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0, "no runs")
    middle = float(np.median(logs))
    if n < FEW_RUNS:
        reach, how = _t_reach(logs, None, confidence), "median; t interval of log seconds"
    else:
        drawn = np.median(logs[np.random.default_rng(seed).integers(n, size=(draws, n))], axis=1)
        reach, how = _reach(drawn, middle, confidence), f"median; bootstrap over runs, {draws} draws"
    low, high = (
        (math.exp(middle - reach), math.exp(middle + reach)) if math.isfinite(reach) else (math.nan, math.nan)
    )
    return Interval(float(np.median(values)), low, high, n, how)


def _medians_by_prompt(values: np.ndarray, prompts: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Medians of the runs of drawn prompts; the same prompts for the same seed."""
    members = [values[prompts == p] for p in range(int(prompts.max()) + 1)]
    picks = np.random.default_rng(seed).integers(len(members), size=(draws, len(members)))
    if all(len(m) == len(members[0]) for m in members):
        return np.median(np.stack(members)[picks].reshape(draws, -1), axis=1)
    return np.array([np.median(np.concatenate([members[i] for i in row])) for row in picks])


def _reach(drawn: np.ndarray, centre: float, confidence: float) -> float:
    """Half the width of a symmetric bootstrap interval."""
    # A drawn median takes few values, which makes each of its two quantiles alone too rough.
    return float(np.quantile(np.abs(drawn - centre), confidence))


def _t_reach(first: np.ndarray, second: np.ndarray | None, confidence: float) -> float:
    from scipy.special import stdtrit

    parts = [np.var(v, ddof=1) / len(v) for v in (first, second) if v is not None and len(v) > 1]
    if len(parts) < (1 if second is None else 2):
        return math.nan
    total = float(sum(parts))
    if total == 0:
        return 0.0
    sizes = [len(v) for v in (first, second) if v is not None]
    freedom = total**2 / sum(p**2 / (m - 1) for p, m in zip(parts, sizes, strict=True))
    return float(stdtrit(freedom, (1 + confidence) / 2)) * math.sqrt(total)


def _median(values: list[float]) -> float | None:
    if not values:
        return None
    ordered, half = sorted(values), len(values) // 2
    # Infinities: the mean of two of them is one, and numpy would warn.
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


__all__ = [
    "DRAWS",
    "FEW",
    "Interval",
    "bootstrap_interval",
    "estimate",
    "holm",
    "mean_interval",
    "median_interval",
    "plain",
    "prompt_means",
    "prompts_needed",
    "prompts_to_bound",
    "ratio_of_medians",
    "resampling",
    "share_interval",
    "t_interval",
]

"""What a row of the board is held against: the noise floor, other seeds, and the exact run with fewer steps.

A cache that halves the FLOPs has to beat half the steps, not the full run. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vivace.core.errors import VivaceError
from vivace.evaluation.compare import SeriesTable, check_comparable, comparable_series, compare, match
from vivace.evaluation.paired import Paired, judge, paired
from vivace.evaluation.record import Record
from vivace.evaluation.statistics import plain, prompt_means, resampling
from vivace.evaluation.store import Store

DRAWS = 4000
NEAR = 0.1
"""A fewer-step run within this share of a contender's FLOPs is its control; else two neighbours are interpolated."""


def prompt_table(store: Store, record: Record, name: str) -> dict[int, float]:
    """Finite prompt means of one series of a record, empty where single values were not kept or cannot be read."""
    if not record.samples:
        return {}
    try:
        table = store.samples(record)
    except VivaceError:
        return {}
    column = table.columns.get(name)
    if column is None:
        return {}
    values, prompts = np.asarray(column, dtype=np.float64), np.asarray(table.prompt)
    # A prompt with one infinite clip has no mean that could be compared with another contender's.
    spoilt = np.unique(prompts[np.isinf(values)])
    kept = ~np.isin(prompts, spoilt) & np.isfinite(values)
    means, _ = prompt_means(values[kept], prompts[kept])
    return dict(zip(np.unique(prompts[kept]).tolist(), means.tolist(), strict=True))


def normalised(
    store: Store, record: Record, floor: Record, seed: Record
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Fidelity between the anchors: `(m - seed) / (floor - seed)`.

    1 is as close as the noise floor, 0 as far as another seed. Intervals draw prompts for all three at once.

    Returns:
        Values by series, and reasons for the series that have none.
    """
    shared_f, _ = comparable_series(record, floor)
    shared_s, _ = comparable_series(record, seed)
    out: dict[str, dict[str, Any]] = {}
    reasons: dict[str, str] = {}
    for name in (n for n, g in shared_f.items() if g == "fidelity" and n in shared_s):
        tables = [prompt_table(store, r, name) for r in (record, floor, seed)]
        common = sorted(set(tables[0]) & set(tables[1]) & set(tables[2]))
        if len(common) < 2:
            reasons[name] = "the anchors have no finite values for the same prompts"
            continue
        m, f, s = (np.array([t[p] for p in common]) for t in tables)
        above, gap = (resampling(len(common), DRAWS) @ np.stack([m - s, f - s], axis=1)).T
        if gap.min() <= 0 <= gap.max():
            reasons[name] = "the noise floor and another seed are too close to tell apart"
            continue
        low, high = np.quantile(above / gap, [0.025, 0.975])
        value = float((m - s).mean() / (f - s).mean())
        out[name] = {
            "value": plain(value),
            "low": plain(float(low)),
            "high": plain(float(high)),
            "n": len(common),
        }
    return out, reasons


def matched(
    store: Store, record: Record, steps: Sequence[Record], exact: Record | None, series: SeriesTable
) -> tuple[dict[str, Any] | None, str]:
    """A contender against the exact run with as few steps as cost the same FLOPs.

    Args:
        steps: fewer-step runs of the same task, model and machine.
        exact: the full run; an upper neighbour for absolute quality.

    Returns:
        The control and the paired results, or None and the reason.
    """
    flops = record.counts.get("flops", 0.0)
    if not flops:
        return None, "its FLOPs were not counted"
    ladder = sorted((r for r in steps if r.counts.get("flops")), key=lambda r: r.counts["flops"])
    if not ladder:
        return None, "no run with fewer steps was made"
    nearest = min(ladder, key=lambda r: abs(math.log(r.counts["flops"] / flops)))
    if abs(nearest.counts["flops"] / flops - 1) <= NEAR:
        found = compare(record, nearest, store, series=series)
        results, share = found.results(), nearest.counts["flops"] / flops
        note = f"{nearest.contender.name} costs {share:.3g} times its FLOPs"
        return _control(nearest.contender.name, [nearest], results, note, share), ""
    if exact is not None and exact.counts.get("flops", 0.0) > ladder[-1].counts["flops"]:
        ladder.append(exact)
    below = [r for r in ladder if r.counts["flops"] < flops]
    above = [r for r in ladder if r.counts["flops"] >= flops]
    if not below or not above:
        side = "less" if not below else "more"
        return None, f"it costs {side} than every run with fewer steps"
    low, high = below[-1], above[0]
    results = _between(store, record, low, high, series)
    if not results:
        return None, f"{low.contender.name} and {high.contender.name} have no series with it in common"
    name = f"{low.contender.name} .. {high.contender.name}"
    note = f"interpolated clip by clip between {low.contender.name} and {high.contender.name}, over log FLOPs"
    return _control(name, [low, high], results, note, 1.0), ""


def _between(
    store: Store, record: Record, low: Record, high: Record, series: SeriesTable
) -> dict[str, Paired]:
    first, last = (math.log(r.counts["flops"]) for r in (low, high))
    share = (math.log(record.counts["flops"]) - first) / (last - first)
    for other in (low, high):
        check_comparable(record, other)
    shared = comparable_series(record, low)[0].items() & comparable_series(record, high)[0].items()
    mine, one, two = (store.samples(r) for r in (record, low, high))
    a, b, _ = match(mine, one)
    pairs, c, _ = match(mine, two)
    here, there = dict(zip(a, b, strict=True)), dict(zip(pairs, c, strict=True))
    rows = [i for i in a if i in there]
    number = [mine.prompt[i] for i in rows]
    out: dict[str, Paired] = {}
    for group in ("fidelity", "absolute"):
        if group == "fidelity" and "exact" in (low.contender.kind, high.contender.kind):
            # The exact run is no distance from itself: there is nothing to interpolate towards.
            continue
        family = {}
        for name in sorted(n for n, g in shared if g == group):
            if not all(name in t.columns for t in (mine, one, two)):
                continue
            x = np.array([one.columns[name][here[i]] for i in rows])
            y = np.array([two.columns[name][there[i]] for i in rows])
            with np.errstate(invalid="ignore"):
                control = np.where(x == y, x, (1 - share) * x + share * y)
            about = series.get(name)
            result = paired(
                [mine.columns[name][i] for i in rows],
                control,
                number,
                better=about["better"] if about else "same",
                margin=about["margin"] if about else None,
            )
            if result.samples:
                family[name] = result
        out |= judge(family, reference=False)
    return out


def _control(
    name: str, records: Sequence[Record], results: Mapping[str, Paired], note: str, share: float
) -> dict[str, Any]:
    return {
        "contender": name,
        "by": "flops",
        "rows": [r.id for r in records],
        "share": share,
        "note": note,
        "paired": {n: r.to_dict() for n, r in results.items()},
    }


__all__ = ["NEAR", "matched", "normalised", "prompt_table"]

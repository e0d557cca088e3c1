"""The board's fronts: cost against quality within one task, model and machine. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from vivace.evaluation.board_controls import prompt_table
from vivace.evaluation.compare import SeriesTable, counted, peak
from vivace.evaluation.pareto import (
    Curve,
    ParetoError,
    Point,
    area_between,
    area_dict,
    clearly_dominated,
    curves_by_group,
    front,
    speed_up_at_quality,
)
from vivace.evaluation.record import Record
from vivace.evaluation.statistics import Interval, median_interval
from vivace.evaluation.store import Store

COSTS = ("seconds", "nfe", "flops", "peak_bytes")
SERIES = ("attributes", "psnr", "jod", "lpips_alex")
STEPS = "steps"
"""Name of the curve of the exact run with fewer steps, whatever group its contenders name."""
DRAWS = 500


def fronts(
    store: Store, records: Sequence[Record], series: SeriesTable, wanted: Sequence[str] = SERIES
) -> list[dict[str, Any]]:
    """Fronts, curves and areas for every cost and wanted series that at least two contenders have.

    Args:
        records: of one task, model and environment. Floor and seed runs are anchors, not contenders, and stay out.
        wanted: names of series.
    """
    contenders = {r.id: r for r in records if r.contender.kind not in ("floor", "seed")}
    costs = {c: {i: x for i, r in contenders.items() if (x := cost_of(r, c)) is not None} for c in COSTS}
    out = []
    for name in wanted:
        about = series.get(name)
        if about is None or about["better"] == "same":
            continue
        qualities = {i: q for i, r in contenders.items() if (q := _quality(r, name, about)) is not None}
        tables = {i: prompt_table(store, contenders[i], name) for i in qualities}
        for cost, places in costs.items():
            points = {
                i: Point(name=i, x=places[i], y=y, prompts=tables[i])
                for i, y in qualities.items()
                if i in places
            }
            if len(points) >= 2:
                out.append(_front(contenders, points, cost, name, about["better"] == "higher"))
    return out


def cost_of(record: Record, cost: str) -> Interval | None:
    """One of `COSTS` of a record; None where it was not measured."""
    if cost == "seconds":
        total = record.timing.stages.get("total") if record.timing else None
        return median_interval(total.values) if total and min(total.values) > 0 else None
    number = peak(record) if cost == "peak_bytes" else record.counts.get(cost)
    return counted(float(number)) if number else None


def group_of(record: Record) -> str:
    """The curve a contender lies on; empty for one that stands alone."""
    return STEPS if record.contender.kind in ("steps", "exact") else record.contender.group


def _quality(record: Record, name: str, about: Mapping[str, Any]) -> Interval | None:
    if record.quality is None or (about["group"] == "fidelity" and record.contender.kind == "exact"):
        return None
    found = getattr(record.quality, about["group"]).get(name)
    if found is None or found.mean is None:
        return None
    low, high = (math.nan if v is None else v for v in (found.low, found.high))
    return Interval(found.mean, low, high, found.prompts)


def _front(
    contenders: Mapping[str, Record], points: Mapping[str, Point], cost: str, name: str, higher: bool
) -> dict[str, Any]:
    members: dict[str, list[Point]] = {}
    for row, point in points.items():
        if group := group_of(contenders[row]):
            members.setdefault(group, []).append(point)
    curves = curves_by_group(members)
    placed = list(points.values())
    first = next(iter(contenders.values()))
    return {
        "task": first.task.name,
        "environment": str(first.environment.get("fingerprint", "")),
        "model": first.model.name,
        "cost": cost,
        "series": name,
        "points": [
            {
                "row": p.name,
                "x": p.x.to_dict(),
                "y": p.y.to_dict(),
                "front": on,
                "dominated": clearly_dominated(p, placed, higher=higher),
            }
            for p, on in zip(placed, front(placed, higher=higher), strict=True)
        ],
        "curves": [{"group": g, "rows": [p.name for p in c.points]} for g, c in curves.items()],
        "areas": _areas(curves, cost, higher),
    }


def _areas(curves: Mapping[str, Curve], cost: str, higher: bool) -> list[dict[str, Any]]:
    """Areas of all pairs of curves, the fewer-step curve always second."""
    out = []
    for one, two in combinations(sorted(curves, key=lambda g: (g == STEPS, g)), 2):
        a, b = curves[one], curves[two]
        try:
            entry = area_dict(one, two, area_between(a, b))
        except ParetoError:
            continue
        if two == STEPS and cost in ("seconds", "flops"):
            bottom, top = max(min(a.y), min(b.y)), min(max(a.y), max(b.y))
            if top > bottom:
                level = float(bottom + top) / 2
                gain = speed_up_at_quality(a, b, level, higher=higher, draws=DRAWS)
                entry["at_equal_quality"] = {"quality": level, "ratio": gain.to_dict()}
        out.append(entry)
    return out


__all__ = ["COSTS", "SERIES", "STEPS", "cost_of", "fronts", "group_of"]

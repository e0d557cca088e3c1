"""From finished shards to what a record holds: samples, estimates with intervals, counts, and the code's identity."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from vivace.core.errors import ConfigError
from vivace.evaluation.metrics.base import Metric, MetricCard, Scope, registry
from vivace.evaluation.record import Estimate, Kind, MetricRef, Quality, Samples
from vivace.evaluation.shards import Shard
from vivace.evaluation.statistics import estimate
from vivace.evaluation.task import MetricUse

THE_REFERENCE = "the exact run is the reference."
LEFT_OUT = "left out by --metrics."


def samples_of(shards: Sequence[Shard]) -> Samples:
    """The values of all samples; a series that a shard does not have is NaN there, never zero."""
    names = sorted({n for s in shards for n in s.columns})
    return Samples(
        ids=tuple(i for s in shards for i in s.ids),
        prompt=tuple(p for s in shards for p in s.prompt),
        k=tuple(k for s in shards for k in s.k),
        seed=tuple(v for s in shards for v in s.seed),
        columns={n: tuple(v for s in shards for v in _column(s, n)) for n in names},
        hashes=tuple(h for s in shards for h in s.hashes),
        curves={n: tuple(map(tuple, rows)) for s in shards for n, rows in s.curves.items()},
    )


def quality_of(
    metrics: Sequence[MetricUse],
    kind: Kind,
    shards: Sequence[Shard],
    baseline: Sequence[Shard],
    device: Any,
    chosen: Sequence[str] = (),
) -> Quality:
    """Estimates of all series with their intervals, and the reason for everything that was not measured.

    Args:
        metrics: the task's.
        kind: of the contender.
        shards: all of the contender's.
        baseline: the exact run's shards of the same numbers; empty for the exact run itself.
        device: of the metrics.
        chosen: names of those that were measured; empty: all.
    """
    groups: dict[str, dict[str, Estimate]] = {"fidelity": {}, "absolute": {}, "distribution": {}}
    used, skipped = [], {}
    for use in metrics:
        if chosen and use.name not in chosen:
            skipped[use.name] = LEFT_OUT
            continue
        metric = registry[use.name](device)
        card = metric.card
        if card.version != use.version:
            skipped[card.name] = f"the task wants version {use.version}, here is version {card.version}."
            continue
        reasons = (shard.skipped.get(card.name, "") for shard in shards)
        if why := metric.missing() or next(filter(None, reasons), ""):
            skipped[card.name] = why
            continue
        if card.scope is Scope.SET:
            found, why = _distances(metric, shards, baseline)
        else:
            found, why = _means(card, kind, shards)
        if why:
            skipped[card.name] = why
        if found:
            groups[card.group.value] |= found
            used.append(_reference(card, tuple(found)))
    reference = "" if kind == "exact" else "exact"
    return Quality(metrics=tuple(used), skipped=skipped, reference=reference, **groups)


def mean_counts(shards: Sequence[Shard]) -> dict[str, float]:
    """Counts of one clip: the mean over all clips of the shards."""
    weights = [len(s.ids) for s in shards]
    return {n: float(np.average([s.counts[n] for s in shards], weights=weights)) for n in shards[0].counts}


def code() -> dict[str, Any]:
    """Version and, where there is a checkout, commit and whether the sources differ from it.

    `VIVACE_COMMIT` names the commit where the sources were copied without their history.
    """
    import vivace

    out: dict[str, Any] = {"version": vivace.__version__, "commit": os.environ.get("VIVACE_COMMIT", "")}
    root = Path(vivace.__file__).parents[2]
    if not out["commit"] and (root / ".git").exists():
        with suppress(OSError, subprocess.CalledProcessError):
            out["commit"] = _git(root, "rev-parse", "HEAD")
            out["dirty"] = bool(_git(root, "status", "--porcelain", "--", "src"))
    return out


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _column(shard: Shard, name: str) -> Sequence[float]:
    return shard.columns.get(name) or [math.nan] * len(shard.ids)


def _means(card: MetricCard, kind: Kind, shards: Sequence[Shard]) -> tuple[dict[str, Estimate], str]:
    """Means over prompts of a metric of single clips, or why there are none."""
    prompts = [p for s in shards for p in s.prompt]
    found = {}
    for series in card.series:
        values = [v for s in shards for v in _column(s, series.name)]
        if not all(map(math.isnan, values)):
            better = series.better.value
            found[series.name] = estimate(values, prompts, better=better, binary=series.binary)
    if found:
        return found, ""
    if kind == "exact":
        return {}, THE_REFERENCE
    if card.scope is Scope.LATENT:
        return {}, "other noise: there is no common trajectory."
    return {}, "no sample was measured."


def _distances(
    metric: Metric, shards: Sequence[Shard], baseline: Sequence[Shard]
) -> tuple[dict[str, Estimate], str]:
    """Distances between the contender's clips and the exact run's, as sets, or why there are none."""
    if not baseline:
        return {}, THE_REFERENCE
    name = metric.card.name
    mine = np.concatenate([s.features[name] for s in shards])
    theirs = np.concatenate([s.features[name] for s in baseline])[: len(mine)]
    prompts = [p for s in shards for p in s.prompt]
    try:
        values = metric.distance(theirs, mine, prompts)
    except ConfigError as error:
        return {}, str(error)
    return {
        series: Estimate(
            mean=v.value,
            low=v.low,
            high=v.high,
            prompts=len(set(prompts)),
            samples=len(prompts),
            p=v.p,
            how=v.note or "bootstrap over prompts, paired with the exact run",
        )
        for series, v in values.items()
    }, ""


def _reference(card: MetricCard, series: tuple[str, ...]) -> MetricRef:
    return MetricRef(
        name=card.name,
        version=card.version,
        group=card.group.value,
        series=series,
        backbone=card.backbone.name if card.backbone else "",
        backbone_sha256=card.backbone.sha256 if card.backbone else "",
    )


__all__ = ["code", "mean_counts", "quality_of", "samples_of"]

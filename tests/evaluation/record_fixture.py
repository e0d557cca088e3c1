"""Synthetic records with known truth: a task of n prompts, and contenders whose true differences are given."""

from __future__ import annotations

from typing import Any

import numpy as np

from vivace.evaluation.record import (
    Contender,
    Memory,
    MetricRef,
    Model,
    Quality,
    Record,
    Samples,
    Spread,
    TaskRef,
    Timing,
)
from vivace.evaluation.statistics import estimate
from vivace.evaluation.store import Store

SERIES: dict[str, dict[str, Any]] = {
    name: {
        "metric": metric,
        "version": 1,
        "title": metric,
        "unit": unit,
        "better": better,
        "about": "",
        "group": group,
        "margin": margin,
        "low": None,
        "high": None,
        "binary": binary,
        "blind_to": [],
        "backbone": "",
    }
    for name, metric, unit, better, group, margin, binary in (
        ("psnr", "psnr", "dB", "higher", "fidelity", None, False),
        ("jod", "cvvdp", "JOD", "higher", "fidelity", 0.5, False),
        ("attributes", "attributes", "", "higher", "absolute", 0.02, False),
        ("all_attributes", "attributes", "", "higher", "absolute", 0.05, True),
        ("warp_error", "warp_error", "", "lower", "absolute", 0.5, False),
        ("dynamic_degree", "dynamic_degree", "", "same", "absolute", 0.03, True),
        ("sharpness", "sharpness", "", "same", "absolute", 1.0, False),
        ("frame_mmd", "frame_mmd", "", "lower", "distribution", None, False),
    )
}
MODEL = Model(name="tiny", pipeline="WanPipeline", weights="trained", sha256="w" * 64, dtype="float32")
TASK = TaskRef(name="world-short@1", sha256="a" * 64)
ENVIRONMENT = {"cpu": "A", "cores": 2, "device": "cpu", "versions": {"torch": "2.13"}, "fingerprint": "e1"}
OTHER = {
    "cpu": "A",
    "gpu": "H",
    "cores": 16,
    "device": "cuda",
    "versions": {"torch": "2.11"},
    "fingerprint": "e2",
}


def columns(
    rng: np.random.Generator,
    prompts: int,
    repeats: int,
    means: dict[str, float],
    spread: float,
    base: np.ndarray,
) -> dict[str, tuple[float, ...]]:
    """Values by series, repeats outside, prompts inside as tasks have them. `base` (prompts,) is what all share."""
    out = {}
    for name, mean in means.items():
        noise = rng.normal(size=(repeats, prompts)) * spread
        if SERIES[name]["binary"]:
            out[name] = tuple((rng.random((repeats, prompts)) < mean).astype(float).ravel().tolist())
        else:
            out[name] = tuple((mean + spread * base + noise).ravel().tolist())
    return out


def contender(name: str, kind: str = "plan", **more: Any) -> Contender:
    return Contender.model_validate({"name": name, "kind": kind} | more)


def timing(
    seconds: list[float], beside: tuple[str, ...] = (), batch: int = 1, ids: tuple[str, ...] = ()
) -> Timing:
    stages = {"total": seconds, "denoise": [s * 0.8 for s in seconds], "text": [0.1 for _ in seconds]}
    stages |= {"vae": [s * 0.1 for s in seconds], "other": [0.0 for _ in seconds]}
    return Timing(
        stages={n: Spread.of(v) for n, v in stages.items()},
        batch=batch,
        warmups=1,
        interleaved_with=beside,
        clips=ids,
    )


def metric_refs(version: int = 1, backbone: str = "") -> tuple[MetricRef, ...]:
    by_metric: dict[str, list[str]] = {}
    for name, about in SERIES.items():
        by_metric.setdefault(about["metric"], []).append(name)
    return tuple(
        MetricRef(
            name=m,
            version=version if m == "attributes" else 1,
            group=SERIES[s[0]]["group"],
            series=tuple(s),
            backbone_sha256=backbone if m == "cvvdp" else "",
        )
        for m, s in by_metric.items()
    )


def samples(table: dict[str, tuple[float, ...]], prompts: int, repeats: int, first: int = 0) -> Samples:
    ks = [k for k in range(first, first + repeats) for _ in range(prompts)]
    ps = [p for _ in range(repeats) for p in range(prompts)]
    return Samples(
        ids=tuple(f"{p}.{k}" for p, k in zip(ps, ks, strict=True)),
        prompt=tuple(ps),
        k=tuple(ks),
        seed=tuple(1000 * p + k for p, k in zip(ps, ks, strict=True)),
        columns=table,
    )


def put(
    store: Store,
    who: Contender,
    table: Samples | None = None,
    *,
    distribution: dict[str, float] | None = None,
    version: int = 1,
    backbone: str = "",
    reference: str = "exact",
    flops: float | None = None,
    seconds: list[float] | None = None,
    peak: int | None = None,
    **more: Any,
) -> Record:
    """Make a record, keep it, and give it back."""
    quality = None
    if table is not None:
        found: dict[str, dict[str, Any]] = {"fidelity": {}, "absolute": {}, "distribution": {}}
        for name, column in table.columns.items():
            about = SERIES[name]
            found[about["group"]][name] = estimate(
                column, table.prompt, better=about["better"], binary=about["binary"]
            )
        for name, mean in (distribution or {}).items():
            one = estimate([mean, mean], [0, 1])
            found["distribution"][name] = one.model_copy(update={"low": mean - 0.1, "high": mean + 0.1})
        quality = Quality(**found, metrics=metric_refs(version, backbone), reference=reference)
    values: dict[str, Any] = {
        "created": "2026-01-01T00:00:00",
        "code": {"version": "0"},
        "contender": who,
        "model": MODEL,
        "task": TASK,
        "environment": ENVIRONMENT,
        "counts": {} if flops is None else {"flops": flops, "nfe": round(flops / 1e9)},
        "timing": None if seconds is None else timing(seconds),
        "memory": None if peak is None else Memory(resident=peak),
        "quality": quality,
    }
    return store.record(store.add(Record(**(values | more)), table))

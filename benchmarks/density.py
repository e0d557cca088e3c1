"""Density and quality of every attention method, from records; runs nothing.

    python benchmarks/density.py STORE [STORE ...] --json density.json

Density is the share of the exact run's query-key pairs that a run really visited, counted by its receipts over all
steps and layers, those that a method leaves dense included, and with the cost of choosing blocks. Cross-attention to
text counts too; it is always dense. Speed is counted as well: FLOPs of the exact run over FLOPs of this one.

Each setting is compared with the exact run on the clips of both: points of attribute accuracy, PSNR and LPIPS, with
95 % intervals over prompts (`vivace.evaluation.statistics`). Methods that were meant to be trained and had no weights
are marked `untrained`; those with a file of searched masks `searched`. Contenders with techniques beside their
attention method are left out; fewer steps (`steps=N`) are kept as the control that anybody has for the same FLOPs.

Then, for every density of `--bars`, the training-free setting of at most that density with the least mean LPIPS (not
the best accuracy, which is what is judged) is held against the bar: accuracy within `--points` of exact.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vivace.core.errors import VivaceError
from vivace.evaluation.paired import paired
from vivace.evaluation.record import Record, Samples
from vivace.evaluation.statistics import Interval, mean_interval, prompt_means
from vivace.evaluation.store import Store, newest
from vivace.techniques.base import Paradigm, registry

BARS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
SAME_FRAMES = 1e-3
"""Techniques of at most this fidelity (the same frames to rounding) may stand beside an attention method."""
ALL_PAIRS = 0.999
"""Density from which a method leaves nothing out (low-bit and vendor attention): no candidate for a bar."""
FREE, TRAINED, UNTRAINED, CONTROL = "training-free", "trained", "untrained", "control"
FIDELITY = ("lpips_alex", "psnr", "ssim", "latent_rel_l2")


@dataclass(frozen=True)
class Point:
    """One setting of one method."""

    name: str
    method: str
    """The attention technique; `fewer steps` for the control."""
    kind: str
    """`training-free`, `trained` (by a file), `untrained` (meant to be) or `control`."""
    searched: bool
    """Whether its masks were searched on other prompts and come from a file."""
    density: float
    flops: float
    """Share of the exact run's."""
    settings: Mapping[str, Any]
    samples: Samples
    warnings: tuple[str, ...] = ()
    columns: dict[str, dict[str, float]] = field(default_factory=dict)
    """Series -> sample -> value."""

    @property
    def free(self) -> bool:
        """Whether it may be held against a bar: a sparse method as it is published, and no training."""
        return self.kind == FREE and self.density < ALL_PAIRS


def attention_of(record: Record) -> tuple[str, str, bool, dict[str, Any]] | None:
    """Method, kind, whether its masks were searched, and settings; None where a record is not of attention alone."""
    if record.contender.kind == "steps":
        return "fewer steps", CONTROL, False, dict(record.contender.settings)
    known = [(name, registry[name].card) for name in record.contender.techniques]
    methods = [name for name, card in known if card.paradigm is Paradigm.ATTENTION]
    others = [card for _, card in known if card.paradigm is not Paradigm.ATTENTION]
    if len(methods) != 1 or any(card.fidelity is None or card.fidelity > SAME_FRAMES for card in others):
        return None
    name = methods[0]
    listed = record.contender.settings.get("techniques", [])
    settings = {
        k: v
        for t in listed
        if t.get("technique") == name
        for k, v in t.items()
        if k not in ("technique", "optional")
    }
    card = registry[name].card
    has_file = bool(settings.get("file"))
    kind = FREE if card.training == "none" else TRAINED if has_file else UNTRAINED
    return name, kind, has_file and card.calibration != "none", settings


def read(folders: Sequence[Path]) -> tuple[Record, Samples, list[Point]]:
    """The exact run's record and samples, and all settings of attention methods by method and density.

    Raises:
        VivaceError: a store is missing or damaged, holds no exact run, or is of another task, model or machine.
    """
    pairs = [(store, r) for store in map(Store.existing, folders) for r in newest(store.records())]
    exact = next(((s, r) for s, r in pairs if r.contender.kind == "exact" and r.samples), None)
    if exact is None:
        raise VivaceError(
            f"no record of the exact run in {', '.join(map(str, folders))}; give the folder of a quality run."
        )
    reference = exact[1]
    found: dict[str, Point] = {}
    for store, record in pairs:
        if not record.samples or (about := attention_of(record)) is None:
            continue
        if wrong := other(record, reference):
            raise VivaceError(
                f"{record.contender.name} in {store.path} was measured on another {wrong} than exact."
            )
        method, kind, searched, settings = about
        counts, samples = record.counts, store.samples(record)
        point = Point(
            record.contender.name,
            method,
            kind,
            searched,
            counts["attention_pairs"] / reference.counts["attention_pairs_dense"],
            counts["flops"] / reference.counts["flops"],
            settings,
            samples,
            record.warnings,
            {s: dict(zip(samples.ids, c, strict=True)) for s, c in samples.columns.items()},
        )
        # Of two records the one with more clips.
        if point.name not in found or len(samples.ids) > len(found[point.name].samples.ids):
            found[point.name] = point
    order = sorted(found.values(), key=lambda p: (p.kind == CONTROL, p.method, p.density))
    return reference, exact[0].samples(reference), order


def other(a: Record, b: Record) -> str:
    """What two records do not share: task, model or machine; empty when they are comparable."""
    if a.task != b.task:
        return "task"
    if (a.model.sha256, a.model.dtype) != (b.model.sha256, b.model.dtype):
        return "model"
    return "" if place(a) == place(b) else "machine"


def place(record: Record) -> dict[str, Any]:
    """Where a clip was made; on a GPU how many threads its processor had does not matter to what a clip is like."""
    kept = dict(record.environment)
    if "gpu" in kept:
        for name in ("threads", "fingerprint"):
            kept.pop(name, None)
    return kept


def measured(point: Point, exact: Samples, points: float) -> dict[str, Any]:
    """What the record of a setting keeps.

    Args:
        points: share of accuracy that may be lost.
    """
    right = dict(zip(exact.ids, exact.columns["attributes"], strict=True))
    common = [n for n in point.samples.ids if n in right]
    prompts = [prompt_of(n) for n in common]
    own = [point.columns["attributes"][n] for n in common]
    accuracy = paired(own, [right[n] for n in common], prompts, better="higher", margin=points)
    out: dict[str, Any] = {
        "name": point.name,
        "method": point.method,
        "kind": point.kind,
        "searched": point.searched,
        "settings": dict(point.settings),
        "density": point.density,
        "flops_share": point.flops,
        "counted_speedup": 1.0 / point.flops,
        "clips": len(common),
        "accuracy": accuracy.mean_a,
        "accuracy_exact": accuracy.mean_b,
        "accuracy_difference": accuracy.difference.to_dict(),
        "within_points": accuracy.difference.value >= -points,
        "shown_within_points": accuracy.bounds[0] > -points,
    }
    for series in FIDELITY:
        if series in point.columns:
            values = [point.columns[series].get(n, math.nan) for n in common]
            means, left_out = prompt_means(values, prompts)
            out[series] = mean_interval(means).to_dict() | {"left_out": left_out}
            defined = [v for v in values if not math.isnan(v)]
            out[series]["median"] = finite(np.median(defined)) if defined else None
    return out


def difference(a: Point, b: Point, series: str) -> Interval:
    """a less b on the clips of both, with its interval over prompts."""
    common = [n for n in a.samples.ids if n in b.columns[series]]
    values = [a.columns[series][n] - b.columns[series][n] for n in common]
    means, _ = prompt_means(values, [prompt_of(n) for n in common])
    return mean_interval(means)


def held_against(
    bars: Sequence[float], points: Sequence[Point], rows: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """For each density: the best training-free setting, and how far the best of another method is behind."""
    out = []
    for bar in bars:
        able = sorted((p for p in points if p.free and p.density <= bar), key=lambda p: lpips(rows[p.name]))
        if not able:
            out.append({"density": bar, "best": None})
            continue
        best = able[0]
        second = next((p for p in able if p.method != best.method), None)
        row = rows[best.name]
        kept = ("density", "counted_speedup", "lpips_alex", "accuracy_difference", "within_points")
        found = {"density": bar, "best": best.name, "method": best.method}
        found |= {f"best_{k}": row[k] for k in (*kept, "shown_within_points")}
        if second is not None:
            found["second"] = second.name
            found["second_less_best_lpips"] = difference(second, best, "lpips_alex").to_dict()
        out.append(found)
    return out


def lpips(row: Mapping[str, Any]) -> float:
    """Mean LPIPS of a row, infinite where it has none."""
    value = row.get("lpips_alex", {}).get("value")
    return math.inf if value is None else value


def prompt_of(sample: str) -> int:
    """The prompt's number of `<prompt>.<k>`."""
    return int(sample.partition(".")[0])


def finite(value: Any) -> float | str:
    """For strict JSON: infinity as a word."""
    return float(value) if math.isfinite(value) else "inf"


def told(row: Mapping[str, Any]) -> str:
    """One line of the table."""
    points = {k: 100.0 * v for k, v in row["accuracy_difference"].items() if k != "n" and v is not None}
    change = f"{points['value']:+6.2f}"
    if len(points) == 3:
        change += f" [{points['low']:+6.2f}, {points['high']:+6.2f}]"
    distance = row.get("lpips_alex", {})
    spread = ""
    if distance.get("low") is not None:
        spread = f"{distance['value']:.4f} [{distance['low']:.4f}, {distance['high']:.4f}]"
    psnr = row.get("psnr", {}).get("median")
    psnr = f"{psnr:6.2f}" if isinstance(psnr, float) else f"{psnr or '-':>6}"
    marks = ", ".join(
        m for m in (row["kind"] if row["kind"] != FREE else "", "searched" if row["searched"] else "") if m
    )
    return (
        f"{row['name']:72.72s} {row['density']:7.1%} {row['counted_speedup']:6.2f} {change:26s} {spread:25s} {psnr} "
        f"{row['clips']:5d}  {marks}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path, nargs="+")
    parser.add_argument("--bars", type=float, nargs="+", default=BARS, help="densities, 0 to 1")
    parser.add_argument("--points", type=float, default=1.0, help="of accuracy that may be lost")
    parser.add_argument("--json", type=Path, help="also as a file")
    args = parser.parse_args()
    if any(not 0.0 < bar <= 1.0 for bar in args.bars) or args.points <= 0.0:
        parser.error("densities lie between 0 and 1, and points are above 0.")
    try:
        reference, exact, points = read(args.store)
        if lacking := [s for s in ("attributes",) if s not in exact.columns]:
            raise VivaceError(f"the exact run was not measured for {lacking[0]}; bench it with that metric.")
    except VivaceError as error:
        parser.error(str(error))
    rows = {p.name: measured(p, exact, args.points / 100.0) for p in points}
    bars = held_against(sorted(args.bars), points, rows)
    print(
        f"exact: {np.nanmean(exact.columns['attributes']):.2%} of the attributes right, {len(exact.ids)} clips"
    )
    print(f"{'':72s} density  speed points of accuracy         LPIPS                       PSNR clips")
    method = ""
    for name, row in rows.items():
        if row["method"] != method:
            method = row["method"]
            print(method)
        print(told({**row, "name": f"  {name}"}))
    print(
        f"\nbest training-free setting by LPIPS, and its accuracy against exact less {args.points:g} points"
    )
    for bar in bars:
        if bar["best"] is None:
            print(f"  at most {bar['density']:4.0%}: none")
            continue
        d = bar["best_accuracy_difference"]
        says = "within" if bar["best_within_points"] else "NOT within"
        says += " (shown at 95 %)" if bar["best_shown_within_points"] else " (not shown at 95 %)"
        print(
            f"  at most {bar['density']:4.0%}: {bar['best']}, {bar['best_density']:.1%}, {100 * d['value']:+.2f} {says}"
        )
    if args.json:
        record = {
            "benchmark": "density",
            "stores": [p.name for p in args.store],
            "task": reference.task.name,
            "model": reference.model.model_dump(),
            "environment": reference.environment,
            "commit": reference.code.get("commit", ""),
            "points": args.points,
            "settings": list(rows.values()),
            "bars": bars,
        }
        args.json.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Our best against the best peer at every speed-up, from records; runs nothing.

    python benchmarks/front.py STORE [STORE ...] --json front.json

At a speed-up S everybody may execute 1 / S of the exact run's FLOPs. Of our plans, of peers, and of fewer plain steps
the contender with the least mean LPIPS to the exact clips is taken, on its own clips. Then the two are compared on the
clips that both made: difference of LPIPS, PSNR and attribute accuracy, ours less theirs, with 95 % intervals over
prompts (`vivace.evaluation.statistics`). Several stores of one task, model and environment are read as one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vivace.evaluation.statistics import mean_interval, prompt_means
from vivace.evaluation.store import Store

SPEEDUPS = (1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0)
SLACK = 1.03
"""A run counts for a speed-up that it misses by three per cent: peers step from stair to stair."""
SERIES = ("lpips_alex", "psnr", "attributes")


@dataclass(frozen=True)
class Made:
    """What one contender made."""

    name: str
    kind: str
    share: float
    """Of the exact run's FLOPs."""
    rows: dict[str, int]
    """Sample to its place in the columns."""
    columns: dict[str, np.ndarray]

    def mean(self, series: str) -> float:
        return float(np.nanmean(self.columns[series]))


def read(folders: list[Path]) -> tuple[list[Made], dict[str, float]]:
    """Contenders of all stores, and attributes of the exact run by sample."""
    found: dict[str, Made] = {}
    exact: dict[str, float] = {}
    for folder in folders:
        store, ours = Store(folder), []
        for record in store.records():
            samples = store.samples(record)
            if samples is not None:
                ours.append((record, samples))
        full = next(r.counts["flops"] for r, _ in ours if r.contender.name == "exact")
        for record, samples in ours:
            rows = {name: i for i, name in enumerate(samples.ids)}
            if record.contender.name == "exact":
                exact |= {n: float(samples.columns["attributes"][i]) for n, i in rows.items()}
                continue
            columns = {s: np.asarray(samples.columns[s], dtype=float) for s in SERIES}
            made = Made(
                record.contender.name, record.contender.kind, record.counts["flops"] / full, rows, columns
            )
            # Of two records the one with more clips.
            if made.name not in found or len(rows) > len(found[made.name].rows):
                found[made.name] = made
    return list(found.values()), exact


def difference(a: Made, b: Made, series: str) -> dict[str, float]:
    """a less b on the clips of both, with its interval over prompts."""
    common = [n for n in a.rows if n in b.rows]
    first, second = (np.array([m.columns[series][m.rows[n]] for n in common]) for m in (a, b))
    means, _ = prompt_means(first - second, [int(n.rpartition(":")[2].split(".")[0]) for n in common])
    found = mean_interval(means)
    return {"value": found.value, "low": found.low, "high": found.high, "clips": len(common)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path, nargs="+")
    parser.add_argument("--json", type=Path, help="also as a file")
    args = parser.parse_args()
    for folder in args.store:
        if not any(r.contender.name == "exact" for r in Store(folder).records()):
            parser.error(f"{folder} holds no record of the exact run; give the folder of a `vivace bench`.")
    everyone, exact = read(args.store)
    print(f"exact: {np.mean(list(exact.values())):.2%} of the attributes right, {len(exact)} clips")
    out: dict[str, Any] = {"stores": [p.name for p in args.store], "speedups": []}
    for speedup in SPEEDUPS:
        best: dict[str, Made] = {}
        for kind in ("plan", "peer", "steps"):
            able = [m for m in everyone if m.kind == kind and m.share * speedup <= SLACK]
            if able:
                best[kind] = min(able, key=lambda m: m.mean("lpips_alex"))
        row: dict[str, Any] = {"speedup": speedup}
        print(f"\n{speedup:g} times less work")
        for kind, made in best.items():
            values = {s: made.mean(s) for s in SERIES} | {"psnr": float(np.median(made.columns["psnr"]))}
            row[kind] = {"name": made.name, "share": made.share, "clips": len(made.rows), **values}
            print(
                f"  {kind:6s}{made.name:44.44s} share {made.share:.3f}  LPIPS {values['lpips_alex']:.5f}  "
                f"PSNR {values['psnr']:.2f} dB  attributes {values['attributes']:.2%}  {len(made.rows)} clips"
            )
        for kind in ("peer", "steps"):
            if kind not in best or "plan" not in best:
                continue
            found = {s: difference(best["plan"], best[kind], s) for s in SERIES}
            row[f"less_{kind}"] = found
            print(f"        less {kind}: " + ", ".join(told(s, d) for s, d in found.items()))
        out["speedups"].append(row)
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


def told(series: str, d: dict[str, float]) -> str:
    """A difference in words."""
    if series == "attributes":
        return f"attributes {100 * d['value']:+.2f} points [{100 * d['low']:+.2f}, {100 * d['high']:+.2f}]"
    digits = 2 if series == "psnr" else 5
    name = "PSNR" if series == "psnr" else "LPIPS"
    low, high = f"{d['low']:+.{digits}f}", f"{d['high']:+.{digits}f}"
    return f"{name} {d['value']:+.{digits}f} [{low}, {high}]"


if __name__ == "__main__":
    main()

"""How often 95 % intervals hold the truth when the clips of a prompt resemble each other.

    python benchmarks/interval_coverage.py --out benchmarks/results/2026-11-24/interval-coverage.json

Values are normal, or skewed (the exponential of a normal, centred). A share `icc` of the variance lies between prompts.
`videos` counts clips as if each were a prompt of its own: what a table does that ignores the design.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from vivace.evaluation.statistics import bootstrap_interval, ratio_of_medians, t_interval

COMMAND = "python benchmarks/interval_coverage.py --experiments {0} --seed {1} --out {2}"


def draw(rng: np.random.Generator, prompts: int, repeats: int, icc: float, shape: str) -> np.ndarray:
    """Values (prompts, repeats) whose expectation is 0."""
    table = rng.normal(size=(prompts, 1)) * math.sqrt(icc) + rng.normal(size=(prompts, repeats)) * math.sqrt(
        1 - icc
    )
    return table if shape == "normal" else np.exp(table) - math.exp(0.5)


def coverage(
    rng: np.random.Generator, prompts: int, repeats: int, icc: float, shape: str, experiments: int
) -> dict[str, Any]:
    """Shares of the experiments whose interval holds 0, and mean widths, by kind of interval."""
    hits: dict[str, int] = dict.fromkeys(("t", "bca", "percentile", "videos"), 0)
    widths: dict[str, float] = dict.fromkeys(hits, 0.0)
    for _ in range(experiments):
        table = draw(rng, prompts, repeats, icc, shape)
        means = table.mean(axis=1)
        found = {
            "t": t_interval(means),
            "bca": bootstrap_interval(means),
            "percentile": bootstrap_interval(means, bca=False),
            "videos": t_interval(table.ravel()),
        }
        for name, interval in found.items():
            hits[name] += interval.low <= 0 <= interval.high
            widths[name] += (interval.high - interval.low) / experiments
    return {
        "prompts": prompts,
        "repeats": repeats,
        "icc": icc,
        "shape": shape,
        "coverage": {name: count / experiments for name, count in hits.items()},
        "width": {name: round(width, 4) for name, width in widths.items()},
    }


def ratios(rng: np.random.Generator, runs: int, spread: float, experiments: int) -> dict[str, Any]:
    """Coverage of the interval of a speed-up of 2, both sides timed `runs` times with log-normal noise."""
    hits = 0
    for _ in range(experiments):
        base, own = rng.lognormal(0, spread, runs).tolist(), (rng.lognormal(0, spread, runs) / 2).tolist()
        found = ratio_of_medians(base, own, draws=2000)
        hits += found.low <= 2 <= found.high
    return {"runs": runs, "spread": spread, "coverage": hits / experiments}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiments", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    start = time.time()
    rows = []
    for shape in ("normal", "skewed"):
        for prompts in (16, 20, 50, 100, 200):
            for repeats in (1, 2, 5):
                row = coverage(rng, prompts, repeats, 0.5, shape, args.experiments)
                rows.append(row)
                print(shape, prompts, repeats, row["coverage"], flush=True)
    speed = [ratios(rng, runs, 0.05, args.experiments) for runs in (3, 5, 10, 20)]
    record = {
        "benchmark": "interval_coverage",
        "command": COMMAND.format(args.experiments, args.seed, args.out),
        "nominal": 0.95,
        "experiments": args.experiments,
        "standard_error": round(math.sqrt(0.95 * 0.05 / args.experiments), 4),
        "draws": 10_000,
        "numpy": np.__version__,
        "seconds": round(time.time() - start, 1),
        "means": rows,
        "ratio_of_medians": speed,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("ratio of medians:", {s["runs"]: s["coverage"] for s in speed})


if __name__ == "__main__":
    main()

"""Contenders of a store on the clips that all of them made: means hide tails, and subsets hide in means.

    python benchmarks/common_clips.py benchmarks/results/2026-11-29/caching/world-short

A line for each contender: share of the exact run's FLOPs, PSNR (median), LPIPS (mean, median, 95th percentile, worst)
and the share of attributes that are right, beside the exact run's on the same clips. Reads records; runs nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from vivace.evaluation.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--least", type=int, default=0, help="leave out contenders with fewer clips")
    args = parser.parse_args()
    store = Store(args.store)
    found: dict[str, tuple[float, dict[str, int], dict[str, Any]]] = {}
    for record in store.records():
        samples = store.samples(record)
        if samples is not None and len(samples.ids) >= args.least:
            where = {name: i for i, name in enumerate(samples.ids)}
            found[record.contender.name] = (record.counts["flops"], where, dict(samples.columns))
    exact, where, columns = found.pop("exact")
    common = [i for i in where if all(i in ids for _, ids, _ in found.values())]
    right = np.mean([columns["attributes"][where[i]] for i in common])
    print(f"{len(common)} clips; the exact run has {right:.1%} of the attributes right")
    print(f"{'':48s} share   PSNR  LPIPS mean  median    95 %   worst  attributes")
    for name, (flops, ids, values) in sorted(found.items(), key=lambda f: f[1][0]):
        psnr, lpips, attributes = (
            np.array([values[series][ids[i]] for i in common], dtype=float)
            for series in ("psnr", "lpips_alex", "attributes")
        )
        print(
            f"{name:48.48s} {flops / exact:5.3f} {np.median(psnr):6.2f}    {lpips.mean():8.5f} {np.median(lpips):7.5f} "
            f"{np.percentile(lpips, 95):7.4f} {lpips.max():7.3f}    {attributes.mean():7.1%}"
        )


if __name__ == "__main__":
    main()

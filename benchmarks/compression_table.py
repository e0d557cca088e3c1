"""Quality and size of compressed models, from records; runs nothing.

    python benchmarks/compression_table.py STORE [STORE ...] --json compression.json

For every contender, clip by clip against the exact run of the same store: points of attribute accuracy with a 95 %
interval over prompts, LPIPS and PSNR; share of the exact run's FLOPs and of its bytes of weights, as receipts counted
them; warnings of the run (`emulated` formats say so). A table of a store is sorted by bytes, then by FLOPs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from density import other, prompt_of

from vivace.core.errors import VivaceError
from vivace.evaluation.paired import paired
from vivace.evaluation.record import Record, Samples
from vivace.evaluation.statistics import mean_interval, prompt_means
from vivace.evaluation.store import Store, newest

FIDELITY = ("lpips_alex", "psnr", "latent_rel_l2")


def rows(folder: Path, points: float) -> list[dict[str, Any]]:
    """One row for each contender of a store.

    Args:
        points: share of accuracy that may be lost.

    Raises:
        VivaceError: the store is missing or damaged, holds no exact run, or contenders of another machine or task.
    """
    store = Store.existing(folder)
    records = [r for r in newest(store.records()) if r.samples]
    exact = next((r for r in records if r.contender.kind == "exact"), None)
    if exact is None:
        raise VivaceError(f"{folder} holds no record of the exact run; give the folder of a quality run.")
    found = []
    for record in records:
        if record is exact:
            continue
        if wrong := other(record, exact):
            raise VivaceError(
                f"{record.contender.name} in {folder} was measured on another {wrong} than exact."
            )
        found.append(row(record, store.samples(record), exact, store.samples(exact), points))
    return sorted(found, key=lambda r: (-r["weight_bytes"], -r["flops_share"]))


def row(record: Record, samples: Samples, exact: Record, reference: Samples, points: float) -> dict[str, Any]:
    """What is kept of a contender."""
    right = dict(zip(reference.ids, reference.columns["attributes"], strict=True))
    columns = {s: dict(zip(samples.ids, c, strict=True)) for s, c in samples.columns.items()}
    common = [n for n in samples.ids if n in right]
    prompts = [prompt_of(n) for n in common]
    own = [columns["attributes"][n] for n in common]
    accuracy = paired(own, [right[n] for n in common], prompts, better="higher", margin=points)
    out: dict[str, Any] = {
        "name": record.contender.name,
        "techniques": list(record.contender.techniques),
        "clips": len(common),
        "accuracy": accuracy.mean_a,
        "accuracy_difference": accuracy.difference.to_dict(),
        "within_points": accuracy.difference.value >= -points,
        "shown_within_points": accuracy.bounds[0] > -points,
        "weight_bytes": record.counts["weight_bytes"],
        "bytes_share": record.counts["weight_bytes"] / exact.counts["weight_bytes"],
        "flops_share": record.counts["flops"] / exact.counts["flops"],
        "warnings": list(record.warnings),
    }
    for series in FIDELITY:
        if series in columns:
            means, left_out = prompt_means([columns[series].get(n, float("nan")) for n in common], prompts)
            out[series] = mean_interval(means).to_dict() | {"left_out": left_out}
    return out


def table(found: Sequence[dict[str, Any]]) -> str:
    """For the eye."""
    lines = [
        f"{'':28s} {'weights':>9s} {'share':>6s} {'FLOPs':>6s} "
        f"{'points of accuracy':>24s} {'LPIPS':>7s} {'PSNR':>6s} clips"
    ]
    for r in found:
        d = r["accuracy_difference"]
        points = f"{100 * d['value']:+6.2f} [{100 * d['low']:+6.2f}, {100 * d['high']:+6.2f}]"
        lpips, psnr = (r.get(s, {}).get("value") for s in ("lpips_alex", "psnr"))
        lines.append(
            f"{r['name']:28s} {r['weight_bytes'] / 2**20:7.2f} M {r['bytes_share']:6.2f} {r['flops_share']:6.3f} "
            f"{points:>24s} {'' if lpips is None else f'{lpips:.4f}':>7s} {'' if psnr is None else f'{psnr:.2f}':>6s} "
            f"{r['clips']:5d}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stores", nargs="+", type=Path, metavar="store")
    parser.add_argument("--points", type=float, default=2.0, help="of accuracy that may be lost")
    parser.add_argument("--json", type=Path, help="also as a file")
    args = parser.parse_args()
    kept = {}
    try:
        for folder in args.stores:
            kept[folder.name] = rows(folder, args.points / 100.0)
            print(f"{folder.name}\n{table(kept[folder.name])}\n")
    except VivaceError as error:
        parser.error(str(error))
    if args.json is not None:
        args.json.write_text(json.dumps({"points": args.points, "stores": kept}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

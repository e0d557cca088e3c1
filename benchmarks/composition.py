"""What combined methods cost beyond the sum of their parts, from records; runs nothing.

    python benchmarks/composition.py STORE --json composition.json

A contender `a+b` (or `a+b+c`) is a combination of the contenders `a` and `b` of the same store (`attention_world.py`
makes such a store). For every combination whose parts are all there, clip by clip, with m the error of a clip:

    interaction = m(a+b) - (m(a) + m(b))

m is the relative error of the final latents (`latent_rel_l2`, on the clips whose latents were kept), the root mean
square error of the pixels (from PSNR, of a range of 1), LPIPS, and the loss of attribute accuracy against the exact
run. The sum is what is to be expected where errors add up in the same direction. Errors that know nothing of each
other add as squares, which is less; so the first two, which are lengths, are also held against the root of the sum of
squares (`beyond_independent`). A combination is super-additive where the 95 % interval of its interaction over prompts
lies above zero, sub-additive where it lies below, and additive as far as can be seen otherwise. Of three parts, `third
order` is what neither the parts nor their pairs explain. `work` is the share of the exact run's FLOPs, beside the
product of the parts' shares: more than the product means that both save the same work. Low-bit methods execute all
FLOPs, only cheaper ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from density import other

from vivace.core.errors import VivaceError
from vivace.evaluation.record import Record, Samples
from vivace.evaluation.statistics import Interval, mean_interval, prompt_means
from vivace.evaluation.store import Store, newest

JOINT = "+"
SERIES = ("latent_rel_l2", "pixel_rmse", "lpips_alex", "attributes_lost")
"""Errors of a clip, zero for the exact run; see the module."""
LENGTHS = ("latent_rel_l2", "pixel_rmse")
"""Those that are lengths of a difference, so that independent ones add as squares."""


@dataclass(frozen=True)
class Cell:
    """One contender: its errors by series and sample, and its share of the exact run's FLOPs."""

    name: str
    share: float
    errors: Mapping[str, Mapping[str, float]]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what it combines; itself alone where it is none."""
        return tuple(self.name.split(JOINT))


def read(folder: Path) -> tuple[Record, dict[str, Cell]]:
    """The exact run's record, and all cells of a store by name.

    Raises:
        VivaceError: the store is missing or damaged, holds no exact run, or lacks its accuracy.
    """
    store = Store.existing(folder)
    records = [r for r in newest(store.records()) if r.samples]
    reference = next((r for r in records if r.contender.kind == "exact"), None)
    if reference is None:
        raise VivaceError(f"{folder} holds no record of the exact run; give the folder of a quality run.")
    exact = store.samples(reference)
    if "attributes" not in exact.columns:
        raise VivaceError(f"the exact run in {folder} has no attributes; bench it with that metric.")
    cells = {}
    for record in records:
        if record.contender.kind != "plan":
            continue
        if wrong := other(record, reference):
            raise VivaceError(
                f"{record.contender.name} in {folder} was measured on another {wrong} than exact."
            )
        name = record.contender.name
        share = record.counts["flops"] / reference.counts["flops"]
        cells[name] = Cell(name, share, errors(store.samples(record), exact))
    return reference, cells


def errors(samples: Samples, exact: Samples) -> dict[str, dict[str, float]]:
    """Series of `SERIES` -> sample -> error; samples without a value are left out."""
    right = dict(zip(exact.ids, exact.columns["attributes"], strict=True))
    own = {n: dict(zip(samples.ids, c, strict=True)) for n, c in samples.columns.items()}
    found = {s: own[s] for s in ("latent_rel_l2", "lpips_alex") if s in own}
    if "psnr" in own:
        # Infinite PSNR is no error.
        found["pixel_rmse"] = {n: 10.0 ** (-v / 20.0) for n, v in own["psnr"].items()}
    if "attributes" in own:
        found["attributes_lost"] = {n: right[n] - v for n, v in own["attributes"].items() if n in right}
    return {s: {n: v for n, v in found[s].items() if math.isfinite(v)} for s in SERIES if s in found}


def expected(parts: Sequence[np.ndarray], independent: bool = False) -> np.ndarray:
    """Errors of a combination from those of its parts, clip by clip: their sum, or the root of the sum of squares."""
    stacked = np.stack(parts)
    return np.sqrt((stacked**2).sum(0)) if independent else stacked.sum(0)


def over_prompts(values: np.ndarray, names: Sequence[str]) -> Interval:
    """Mean and 95 % interval over the prompts of samples `<prompt>.<k>`."""
    means, _ = prompt_means(values, [int(n.partition(".")[0]) for n in names])
    return mean_interval(means)


def called(found: Interval) -> str:
    """What an interval of an interaction says."""
    if not math.isfinite(found.low):
        return "unknown"
    if found.low > 0.0:
        return "super-additive"
    return "sub-additive" if found.high < 0.0 else "additive"


def interactions(cell: Cell, cells: Mapping[str, Cell]) -> dict[str, Any] | None:
    """What a combination costs beyond its parts, by series; None where a part is missing."""
    parts = cell.parts
    if len(parts) < 2 or any(p not in cells for p in parts):
        return None
    singles = [cells[p] for p in parts]
    out: dict[str, Any] = {
        "name": cell.name,
        "parts": list(parts),
        "work": cell.share,
        "work_of_parts": math.prod(c.share for c in singles),
        "series": {},
    }
    for series in SERIES:
        if any(series not in c.errors for c in (cell, *singles)):
            continue
        columns = [c.errors[series] for c in (cell, *singles)]
        names = [n for n in columns[0] if all(n in c for c in columns)]
        if not names:
            continue
        together, *alone = (np.array([c[n] for n in names]) for c in columns)
        gap = over_prompts(together - expected(alone), names)
        row: dict[str, Any] = {
            "clips": len(names),
            "together": over_prompts(together, names).to_dict(),
            "parts": [float(a.mean()) for a in alone],
            "sum": float(expected(alone).mean()),
            "interaction": gap.to_dict(),
            "verdict": called(gap),
        }
        if series in LENGTHS:
            beyond = over_prompts(together - expected(alone, independent=True), names)
            row["beyond_independent"] = beyond.to_dict()
        if (third := third_order(cell, cells, series, names)) is not None:
            row["third_order"] = third.to_dict()
        out["series"][series] = row
    return out


def third_order(cell: Cell, cells: Mapping[str, Cell], series: str, names: Sequence[str]) -> Interval | None:
    """Of three parts: what neither they nor their pairs explain; None where a pair is missing, or of other numbers."""
    parts = cell.parts
    if len(parts) != 3:
        return None
    total = np.array([cell.errors[series][n] for n in names])
    for number, sign in ((2, -1.0), (1, 1.0)):
        for chosen in itertools.combinations(parts, number):
            found = next((c for c in cells.values() if set(c.parts) == set(chosen)), None)
            column = found.errors.get(series, {}) if found is not None else {}
            if any(n not in column for n in names):
                return None
            total = total + sign * np.array([column[n] for n in names])
    return over_prompts(total, names)


def pairs_told(rows: Sequence[Mapping[str, Any]], series: str) -> list[str]:
    """The pairs of a verdict in one series, a line for each verdict."""
    out = []
    for verdict in ("super-additive", "sub-additive", "additive"):
        names = [
            r["name"]
            for r in rows
            if len(r["parts"]) == 2 and r["series"].get(series, {}).get("verdict") == verdict
        ]
        if names:
            out.append(f"  {verdict:15s} {', '.join(names)}")
    return out


def told(row: Mapping[str, Any], series: str) -> str:
    """A line of a table."""
    found = row["series"][series]
    digits = 2 if series == "attributes_lost" else 4
    scale = 100.0 if series == "attributes_lost" else 1.0

    def number(value: float | None) -> str:
        return f"{scale * value:+.{digits}f}" if value is not None else "-"

    gap, together = found["interaction"], found["together"]["value"]
    spread = f"[{number(gap['low'])}, {number(gap['high'])}]"
    line = (
        f"  {row['name']:52.52s} {number(together):>8s} {number(found['sum']):>8s} {number(gap['value']):>8s} "
        f"{spread:20s} {found['verdict']:15s}"
    )
    if "beyond_independent" in found:
        line += f" beyond independent {number(found['beyond_independent']['value'])}"
    if "third_order" in found:
        line += f" third order {number(found['third_order']['value'])}"
    return f"{line}  {found['clips']} clips"


TITLES = {
    "latent_rel_l2": "relative error of the final latents",
    "pixel_rmse": "root mean square error of pixels, range 1",
    "lpips_alex": "LPIPS",
    "attributes_lost": "points of attribute accuracy lost",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--json", type=Path, help="also as a file")
    args = parser.parse_args()
    try:
        reference, cells = read(args.store)
    except VivaceError as error:
        parser.error(str(error))
    rows = [r for c in cells.values() if (r := interactions(c, cells)) is not None]
    if not rows:
        parser.error(f"{args.store} holds no combination a{JOINT}b together with its parts a and b.")
    rows.sort(key=lambda r: (len(r["parts"]), r["name"]))
    singles = [cells[n] for n in sorted({p for r in rows for p in r["parts"]})]
    print(f"{'alone':54s} " + " ".join(f"{s:>16s}" for s in SERIES) + "    work")
    for cell in singles:
        values = (np.mean(list(cell.errors[s].values())) if cell.errors.get(s) else math.nan for s in SERIES)
        print(f"  {cell.name:52.52s} " + " ".join(f"{v:16.5f}" for v in values) + f"  {cell.share:6.3f}")
    for series in SERIES:
        if able := [r for r in rows if series in r["series"]]:
            print(f"\n{TITLES[series]}: together, sum of the parts, interaction with its 95 % interval")
            print("\n".join(told(r, series) for r in able))
            print("\n".join(pairs_told(able, series)))
    print("\nwork: share of the exact run's FLOPs, and the product of the parts' shares")
    for row in rows:
        print(f"  {row['name']:52.52s} {row['work']:6.3f} {row['work_of_parts']:6.3f}")
    if args.json:
        record = {
            "benchmark": "composition",
            "store": args.store.name,
            "task": reference.task.name,
            "model": reference.model.model_dump(),
            "environment": reference.environment,
            "commit": reference.code.get("commit", ""),
            "alone": {
                c.name: {"work": c.share}
                | {
                    s: over_prompts(np.array(list(v.values())), list(v)).to_dict()
                    for s, v in c.errors.items()
                    if v
                }
                for c in singles
            },
            "combinations": rows,
        }
        args.json.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What one method's page needs: its rows in plain data, values by prompt, settings and machines as pairs of words.

The page itself is drawn in the browser when somebody opens it; a board of sixty contenders would otherwise be sixty
long documents. Values of single samples are joined to prompts here, because the prompt is the unit of every statement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vivace.report import units

Row = Mapping[str, Any]
_KEPT = (
    "id", "task", "environment", "counts", "work_share", "cost", "timing", "memory", "energy", "speed_up", "quality",
    "paired", "normalised", "matched", "skipped", "warnings", "command",
)  # fmt: skip


def row_data(row: Row, clips: Mapping[str, int]) -> dict[str, Any]:
    """A row as the script wants it: without its samples, clips by prompt as indices into the page's clips.

    Args:
        row: of a board.
        clips: path below the store -> index of the clip in the page. Paths that are not there are left out.
    """
    data = {key: row.get(key) for key in _KEPT}
    data["dtype"] = row["model"].get("dtype", "")
    data["clips"] = {
        sample: clips[path] for sample, path in sorted_samples(row.get("clips") or {}) if path in clips
    }
    data["has_samples"] = bool(row.get("samples"))
    return data


def sorted_samples(clips: Mapping[str, str]) -> list[tuple[str, str]]:
    """Clips in the order of their samples: `2.0` before `10.0`."""
    return sorted(clips.items(), key=lambda item: _place(item[0]))


def by_prompt(row: Row, series: Sequence[str]) -> dict[str, Any] | None:
    """Values of a row by prompt: the mean over the clips of a prompt, for the series that the board describes.

    A missing value is None. Infinite values (the PSNR of equal clips) are left out of a mean with finite ones.

    Returns:
        `prompts` (texts), `keys` (prompt index of the task, as in the sample ids) and `columns`; None without samples.
    """
    samples = row.get("samples")
    if not samples:
        return None
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(samples["ids"]):
        groups.setdefault(name.partition(".")[0], []).append(index)
    texts = samples["prompts"]
    return {
        "keys": list(groups),
        "prompts": [texts[members[0]] for members in groups.values()],
        "columns": {
            name: [_mean([column[i] for i in members]) for members in groups.values()]
            for name, column in samples["columns"].items()
            if name in series
        },
    }


def pairs(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested plain data as (dotted name, words)."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += pairs(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                named = item.get("technique", index) if isinstance(item, Mapping) else index
                inner = (
                    {k: v for k, v in item.items() if k != "technique"}
                    if isinstance(item, Mapping)
                    else {"": item}
                )
                found += pairs(inner, f"{prefix}{named}.") or [(f"{prefix}{named}", "on")]
        else:
            found.append((f"{prefix}{key}".rstrip("."), _words(str(key), value)))
    return found


def _words(key: str, value: Any) -> str:
    if value is None:
        return units.MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return units.size(value) if key.endswith("bytes") else units.plain(value)
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _place(sample: str) -> tuple[int, ...]:
    parts = sample.split(".")
    return tuple(int(p) if p.isdigit() else 0 for p in parts)


def _mean(values: Sequence[float | str | None]) -> float | str | None:
    finite = [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    if finite:
        return float(f"{sum(finite) / len(finite):.4g}")
    endless = [v for v in values if v == "inf" or (isinstance(v, float) and v == math.inf)]
    return "inf" if endless else None

"""VBench (Huang et al., arXiv:2311.17982): its prompts, and its aggregation of 16 dimensions.

The aggregation is that of its published script, with one difference: a dimension that was not measured is an error,
where the script counts it as 0. `vivace.evaluation.vbench_run` runs VBench's own code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vivace.core.errors import ConfigError, UnknownNameError

_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One of the 16 dimensions, and how its raw score enters the total."""

    name: str
    group: str
    """`quality` or `semantic`."""
    low: float
    high: float
    """Raw scores that count as 0 and as 1; nothing is clipped."""
    weight: float


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """VBench's total of the raw scores, each on a scale where 1 is the best known; multiply by 100 for its tables."""

    normalised: Mapping[str, float]
    quality: float
    semantic: float
    total: float
    absent: tuple[str, ...] = ()
    """Dimensions that counted as raw 0."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What VBench measures on the clips of one of its prompts."""

    text: str
    dimensions: tuple[str, ...]
    auxiliary: Mapping[str, Any]
    """By dimension: the object, colour, place or style that is looked for."""


@lru_cache(maxsize=1)
def _constants() -> dict[str, Any]:
    return json.loads((_HERE / "data" / "vbench.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def dimensions() -> Mapping[str, Dimension]:
    """The 16 dimensions, quality before semantic."""
    return {name: Dimension(name=name, **row) for name, row in _constants()["dimensions"].items()}


@lru_cache(maxsize=1)
def prompts() -> Mapping[str, Prompt]:
    """VBench's prompts by text: 944 distinct ones."""
    path = _HERE / "tasks" / "prompts" / "vbench-dimensions.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {
        text: Prompt(text=text, dimensions=tuple(row["dimensions"]), auxiliary=row.get("auxiliary", {}))
        for text, row in rows.items()
    }


def aggregate(scores: Mapping[str, float], *, as_official: bool = False) -> Aggregate:
    """Quality, semantic and total score from raw scores.

    norm = (raw - low) / (high - low); each group is the weighted mean of its dimensions; the total is
    (4 quality + semantic) / 5.

    Args:
        scores: raw score by dimension (underscores or spaces), as VBench writes them.
        as_official: count a dimension that is not there as raw 0, as the published script does.

    Raises:
        UnknownNameError: a name is none of the 16 dimensions.
        ConfigError: a dimension is not there, or a score is not finite.
    """
    known = dimensions()
    raw = {name.replace(" ", "_"): float(value) for name, value in scores.items()}
    for name, value in raw.items():
        if name not in known:
            raise UnknownNameError("VBench dimension", name, known)
        if not math.isfinite(value):
            raise ConfigError(f"the VBench score of {name} is {value}; measure it again or leave it out.")
    absent = tuple(name for name in known if name not in raw)
    if absent and not as_official:
        raise ConfigError(
            f"VBench's total needs all 16 dimensions and {', '.join(absent)} were not measured; measure them, or pass "
            "as_official=True to count them as 0 as VBench's script does."
        )
    normalised = {d.name: (raw.get(d.name, 0.0) - d.low) / (d.high - d.low) for d in known.values()}
    groups = {}
    for group in _constants()["group_weights"]:
        members = [d for d in known.values() if d.group == group]
        groups[group] = sum(d.weight * normalised[d.name] for d in members) / sum(d.weight for d in members)
    weights = _constants()["group_weights"]
    total = sum(weights[g] * value for g, value in groups.items()) / sum(weights.values())
    return Aggregate(
        normalised=normalised,
        quality=groups["quality"],
        semantic=groups["semantic"],
        total=total,
        absent=absent,
    )


__all__ = ["Aggregate", "Dimension", "Prompt", "aggregate", "dimensions", "prompts"]

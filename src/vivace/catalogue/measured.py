"""What we measured ourselves, beside what was claimed: the newest record of a technique or a peer in a folder.

Records are read as plain JSON, so that this needs no part of the evaluation. A speed-up is computed from two records of
the same task, model and environment; it stands in none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vivace.catalogue.schema import Method, key
from vivace.core.errors import ConfigError
from vivace.core.packed import read_packed

DEFAULT_FOLDER = Path("benchmarks/results")
_SERIES = ("psnr", "lpips_alex", "jod", "ssim", "attributes", "accuracy")
"""Series to show first, where a record has them."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measurement. `others` are techniques that were in force as well; empty when it ran alone."""

    id: str
    task: str
    created: str
    contender: str
    model: str
    environment: str
    others: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    """speed_up and work_share against the exact run, nfe, seconds of one clip, and means of some series."""

    @property
    def words(self) -> str:
        """The figures as one line."""
        names = {
            "speed_up": "{:.2f} times faster than the exact run",
            "work_share": "{:.0%} of its work",
            "seconds": "{:.3g} s a clip",
            "nfe": "{:.3g} evaluations",
        }
        parts = [
            names[n].format(v) if n in names else f"{n.replace('_', ' ')} {v:.4g}"
            for n, v in self.figures.items()
        ]
        return ", ".join(parts) or "no figures"


def read_records(folder: str | Path) -> tuple[dict[str, Any], ...]:
    """All records below a folder, loose (`records/*.json`) or packed, at any depth; newest first, with their `id`.

    Raises:
        ConfigError: a file is no JSON object, or a packed one is damaged.
    """
    found = []
    for path in sorted(Path(folder).glob("**/records.jsonl.xz")):
        found += [{**data, "id": name} for name, data in read_packed(path).items()]
    for path in sorted(Path(folder).glob("**/records/*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the record {path}; remove it or restore it.") from error
        if not isinstance(data, dict) or not isinstance(data.get("contender"), dict):
            raise ConfigError(f"the file {path} is no record; keep only records in a folder of that name.")
        found.append({**data, "id": path.stem})
    return tuple(sorted(found, key=lambda r: (str(r.get("created", "")), r["id"]), reverse=True))


def newest_record(
    name: str, folder: str | Path | None = None, records: Sequence[Mapping[str, Any]] | None = None
) -> Measured | None:
    """The newest record of a technique of ours or of a peer; None where there is none.

    A record in which the technique ran alone comes before one in which others were in force as well.

    Args:
        name: a technique (`radial`) or a peer (`diffusers.mag_cache`), whatever its knobs were.
        folder: where to look; `benchmarks/results` below the current folder by default.
        records: what `read_records` gave, to save reading again.
    """
    known = read_records(folder or DEFAULT_FOLDER) if records is None else records
    hits = [r for r in known if _is(r["contender"], name)]
    alone = [r for r in hits if not _others(r["contender"], name)]
    best = (alone or hits)[:1]
    return _measured(best[0], name, known) if best else None


def measurements(found: Method, records: Sequence[Mapping[str, Any]]) -> tuple[Measured, ...]:
    """The newest record of our technique, then of every peer, of a method."""
    names = [n for n in (found.technique, *(p.name for p in found.peers)) if n]
    return tuple(m for n in names if (m := newest_record(n, records=records)) is not None)


def _is(contender: Mapping[str, Any], name: str) -> bool:
    if contender.get("kind") == "peer":
        return key(str(contender.get("name", "")).partition("@")[0]) == key(name)
    return name in (contender.get("techniques") or ())


def _others(contender: Mapping[str, Any], name: str) -> tuple[str, ...]:
    return tuple(t for t in contender.get("techniques") or () if t != name)


def _measured(record: Mapping[str, Any], name: str, known: Iterable[Mapping[str, Any]]) -> Measured:
    exact = next((r for r in known if r["contender"].get("kind") == "exact" and _same(r, record)), None)
    figures: dict[str, float | None] = {
        "speed_up": _ratio(_seconds(exact), _seconds(record)),
        "work_share": _ratio(_count(record, "flops"), _count(exact, "flops")),
        "nfe": _count(record, "nfe"),
        "seconds": _seconds(record),
        **_quality(record),
    }
    environment = record.get("environment") or {}
    return Measured(
        id=record["id"],
        task=str((record.get("task") or {}).get("name", "")),
        created=str(record.get("created", "")),
        contender=str(record["contender"].get("name", "")),
        model=str((record.get("model") or {}).get("name", "")),
        environment=_machine(environment),
        others=_others(record["contender"], name),
        figures={n: v for n, v in figures.items() if v is not None and math.isfinite(v)},
    )


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Equal task, model and environment: only then may two records be divided by each other."""

    def parts(r: Mapping[str, Any]) -> tuple[Any, ...]:
        return (r.get("task"), r.get("model"), (r.get("environment") or {}).get("fingerprint"))

    return parts(a) == parts(b)


def _seconds(record: Mapping[str, Any] | None) -> float | None:
    timing = (record or {}).get("timing") or {}
    total = (timing.get("stages") or {}).get("total") or {}
    median = total.get("median")
    return None if median is None else float(median) / float(timing.get("batch") or 1)


def _count(record: Mapping[str, Any] | None, name: str) -> float | None:
    value = ((record or {}).get("counts") or {}).get(name)
    return None if value is None else float(value)


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _quality(record: Mapping[str, Any]) -> dict[str, float | None]:
    quality = record.get("quality") or {}
    means = {
        series: estimate.get("mean")
        for group in ("fidelity", "absolute")
        for series, estimate in (quality.get(group) or {}).items()
    }
    chosen = [s for s in _SERIES if s in means] or sorted(means)[:3]
    return {s: means[s] for s in chosen}


def _machine(environment: Mapping[str, Any]) -> str:
    for name in ("label", "gpu", "cpu", "fingerprint"):
        value = environment.get(name)
        if isinstance(value, Mapping):
            value = value.get("name") or value.get("model")
        if isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        if value:
            return str(value)
    return ""

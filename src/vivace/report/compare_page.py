"""The page of one comparison: exact beside fast, what was saved, and what it cost.

One HTML file that works from `file://` without network: clips are data URIs, style and script are inline, and a
content security policy in the page forbids every request.
"""

from __future__ import annotations

import base64
import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vivace.core.errors import ConfigError, OutputError
from vivace.report import units
from vivace.report.curves import Chart, QualityCurve, chart, value_text
from vivace.report.receipt_table import STAGES, receipt_rows, stage_bars, wall_seconds
from vivace.report.timeline import timelines

__all__ = ["AttributeCheck", "ComparePage", "QualityCurve", "render", "write"]

_ARXIV = re.compile(r"\barXiv[:\s]*(\d{4}\.\d{4,5})", re.IGNORECASE)
_URL = re.compile(r"https?://[^\s)\]>\"']+")


@dataclass(frozen=True, kw_only=True)
class AttributeCheck:
    """One attribute of the clip as the verifier saw it."""

    name: str
    wanted: str | None
    """None when the prompt does not say."""
    exact: str
    fast: str

    def holds(self, seen: str) -> bool | None:
        """Whether the clip shows what was asked for; None when nothing was."""
        return None if self.wanted is None else seen == self.wanted


@dataclass(frozen=True, kw_only=True)
class ComparePage:
    """Everything the page shows, in plain data."""

    prompt: str
    seed: int
    model: str
    plan: str
    """Name of the fast plan."""
    fps: float
    frames: int
    height: int
    width: int
    exact_video: bytes
    """mp4 file content; likewise below."""
    fast_video: bytes
    difference_video: bytes | None = None
    difference_gain: float | None = None
    """Factor by which the heat map is scaled."""
    exact_receipt: Mapping[str, Any] = field(default_factory=dict)
    """`Receipt.to_dict()`; missing keys leave their lines out."""
    fast_receipt: Mapping[str, Any] = field(default_factory=dict)
    quality: Sequence[QualityCurve] = ()
    attributes: Sequence[AttributeCheck] = ()
    command: str = ""
    """What to type to get this page again."""
    warnings: Sequence[str] = ()
    """Added to the warnings of the receipts."""

    def __post_init__(self) -> None:
        if self.frames < 1 or not self.fps > 0:
            raise ConfigError(
                f"a page needs frames and fps above 0, got {self.frames} and {self.fps}; check the clip"
            )
        for curve in self.quality:
            if curve.skipped is None and len(curve.per_frame) != self.frames:
                raise ConfigError(
                    f"{curve.name} has {len(curve.per_frame)} values for {self.frames} frames; give one per frame"
                )


def render(page: ComparePage) -> str:
    """The page as HTML text."""
    exact_line, fast_line = timelines(page.exact_receipt, page.fast_receipt)
    charts = [chart(curve) for curve in page.quality if curve.skipped is None]
    return (
        _environment()
        .get_template("compare.html.j2")
        .render(
            page=page,
            videos=_videos(page),
            headline=_headline(page),
            verdict=_verdict(page),
            rows=receipt_rows(page.exact_receipt, page.fast_receipt),
            bars=stage_bars(page.exact_receipt, page.fast_receipt),
            stages=STAGES,
            timelines=(("exact", exact_line), ("fast", fast_line)),
            charts=charts,
            skipped=[curve for curve in page.quality if curve.skipped is not None],
            techniques=[_technique(item) for item in page.fast_receipt.get("techniques") or ()],
            kernels=page.fast_receipt.get("kernels") or (),
            environment=_flatten(
                page.fast_receipt.get("environment") or page.exact_receipt.get("environment") or {}
            ),
            plan=json.dumps(page.fast_receipt.get("plan") or {}, indent=2),
            warnings=_warnings(page),
            client=_client_data(page, charts),
        )
    )


def write(page: ComparePage, path: str | Path) -> Path:
    """Renders to a file, which appears only when complete.  Raises `OutputError` where it cannot be written."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(render(page), encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(
            f"cannot write {target}: {reason}; free some space or choose another folder"
        ) from error
    finally:
        if os.path.lexists(partial):
            partial.unlink()
    return target


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("vivace.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["number"] = units.number
    environment.filters["coordinate"] = lambda value: f"{value:.2f}".rstrip("0").rstrip(".")
    return environment


def _videos(page: ComparePage) -> list[dict[str, str]]:
    clips = [
        ("exact", "Exact", page.exact_video),
        ("fast", "Fast" if page.plan == "fast" else f"Fast ({page.plan})", page.fast_video),
    ]
    if page.difference_video is not None:
        gain = f" {units.TIMES}{page.difference_gain:g}" if page.difference_gain is not None else ""
        clips.append(("difference", f"Difference{gain}", page.difference_video))
    return [
        {"key": key, "label": label, "uri": "data:video/mp4;base64," + base64.b64encode(data).decode("ascii")}
        for key, label, data in clips
    ]


def _headline(page: ComparePage) -> list[dict[str, str]]:
    """The cards under the players; a card whose numbers are unknown is left out."""
    exact, fast = page.exact_receipt, page.fast_receipt
    cards = []
    before, after = wall_seconds(exact), wall_seconds(fast)
    if (speed := units.quotient(before, after)) is not None:
        note = f"{units.seconds(before)} to {units.seconds(after)}"
        cards.append({"label": "Speed-up", "value": units.factor(speed), "note": note})
    if fast.get("nfe") is not None:
        note = f"network evaluations; exact {units.number(exact.get('nfe'))}"
        cards.append({"label": "NFE", "value": units.number(fast["nfe"]), "note": note})
    if (share := units.quotient(fast.get("flops"), exact.get("flops"))) is not None:
        note = f"{units.count(fast['flops'], 'FLOP')} of {units.count(exact['flops'], 'FLOP')}"
        cards.append({"label": "FLOPs share", "value": units.percent(share), "note": note})
    if (curve := _psnr(page)) is not None:
        worst = "" if curve.worst is None else value_text(curve.per_frame[curve.worst], curve.unit)
        note = f"to the exact clip; worst frame {worst}" if worst else "to the exact clip"
        cards.append({"label": "PSNR", "value": value_text(curve.pooled, curve.unit), "note": note})
    if asked := [check for check in page.attributes if check.wanted is not None]:
        right, exact_right = (sum(bool(c.holds(seen(c))) for c in asked) for seen in (_fast_saw, _exact_saw))
        note = f"attributes of the prompt shown; exact {exact_right}"
        cards.append({"label": "Prompt", "value": f"{right} / {len(asked)}", "note": note})
    return cards


def _exact_saw(check: AttributeCheck) -> str:
    return check.exact


def _fast_saw(check: AttributeCheck) -> str:
    return check.fast


def _psnr(page: ComparePage) -> QualityCurve | None:
    return next((c for c in page.quality if c.name == "psnr" and c.skipped is None), None)


def _verdict(page: ComparePage) -> str:
    """The headline as one sentence."""
    speed = units.quotient(wall_seconds(page.exact_receipt), wall_seconds(page.fast_receipt))
    share = units.quotient(page.fast_receipt.get("flops"), page.exact_receipt.get("flops"))
    parts = []
    if speed is not None:
        slower = speed < 1
        parts.append(
            f"{units.factor(1 / speed if slower else speed)} {'slower' if slower else 'faster'} than exact"
        )
    if share is not None:
        parts.append(f"with {units.percent(share)} of its FLOPs")
    return f"Plan {page.plan}: {', '.join(parts)}." if parts else f"Plan {page.plan} beside the exact run."


def _technique(item: Mapping[str, Any]) -> dict[str, Any]:
    cite = item.get("cite") or ""
    if isinstance(cite, Mapping):
        arxiv = f"arXiv {cite['arxiv']}" if cite.get("arxiv") else ""
        cite = ", ".join(str(part) for part in (cite.get("title"), arxiv, cite.get("code")) if part)
    return {
        "name": str(item.get("name", "")).replace("_", " "),
        "paradigm": item.get("paradigm", ""),
        "cite": cite,
        "link": _link(str(cite)),
        "effects": _flatten(item.get("effects") or {}),
        "settings": _flatten(item.get("settings") or {}),
    }


def _link(cite: str) -> str:
    """Address of a citation: its arXiv page, else the first web address in it, else empty."""
    if match := _ARXIV.search(cite):
        return f"https://arxiv.org/abs/{match.group(1)}"
    match = _URL.search(cite)
    return match.group(0).rstrip(".,;") if match else ""


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested plain data as (dotted name, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{key}.")
            continue
        if isinstance(value, bool) or value is None:
            text = {True: "yes", False: "no", None: units.MISSING}[value]
        elif isinstance(value, (int, float)):
            text = units.size(value) if str(key).endswith("bytes") else units.plain(value)
        else:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        pairs.append((f"{prefix}{key}".replace("_", " "), text))
    return pairs


def _warnings(page: ComparePage) -> list[str]:
    """Each warning once; those of the receipts say whose they are."""
    found = list(page.warnings)
    for name, receipt in (("exact", page.exact_receipt), ("fast", page.fast_receipt)):
        found += [f"{name} run: {text}" for text in receipt.get("warnings") or ()]
    return list(dict.fromkeys(found))


def _client_data(page: ComparePage, charts: Sequence[Chart]) -> dict[str, Any]:
    """What the script needs: the clock, and each chart's points with their words."""
    return {
        "fps": page.fps,
        "frames": page.frames,
        "charts": [{"points": c.points, "texts": c.texts, "title": c.title} for c in charts],
    }

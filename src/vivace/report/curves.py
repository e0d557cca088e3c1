"""Per-frame quality as small line charts: ticks, paths and marks for an inline SVG.

Each metric has its own unit and so its own panel; the frame axis is common. Equal frames have an infinite PSNR: they
are drawn as open marks on the upper edge instead of bending the scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vivace.report.units import SPACE, number

WIDTH, HEIGHT = 520.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 16.0, 14.0, 42.0
EQUAL = "identical"


@dataclass(frozen=True, kw_only=True)
class QualityCurve:
    """One metric of the fast clip against the exact one, in plain data."""

    name: str
    version: str
    unit: str
    higher_is_better: bool
    per_frame: tuple[float, ...] = ()
    pooled: float | None = None
    worst: int | None = None
    skipped: str | None = None
    """Why there is no value; shown instead of the chart."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    position: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One panel; lengths in SVG user units."""

    title: str
    direction: str
    pooled: str
    worst: str
    version: str
    unit: str
    axis: str
    path: str
    points: tuple[tuple[float, float], ...]
    equal: tuple[tuple[float, float], ...]
    """Where open marks stand for identical frames."""
    worst_point: tuple[float, float] | None
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    texts: tuple[str, ...]
    """Each frame's value as words, for hover and table."""
    summary: str


def chart(curve: QualityCurve) -> Chart:
    """Lays out a curve that has values (`skipped` is None)."""
    values = curve.per_frame
    finite = [value for value in values if math.isfinite(value)]
    low, high, ticks = _scale(finite)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x_of(index: int) -> float:
        return LEFT + (right - LEFT) * (index / (len(values) - 1) if len(values) > 1 else 0.5)

    def y_of(value: float) -> float:
        return TOP if not math.isfinite(value) else bottom - (bottom - TOP) * (value - low) / (high - low)

    points = tuple((round(x_of(i), 2), round(y_of(value), 2)) for i, value in enumerate(values))
    title = curve.name.upper()
    axis = f"{title} ({curve.unit})" if curve.unit else title
    texts = tuple(value_text(value, curve.unit) for value in values)
    worst = f"{texts[curve.worst]} at frame {curve.worst + 1}" if curve.worst is not None else ""
    pooled = value_text(curve.pooled, curve.unit)
    return Chart(
        title=title,
        direction="higher is better" if curve.higher_is_better else "lower is better",
        pooled=pooled,
        worst=worst,
        version=curve.version,
        unit=curve.unit,
        axis=axis,
        path=_path(values, points),
        points=points,
        equal=tuple(p for p, value in zip(points, values, strict=True) if not math.isfinite(value)),
        worst_point=points[curve.worst] if curve.worst is not None and finite else None,
        x_ticks=tuple(Tick(position=x_of(i), text=str(i + 1)) for i in _frame_ticks(len(values))),
        y_ticks=tuple(Tick(position=y_of(v), text=_tick_text(v, ticks)) for v in ticks),
        texts=texts,
        summary=f"{axis} over {len(values)} frames: {pooled} for the clip, worst {worst}",
    )


def value_text(value: float | None, unit: str) -> str:
    """A value with its unit; an infinite one is called what it is."""
    if value is not None and math.isinf(value):
        return EQUAL
    return f"{number(value)}{SPACE}{unit}".strip()


def _scale(values: list[float]) -> tuple[float, float, list[float]]:
    """Lower and upper end and the round ticks between them; the axis need not start at zero."""
    if not values:
        return 0.0, 1.0, []
    low, high = min(values), max(values)
    padding = (high - low) * 0.08 or max(abs(high) * 0.02, 1e-3)
    low, high = low - padding, high + padding
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return low, high, [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick_text(value: float, ticks: list[float]) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    decimals = next((d for d in range(7) if abs(round(step, d) - step) < step * 1e-6), 6)
    return f"{value:.{decimals}f}"


def _frame_ticks(frames: int) -> list[int]:
    every = next((n for n in (1, 5, 10, 25, 50, 100, 250, 500) if frames / n <= 9), 1000)
    return sorted({0, *range(every - 1, frames, every)})


def _path(values: tuple[float, ...], points: tuple[tuple[float, float], ...]) -> str:
    """The line through finite values, broken where frames are identical."""
    commands, pen_down = [], False
    for value, (x, y) in zip(values, points, strict=True):
        if math.isfinite(value):
            commands.append(f"{'L' if pen_down else 'M'}{x} {y}")
        pen_down = math.isfinite(value)
    return " ".join(commands)

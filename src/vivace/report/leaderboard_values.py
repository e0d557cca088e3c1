"""A measured value in words: as many digits as its interval bears out, and the interval beside it.

`leaderboard_base.js` has the same rule, so that a table, a plot and a Markdown file say the same digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vivace.report.units import MISSING, SPACE

INFINITE = "\N{INFINITY}"
MINUS = "\N{MINUS SIGN}"
Value = Mapping[str, Any]
"""`value`, `low`, `high` (each a float or None; `value` also the text `inf`) and `n`."""


def decimals(value: float, low: float | None, high: float | None) -> int:
    """Digits after the point: up to the first digit of half the interval, two when that digit is 1 or 2.

    Without an interval three significant digits.
    """
    half = (high - low) / 2 if low is not None and high is not None else 0.0
    if half > 0 and math.isfinite(half):
        power = math.floor(math.log10(half))
        return min(6, max(0, (1 if half / 10.0**power < 3 else 0) - power))
    if not value or float(value).is_integer():
        return 0
    return min(6, max(0, 2 - math.floor(math.log10(abs(value)))))


def main(value: Value | None, unit: str = "", signed: bool = False) -> str:
    """The value alone, with its unit."""
    if value is None or value.get("value") is None:
        return MISSING
    if isinstance(value["value"], str):
        return _fixed(value["value"], 0, signed)
    return _fixed(value["value"], _digits(value), signed) + _unit(unit)


def interval(value: Value | None, signed: bool = False) -> str:
    """`[low, high]`, empty where a value was counted and has none."""
    if value is None or value.get("low") is None or value.get("high") is None:
        return ""
    digits = _digits(value)
    return f"[{_fixed(value['low'], digits, signed)}, {_fixed(value['high'], digits, signed)}]"


def text(value: Value | None, unit: str = "", signed: bool = False) -> str:
    """Value, unit and interval in one line."""
    return f"{main(value, unit, signed)} {interval(value, signed)}".strip()


def p_text(p: float | None) -> str:
    """A p value as journals print it."""
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _digits(value: Value) -> int:
    centre = value["value"] if isinstance(value["value"], (int, float)) else 0.0
    low, high = (v if isinstance(v, (int, float)) else None for v in (value.get("low"), value.get("high")))
    return decimals(centre, low, high)


def _fixed(value: float | str, digits: int, signed: bool) -> str:
    if isinstance(value, str):
        return INFINITE if value == "inf" else f"{MINUS}{INFINITE}"
    words = f"{abs(value):,.{digits}f}"
    if value < 0 and float(words.replace(",", "")) != 0:
        return MINUS + words
    return f"+{words}" if signed and value > 0 else words


def _unit(unit: str) -> str:
    return f"{SPACE}{unit}" if unit[:1].isalnum() else unit

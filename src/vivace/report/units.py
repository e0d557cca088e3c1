"""Numbers as people read them: at most three significant digits, always with the unit."""

from __future__ import annotations

import math

MISSING = "\N{EN DASH}"
SPACE = "\N{NO-BREAK SPACE}"
"""Between a number and its unit, so that they stay on one line."""
TIMES = "\N{MULTIPLICATION SIGN}"
_SI = ("", "k", "M", "G", "T", "P", "E")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def number(value: float | None, digits: int = 3) -> str:
    """A plain number with `digits` significant digits, never in exponent form for everyday sizes."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "\N{INFINITY}" if value > 0 else MISSING
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value):,}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(decimals, 6)}f}"


def plain(value: float) -> str:
    """A setting or a tally as it was given: 0.08 stays 0.08."""
    return f"{value:.4g}" if abs(value) < 1e4 else number(value)


def seconds(value: float | None) -> str:
    """Milliseconds below one second, minutes from one hundred seconds on."""
    if value is None:
        return MISSING
    if value >= 100:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes}{SPACE}min{SPACE}{rest:02d}{SPACE}s"
    return f"{number(value * 1000)}{SPACE}ms" if 0 < value < 1 else f"{number(value)}{SPACE}s"


def count(value: float | None, unit: str = "") -> str:
    """With an SI prefix from a million on: 12,345 or 8.31 TFLOP."""
    if value is None:
        return MISSING
    power = 0
    while abs(value) >= 1000 and power < len(_SI) - 1 and (unit or power or abs(value) >= 1e6):
        value /= 1000
        power += 1
    return f"{number(value)}{SPACE}{_SI[power]}{unit}".strip()


def size(value: float | None) -> str:
    """Bytes with a binary prefix."""
    if value is None:
        return MISSING
    power = 0
    while abs(value) >= 1024 and power < len(_BINARY) - 1:
        value /= 1024
        power += 1
    return f"{number(value)}{SPACE}{_BINARY[power]}"


def percent(share: float | None) -> str:
    """A share as a percentage: 0.148 -> 14.8 %."""
    return MISSING if share is None else f"{number(share * 100)}{SPACE}%"


def factor(value: float | None) -> str:
    """A quotient: 6.43 -> 6.43 and the multiplication sign."""
    return MISSING if value is None else f"{number(value)}{TIMES}"


def quotient(above: float | None, below: float | None) -> float | None:
    """above / below, None where either is unknown or the quotient has no meaning."""
    if above is None or not below:
        return None
    return above / below

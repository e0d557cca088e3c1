"""Two receipts as rows of a table and as stacked bars of seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vivace.report.units import MISSING, TIMES, count, number, percent, quotient, seconds, size

STAGES = {"text": "Text encoder", "denoise": "Denoising", "vae": "VAE decode", "other": "Other"}

TIMING_NOISE = 0.05
"""Relative change of seconds that is not called a saving or a loss."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; `tone` is `good`, `bad` or empty."""

    label: str
    exact: str
    fast: str
    ratio: str
    tone: str = ""
    group: str = ""
    """`total` or `part-time` for rows in seconds, empty for counted ones."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One stage of a stacked bar; `share` is of the slower run's total."""

    stage: str
    label: str
    share: float
    text: str


def receipt_rows(exact: Mapping[str, Any], fast: Mapping[str, Any]) -> tuple[Row, ...]:
    """Costs of both runs and their ratio; what neither receipt knows is left out."""
    rows = [
        _cost("Wall time", wall_seconds(exact), wall_seconds(fast), seconds, group="total"),
        *(
            _cost(label, _stage(exact, key), _stage(fast, key), seconds, group="part-time")
            for key, label in STAGES.items()
        ),
        _cost(
            "Solver steps", *_both(exact, fast, lambda r: len(r["steps"]) if r.get("steps") else None), number
        ),
        _cost("Network evaluations (NFE)", *_key(exact, fast, "nfe"), number),
        _cost("Transformer blocks run", *_key(exact, fast, "blocks_run"), number),
        _cost("Attention pairs visited", *_key(exact, fast, "attention_pairs"), count),
        _cost("FLOPs executed", *_key(exact, fast, "flops"), lambda v: count(v, "FLOP")),
        _fact("Attention density", *_both(exact, fast, _density), percent),
        _fact("Cache hits", *_key(exact, fast, "cache_hits"), number),
        _fact("Cache memory", *_key(exact, fast, "cache_bytes"), size),
        _cost("Weights in memory", *_key(exact, fast, "weight_bytes"), size),
        _cost("Peak memory", *_key(exact, fast, "peak_bytes"), size),
    ]
    return tuple(row for row in rows if (row.exact, row.fast) != (MISSING, MISSING))


def stage_bars(exact: Mapping[str, Any], fast: Mapping[str, Any]) -> dict[str, tuple[Segment, ...]]:
    """Stacked bars on one scale, keyed `exact` and `fast`; empty when no stage has a time."""
    longest = max(sum(_stage(r, key) or 0.0 for key in STAGES) for r in (exact, fast))
    if not longest:
        return {}
    return {
        name: tuple(
            Segment(stage=key, label=label, share=spent / longest, text=seconds(spent))
            for key, label in STAGES.items()
            if (spent := _stage(receipt, key))
        )
        for name, receipt in (("exact", exact), ("fast", fast))
    }


def wall_seconds(receipt: Mapping[str, Any]) -> float | None:
    """The receipt's total; the sum of its stages where it gives none."""
    stages = receipt.get("stages") or {}
    return stages.get("total", sum(stages.get(key) or 0.0 for key in STAGES) or None)


def _stage(receipt: Mapping[str, Any], key: str) -> float | None:
    return (receipt.get("stages") or {}).get(key)


def _density(receipt: Mapping[str, Any]) -> float | None:
    return quotient(receipt.get("attention_pairs"), receipt.get("attention_pairs_in_run_blocks"))


def _key(exact: Mapping[str, Any], fast: Mapping[str, Any], key: str) -> tuple[Any, Any]:
    return exact.get(key), fast.get(key)


def _both(
    exact: Mapping[str, Any], fast: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Any]
) -> tuple[Any, Any]:
    return read(exact), read(fast)


def _fact(label: str, exact: float | None, fast: float | None, form: Callable[[float | None], str]) -> Row:
    """A row whose ratio says nothing."""
    return Row(label=label, exact=form(exact), fast=form(fast), ratio="")


def _cost(
    label: str, exact: float | None, fast: float | None, form: Callable[[float | None], str], group: str = ""
) -> Row:
    """A row where less is better."""
    ratio, tone = "", ""
    if exact is not None and fast is not None:
        if exact == fast:
            ratio = "same"
        elif group and exact and abs(fast / exact - 1) < TIMING_NOISE:
            ratio = "about the same"
        elif fast < exact:
            ratio, tone = (f"{number(exact / fast)}{TIMES} less" if fast else "none left"), "good"
        else:
            ratio, tone = (f"{number(fast / exact)}{TIMES} more" if exact else "new"), "bad"
    return Row(label=label, exact=form(exact), fast=form(fast), ratio=ratio, tone=tone, group=group)

"""Receipts on the screen: one of a single run, and two beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.cli.shared.screen import facts
from vivace.report.curves import value_text
from vivace.report.units import count, factor, number, percent, seconds, size

if TYPE_CHECKING:
    from rich.table import Table

    from vivace.cli.shared.pair import Pair
    from vivace.core.receipt import Receipt, TechniqueRecord

NOTABLE = 0.1
"""Seconds of setting up that are worth a line."""
STAGES = {"text": "text", "denoise": "denoising", "vae": "decoding"}


def receipt_facts(receipt: Receipt) -> Table:
    """What one generation computed, took and held, and what each technique did."""
    out = facts()
    out.add_row("evaluations", _share(receipt.nfe, receipt.nfe_requested))
    if receipt.blocks_total:
        out.add_row("blocks run", _share(receipt.blocks_run, receipt.blocks_total))
    if receipt.flops_dense:
        saved = (
            f" [quiet]{percent(receipt.compute_share)} of the dense work[/]"
            if receipt.compute_share < 1
            else ""
        )
        out.add_row("compute", f"{count(receipt.flops, 'FLOP')}{saved}")
    if receipt.density < 1:
        out.add_row("attention", f"{percent(receipt.density)} of the pairs")
    if receipt.cache_bytes:
        out.add_row("cache", size(receipt.cache_bytes))
    stages = receipt.stages
    parts = ", ".join(f"{name} {seconds(stages[key])}" for key, name in STAGES.items() if stages.get(key))
    out.add_row("time", f"[bold]{seconds(stages.get('total'))}[/] [quiet]{parts}[/]")
    if receipt.peak_bytes:
        out.add_row("peak memory", size(receipt.peak_bytes))
    for technique in receipt.techniques:
        out.add_row("technique", _technique(technique))
    for kernel in receipt.kernels:
        out.add_row("kernel", f"{kernel.choice} [quiet]for {kernel.op}: {kernel.why}[/]")
    return out


def _share(part: float, whole: float) -> str:
    if part >= whole:
        return number(whole)
    return f"{number(part)} of {number(whole)} [quiet]{percent(part / whole)}[/]"


def _technique(record: TechniqueRecord) -> str:
    effects = ", ".join(f"{number(v)} {k.replace('_', ' ')}" for k, v in record.effects.items())
    return f"[name]{record.name}[/]{f' [quiet]{effects}[/]' if effects else ''}"


def pair_table(pair: Pair) -> Table:
    """What the exact and the fast run cost, line by line, and how much less that is."""
    from rich.markup import escape

    from vivace.cli.shared.screen import table
    from vivace.report.receipt_table import receipt_rows

    out = table("", "exact", escape(pair.plan.name), "", right=(1, 2, 3))
    for row in receipt_rows(*pair.receipts):
        if row.group not in ("", "total"):
            out.add_row(f"[quiet]  {row.label}[/]", f"[quiet]{row.exact}[/]", f"[quiet]{row.fast}[/]", "")
            continue
        ratio = f"[{row.tone}]{row.ratio}[/]" if row.tone else f"[quiet]{row.ratio}[/]"
        out.add_row(row.label, row.exact, row.fast, ratio)
    return out


def pair_facts(pair: Pair) -> Table:
    """The speed-up, the distance of the clips, and what of the prompt they show."""
    from rich.markup import escape

    out = facts()
    share = pair.flops_share
    compute = f" [quiet]with {percent(share)} of the compute[/]" if share is not None else ""
    tone = "gain" if pair.speed_up > 1 else "loss"
    out.add_row("speed-up", f"[{tone}]{factor(pair.speed_up)}[/]{compute}")
    if pair.fast.setup > NOTABLE:
        once = f"{seconds(pair.fast.setup)} to put the plan in force, once and not counted above"
        out.add_row("setup", f"[quiet]{once}[/]")
    for metric in pair.metrics:
        if metric.skipped is not None:
            out.add_row(metric.name.upper(), f"[quiet]skipped: {escape(metric.skipped)}[/]")
            continue
        worst = value_text(metric.per_frame[metric.worst or 0], metric.unit)
        out.add_row(
            metric.name.upper(), f"{value_text(metric.pooled, metric.unit)} [quiet]worst frame {worst}[/]"
        )
    if pair.unchecked:
        out.add_row("prompt", f"[quiet]{escape(pair.unchecked)}[/]")
        return out
    shown = (
        f"exact shows {pair.right('exact')} and {escape(pair.plan.name)} {pair.right('fast')} of {pair.asked}"
    )
    out.add_row(
        "prompt", f"{shown} attributes" if pair.asked else "[quiet]states no attribute that can be checked[/]"
    )
    for check in pair.checks:
        if check.wanted is None or (check.holds(check.exact) and check.holds(check.fast)):
            continue
        seen = f"wanted {check.wanted}, exact {check.exact}, {pair.plan.name} {check.fast}"
        out.add_row("", f"[quiet]{check.name}: {escape(seen)}[/]")
    return out

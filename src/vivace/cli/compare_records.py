"""`vivace compare-records`: two records of one task, series by series, with intervals and verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from vivace.evaluation.compare import Comparison
    from vivace.evaluation.record import Record
    from vivace.evaluation.statistics import Interval
    from vivace.evaluation.store import Store

STYLES = {
    "better": "good",
    "non-inferior": "good",
    "equivalent": "good",
    "worse": "bad",
    "inferior": "bad",
    "undecided": "fair",
    "no margin": "quiet",
}
TITLES = {
    "fidelity": "Fidelity to the exact run (is it the same clip?)",
    "absolute": "Absolute quality (is it a good clip?)",
}
COSTS = {"flops": "FLOPs", "nfe": "network evaluations", "peak_bytes": "peak memory"}


def compare_records(
    first: Annotated[
        str, typer.Argument(metavar="A", help="Record file or id: the candidate.", show_default=False)
    ],
    second: Annotated[
        str, typer.Argument(metavar="B", help="Record file or id: the reference.", show_default=False)
    ],
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder that holds the records of ids.", show_default=False)
    ] = None,
    cross_environment: Annotated[
        bool, typer.Option("--cross-environment", help="Compare quality even across machines.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare two records: A against B, paired clip by clip.

    Every difference is A minus B with its 95 % interval over prompts and a verdict against the metric's margin. Records
    that differ in task, model or machine are refused.
    """
    from vivace.evaluation.compare import compare, series_table

    a, home = _find(first, store)
    b, other = _find(second, store)
    found = compare(a, b, home, other=other, series=series_table(), cross_environment=cross_environment)
    if as_json:
        import json

        typer.echo(json.dumps(found.to_dict(), indent=1))
        return
    _show(found)


def _find(name: str, folder: Path | None) -> tuple[Record, Store]:
    """A record and the store it lies in: of a file the folder above `records`, of an id the given folder."""
    from vivace.core.errors import ConfigError
    from vivace.evaluation.store import Store, load_record

    if name.endswith(".json") or "/" in name:
        path = Path(name)
        return load_record(path), Store(folder or path.resolve().parent.parent)
    if folder is None:
        raise ConfigError(f"'{name}' is an id and needs --store; give the folder, or the record's file.")
    store = Store.existing(folder)
    return store.record(name), store


def _show(found: Comparison) -> None:
    from rich.markup import escape

    from vivace.cli.shared.screen import screen, warn
    from vivace.evaluation.compare import names

    out = screen()
    a, b = map(escape, names(found.a, found.b))
    counts = f", {found.prompts} prompts, {found.samples} clips" if found.prompts else ""
    out.print(f"\n[bold]{a}[/] against [bold]{b}[/]  [quiet]{escape(found.a.task.name)}{counts}[/]")
    for group, family in found.paired.items():
        out.print(_paired_table(TITLES[group], found, family))
    if found.sets:
        out.print(_sets_table(found))
    if found.cost:
        out.print(_cost_table(found))
    if found.paired:
        out.print(
            "[quiet]difference: A minus B with its 95 % interval; Holm p: adjusted for all series of a table; needed: "
            "prompts for 80 % power[/]"
        )
    for note in found.notes:
        warn(note)


def _paired_table(title: str, found: Comparison, family: Any) -> Table:
    from rich.markup import escape

    from vivace.cli.shared.screen import table

    rows = table(
        "series",
        "A",
        "B",
        "difference",
        "margin",
        "Holm p",
        "verdict",
        "needed",
        title=title,
        right=(1, 2, 3, 4, 5, 7),
    )
    for name, r in family.items():
        unit = found.series.get(name, {}).get("unit", "")
        rows.add_row(
            f"[name]{escape(name)}[/]" + (f" [quiet]{escape(unit)}[/]" if unit else ""),
            _number(r.mean_a),
            _number(r.mean_b),
            _span(r.difference, "+.3g"),
            _number(r.margin),
            "<0.001" if r.p_holm < 0.001 else _number(r.p_holm, ".3f"),
            f"[{STYLES[r.verdict]}]{r.verdict}[/]",
            str(r.needed or ""),
        )
    return rows


def _sets_table(found: Comparison) -> Table:
    from rich.markup import escape

    from vivace.cli.shared.screen import table

    rows = table("series", "A", "B", title="Distribution (whole sets)", right=(1, 2))
    for name, pair in found.sets.items():
        cells = [
            f"{_number(e.mean)} [quiet]{escape(f'[{_number(e.low)}, {_number(e.high)}]')}[/]" for e in pair
        ]
        rows.add_row(f"[name]{escape(name)}[/]", *cells)
    return rows


def _cost_table(found: Comparison) -> Table:
    from rich.markup import escape

    from vivace.cli.shared.screen import table

    rows = table("cost", "B over A", "how", title="Cost (above 1: A is cheaper)", right=(1,))
    for name, ratio in found.cost.items():
        label = COSTS.get(name, name.replace("seconds.", "seconds, "))
        rows.add_row(label, _span(ratio, ".3g"), f"[quiet]{escape(ratio.how)}[/]")
    return rows


def _span(found: Interval, form: str) -> str:
    from rich.markup import escape

    number = _number(found.value, form)
    if found.low == found.high or found.low != found.low:
        return number
    return f"{number} [quiet]{escape(f'[{_number(found.low)}, {_number(found.high)}]')}[/]"


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None or value != value else f"{value:{form}}"


__all__ = ["compare_records"]

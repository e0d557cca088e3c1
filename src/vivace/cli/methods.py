"""`vivace methods`: the techniques by family, and what there is to know about one."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vivace.catalogue import Entry

app = typer.Typer(help="The techniques, by family; `methods show NAME` explains one.")


@app.callback(invoke_without_command=True)
def methods(context: typer.Context) -> None:
    """The techniques, by family; `vivace methods show NAME` explains one."""
    if context.invoked_subcommand is not None:
        return
    from rich.markup import escape
    from rich.padding import Padding

    from vivace.catalogue import entries
    from vivace.cli.shared.screen import facts, screen

    out = screen()
    for family, group in groupby(entries(), key=lambda e: e.paradigm):
        out.print(f"\n[bold]{family.capitalize()}[/]")
        for entry in group:
            rows = facts()
            rows.add_row(
                "knobs", escape(", ".join(f"{s.name}={s.default}" for s in entry.settings)) or "none"
            )
            rows.add_row("owns", ", ".join(entry.claims))
            rows.add_row("from", escape(_source(entry)))
            out.print(Padding(f"[name]{entry.name}[/]", (1, 0, 0, 2)))
            out.print(Padding(escape(entry.summary), (0, 0, 0, 4)))
            out.print(Padding(rows, (0, 0, 0, 4)))
    out.print("\n[quiet]vivace methods show NAME explains one of them[/]")


@app.command("show")
def show(name: Annotated[str, typer.Argument(help="Name of a technique.", show_default=False)]) -> None:
    """Explain one technique: the idea, what ours does differently, its knobs, needs and claims."""
    from rich.markup import escape
    from rich.padding import Padding

    from vivace import catalogue
    from vivace.cli.shared.screen import facts, screen, table

    entry = catalogue.entry(name)
    out = screen()
    out.print(f"\n[bold]{entry.name}[/]  [quiet]{entry.paradigm}[/]\n")
    out.print(Padding(escape(entry.idea or entry.summary), (0, 2)), width=min(100, out.width))
    rows = facts()
    rows.add_row("saves", escape(entry.objective))
    rows.add_row("source", escape(_source(entry)))
    if entry.code:
        rows.add_row("their code", escape(entry.code))
    if entry.differs:
        rows.add_row("ours differs", escape(entry.differs))
    rows.add_row("picture", _fidelity(entry))
    rows.add_row("training", f"{entry.training}, calibration {entry.calibration}")
    rows.add_row("owns", ", ".join(entry.claims))
    rows.add_row(
        "needs", ", ".join((*entry.needs, *(f"package {p}" for p in entry.packages))) or "nothing special"
    )
    rows.add_row("samples", "coupled within a batch" if entry.batch_coupled else "independent within a batch")
    for other, why in entry.unsound_with:
        rows.add_row("not with", f"[name]{escape(other)}[/]: {escape(why)}")
    out.print()
    out.print(Padding(rows, (0, 2)))
    if entry.settings:
        knobs = table("knob", "default", "range", "off at", "meaning")
        for s in entry.settings:
            off = "" if s.off is None else str(s.off)
            knobs.add_row(f"[name]{s.name}[/]", *map(escape, (str(s.default), s.span, off, s.doc)))
        out.print()
        out.print(Padding(knobs, (0, 2)))
    out.print("[quiet]  in a plan file:[/]")
    out.print(escape(_yaml(entry)))


def _source(entry: Entry) -> str:
    return entry.source + (f" (arXiv {entry.arxiv})" if entry.arxiv else "")


def _fidelity(entry: Entry) -> str:
    if entry.lossless:
        return "unchanged"
    if entry.fidelity is None:
        return "changes"
    return f"stays within {entry.fidelity:g} relative L2 of the latents at default settings"


def _yaml(entry: Entry) -> str:
    lines = [f"    - technique: {entry.name}"]
    return "\n".join([*lines, *(f"      {s.name}: {_plain(s.default)}" for s in entry.settings)])


def _plain(value: object) -> str:
    import json

    return json.dumps(value)

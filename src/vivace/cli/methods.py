"""`vivace methods`: the field's methods by family, what there is to know about one, and a page of them all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from vivace.catalogue import Entry, Method

app = typer.Typer(help="The methods of the field, by family; `methods show NAME` explains one.")

_COLOURS = {"implemented": "good", "peer": "name", "planned": "fair", "out of scope": "quiet"}
Records = Annotated[
    Path | None,
    typer.Option(help="Folder of records to show our measurements from.", show_default="benchmarks/results"),
]


@app.callback(invoke_without_command=True)
def methods(
    context: typer.Context,
    family: Annotated[
        str | None, typer.Option(help="A family or branch: `attention`, `caching`, `B1`.", show_default=False)
    ] = None,
    status: Annotated[
        str | None,
        typer.Option(help="implemented, peer, planned or `out of scope`.", show_default=False),
    ] = None,
    training: Annotated[
        str | None, typer.Option(help="none, calibration, light or full.", show_default=False)
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, e.g. `wan`.", show_default=False)] = None,
    search: Annotated[str, typer.Option(help="Words that must all occur.", show_default=False)] = "",
    records: Records = None,
    json_: Annotated[bool, typer.Option("--json", help="Print data instead of text.")] = False,
) -> None:
    """The methods of the field, by family; `vivace methods show NAME` explains one."""
    if context.invoked_subcommand is not None:
        return
    from vivace import catalogue

    found = catalogue.select(family=family, status=status, training=training, base=base, text=search)
    measured = _records(records)
    if json_:
        import json

        typer.echo(json.dumps([_data(m, measured) for m in found], indent=1, ensure_ascii=False))
        return
    _list(found, measured)


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Name of a method or a technique.", show_default=False)],
    records: Records = None,
) -> None:
    """Explain one method: the idea, the claims beside our measurement, and what ours does differently."""
    from vivace import catalogue
    from vivace.cli.shared.screen import screen

    ours = {e.name: e for e in catalogue.entries()}
    entry = ours.get(name)
    found = catalogue.methods_of(name) if entry else (catalogue.method(name),)
    entry = entry or ours.get(found[0].technique)
    out, measured = screen(), _records(records)
    for method in found:
        _explain(out, method, measured)
    if entry is not None:
        _technique(out, entry)


@app.command("page")
def page(
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")] = Path(
        "methods.html"
    ),
    records: Records = None,
) -> None:
    """Write all methods as one self-contained page with search and filters."""
    from vivace.catalogue.page import build
    from vivace.cli.shared.output import Outputs

    text = build(_records(records))
    with Outputs() as outputs:
        outputs.reserve(output).write_text(text, encoding="utf-8")
    typer.echo(f"wrote {output}")


def _records(folder: Path | None) -> tuple[dict[str, Any], ...]:
    from vivace.catalogue import read_records
    from vivace.catalogue.measured import DEFAULT_FOLDER
    from vivace.core.errors import ConfigError

    if folder is not None and not folder.is_dir():
        raise ConfigError(
            f"there is no folder {folder}; give the folder that `vivace bench` wrote its records to."
        )
    return read_records(folder or DEFAULT_FOLDER)


def _list(found: tuple[Method, ...], records: tuple[dict[str, Any], ...]) -> None:
    from collections import Counter
    from itertools import groupby

    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table

    from vivace import catalogue
    from vivace.catalogue.field import branch, family
    from vivace.cli.shared.screen import screen

    out = screen()
    for head, members in groupby(found, key=lambda m: family(m).name):
        out.print(f"\n[bold]{head.capitalize()}[/]")
        for sub, group in groupby(members, key=lambda m: m.sub[0]):
            rows = Table.grid(padding=(0, 2))
            rows.add_column(style="name", no_wrap=True, width=24)
            rows.add_column(no_wrap=True, width=12)
            rows.add_column()
            for method in group:
                words = escape(method.gist)
                if method.technique:
                    words += f" [quiet]technique[/] [name]{method.technique}[/]"
                for measured in catalogue.measurements(method, records)[:1]:
                    words += f" [quiet]measured: {escape(measured.words)}[/]"
                rows.add_row(method.name, f"[{_COLOURS[method.status]}]{method.status}[/]", words)
            out.print(Padding(f"[quiet]{branch(sub)}[/]", (1, 0, 0, 2)))
            out.print(Padding(rows, (0, 0, 0, 2)))
    count = Counter(m.status for m in found)
    total = ", ".join(f"{n} {s}" for s in _COLOURS if (n := count[s])) or "none passes these filters"
    out.print(f"\n{len(found)} methods: {total}")
    out.print("[quiet]vivace methods show NAME explains one of them[/]")


def _explain(out: Console, method: Method, records: tuple[dict[str, Any], ...]) -> None:
    from rich.markup import escape
    from rich.padding import Padding

    from vivace import catalogue
    from vivace.catalogue.field import branch, family, related
    from vivace.catalogue.schema import EVIDENCE, OBJECTIVE, TRAINING
    from vivace.cli.shared.screen import facts, table

    out.print(f"\n[bold]{escape(method.title)}[/]  [quiet]{method.name}, {family(method).name}[/]\n")
    out.print(Padding(escape(method.idea), (0, 2)), width=min(100, out.width))
    rows = facts()
    state = f"[{_COLOURS[method.status]}]{method.status}[/]"
    rows.add_row("status", state + (f": {escape(method.reason)}" if method.reason else ""))
    for peer in method.peers:
        rows.add_row("peer", f"[name]{peer.name}[/], {escape(peer.function)}")
    if method.works_with:
        rows.add_row("runs with", ", ".join(method.works_with))
    rows.add_row("branch", ", ".join(branch(s) for s in method.sub))
    rows.add_row("saves", OBJECTIVE[method.objective])
    words = f"; {method.training_words}" if method.training_words else ""
    rows.add_row("training", escape(TRAINING[method.training] + words))
    rows.add_row("shown on", escape(", ".join(method.bases)))
    arxiv = f"arXiv {method.arxiv}" + (" (from memory)" if method.arxiv_recall else "")
    where = ", ".join(w for w in (arxiv if method.arxiv else "", str(method.year)) if w)
    rows.add_row("published", escape(where))
    if method.code:
        rows.add_row("code", escape(method.code))
    rows.add_row("licence", escape(method.licence))
    rows.add_row("known from", EVIDENCE[method.evidence])
    if others := related(method):
        rows.add_row("see also", ", ".join(m.name for m in others))
    out.print()
    out.print(Padding(rows, (0, 2)))
    if method.claims:
        claims = table("claimed", "of", "on", "against", "known from")
        for c in method.claims:
            claims.add_row(*map(escape, (c.text, c.metric, c.hardware, c.against, c.evidence)))
        out.print()
        out.print(Padding(claims, (0, 2)))
    found = catalogue.measurements(method, records)
    for m in found:
        beside = f", together with {', '.join(m.others)}" if m.others else ""
        where = ", ".join(p for p in (m.task, m.environment, m.created[:10], f"record {m.id}") if p)
        out.print(
            Padding(f"measured: [name]{escape(m.contender)}[/] {escape(m.words)}{escape(beside)}", (0, 2))
        )
        out.print(Padding(f"[quiet]{escape(where)}[/]", (0, 4)))
    if not found:
        out.print("  [quiet]not measured here[/]")


def _technique(out: Console, entry: Entry) -> None:
    from rich.markup import escape
    from rich.padding import Padding

    from vivace.cli.shared.screen import facts, table

    out.print(f"\n[bold]Here: {entry.name}[/]  [quiet]{entry.paradigm}[/]\n")
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


def _data(method: Method, records: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """A method as JSON data: what the catalogue holds, its family and branches in words, and what we measured."""
    import dataclasses

    from vivace import catalogue
    from vivace.catalogue.field import branch, family

    return {
        **method.model_dump(mode="json"),
        "family": family(method).name,
        "sub_family": [branch(s) for s in method.sub],
        "measured": [dataclasses.asdict(m) for m in catalogue.measurements(method, records)],
    }


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

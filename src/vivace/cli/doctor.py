"""`vivace doctor`: what this machine has, what can run on it, and what to do about the rest."""

from __future__ import annotations

from typing import Annotated

import typer

from vivace.cli.shared import options

NOT_READY = 1
SHAPE = "Shape for --attention"
MEMORY = "Memory of a clip"


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data instead of tables.")] = False,
    attention: Annotated[
        bool,
        typer.Option(
            "--attention", help="Also time dense and block-sparse attention: from where sparse pays."
        ),
    ] = False,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Whose shape is timed, or whose memory told: as for generate, or a known name.",
            rich_help_panel=SHAPE,
        ),
    ] = "tiny",
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            help="A clip as FRAMESxHEIGHTxWIDTH: what it takes, and what would make it fit.",
            show_default=False,
            rich_help_panel=MEMORY,
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan",
            "-p",
            help="With this plan: a preset or a file; the exact run when left out.",
            show_default=False,
            rich_help_panel=MEMORY,
        ),
    ] = None,
    dtype: Annotated[
        options.DType, typer.Option("--dtype", help="Precision; auto is bf16.", rich_help_panel=MEMORY)
    ] = options.DType.AUTO,
    device_gib: Annotated[
        float | None,
        typer.Option(
            "--device-gib",
            min=0.001,
            help="Memory of the device in GiB, in place of this machine's.",
            show_default=False,
            rich_help_panel=MEMORY,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens, in place of the model's.", show_default=False, rich_help_panel=SHAPE
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Heads, in place of the model's.", show_default=False, rich_help_panel=SHAPE
        ),
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(
            "--head-dim",
            min=1,
            help="Dimensions of a head, in place of the model's.",
            show_default=False,
            rich_help_panel=SHAPE,
        ),
    ] = None,
) -> None:
    """What this machine has and what can run on it.

    With --shape, what a clip takes: memory by component and stage, and the cheapest way to make it fit. Nothing is
    loaded. Exit code 0 when the embedded model can run.
    """
    from vivace.cli.shared import health
    from vivace.cli.shared.screen import screen
    from vivace.core.errors import ConfigError

    if shape is not None:
        from vivace.cli.shared.memory import tell

        tell(model, shape, plan, dtype, device_gib, as_json)
        return
    if plan is not None or device_gib is not None:
        raise ConfigError("memory is told for a clip; add --shape FRAMESxHEIGHTxWIDTH.")
    if not attention and (model != "tiny" or any(x is not None for x in (tokens, heads, head_dim))):
        raise ConfigError("a shape is timed with --attention; add it, or leave the shape out.")

    with screen(stderr=True).status("[quiet]looking around") as status:
        checks = health.examine()
        if attention:
            status.update("[quiet]timing attention")
            checks += health.attention(model, tokens, heads, head_dim)
    ready = not any(c.state == "bad" for c in checks)
    if as_json:
        import dataclasses
        import json

        data = {"ready": ready, "checks": [dataclasses.asdict(c) for c in checks]}
        typer.echo(json.dumps(data, indent=2))
    else:
        _show(checks, ready)
    if not ready:
        raise typer.Exit(NOT_READY)


def _show(checks: list, ready: bool) -> None:
    from itertools import groupby

    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table

    from vivace.cli.shared.screen import DOT, mark, screen

    out = screen()
    for section, group in groupby(checks, key=lambda c: c.section):
        rows = Table.grid(padding=(0, 2))
        rows.add_column(no_wrap=True)
        rows.add_column(style="quiet", no_wrap=True, min_width=16)
        rows.add_column()
        for check in group:
            advice = f" [quiet]{DOT} {escape(check.advice)}[/]" if check.advice else ""
            rows.add_row(mark(check.state), escape(check.name), escape(check.detail) + advice)
        out.print(f"\n[bold]{section}[/]")
        out.print(Padding(rows, (0, 0, 0, 2)))
    verdict = "the embedded model can run here" if ready else "the embedded model cannot run here yet"
    out.print(f"\n{mark('good' if ready else 'bad')} {verdict}")

"""`vivace report`: a folder of records as one page, with the same numbers as Markdown, CSV and Parquet beside it."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

NAME = "report.html"


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder that `vivace bench` wrote.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The page; by default report.html in the folder.", show_default=False
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Only this task.", show_default=False)
    ] = None,
    title: Annotated[str, typer.Option("--title", help="Heading of the page.", show_default=False)] = "",
    browser: Annotated[bool, typer.Option("--open/--no-browser", help="Open the page when done.")] = False,
) -> None:
    """Turn a folder of records into one page.

    Leaderboard, cost against quality, and a page for each method, in one HTML file that needs no network. The same
    numbers lie beside it as Markdown, CSV and Parquet.
    """
    from rich.markup import escape

    from vivace.cli.shared.screen import screen, warn

    board, files = make_report(folder, output, task=task, title=title)
    out = screen()
    for sentence in board["problems"]:
        warn(sentence)
    names = {row["contender"]["name"] for row in board["rows"]}
    places = {(row["task"], row["environment"]) for row in board["rows"]}
    tally = (
        (names, "contender", ""),
        (board["rows"], "record", ""),
        (places, "pair", " of task and machine"),
    )
    out.print(", ".join(f"{len(x)} {word}{'s' if len(x) != 1 else ''}{rest}" for x, word, rest in tally))
    out.print(f"\n[bold]{escape(str(files[0]))}[/]", soft_wrap=True)
    out.print(f"[quiet]beside it: {escape(', '.join(file.name for file in files[1:]))}[/]", soft_wrap=True)
    if browser:
        typer.launch(str(files[0].resolve()))


def make_report(
    folder: Path, output: Path | None = None, *, task: str | None = None, title: str = ""
) -> tuple[Mapping[str, Any], list[Path]]:
    """Builds the board of a store and writes its files; returns the board and the files, the page first.

    All files appear together when the last is complete. Without pyarrow there is no Parquet file.

    Args:
        output: the page; Markdown, CSV and Parquet take its name with another ending.

    Raises:
        StoreError: there is no such folder, or no record in it.
        UnknownNameError: no record is of that task.
        OutputError: a file cannot be written.
    """
    from vivace.cli.shared.output import Outputs
    from vivace.core.errors import OutputError, UnavailableError
    from vivace.evaluation.board import build
    from vivace.evaluation.store import Store
    from vivace.report import export, leaderboard

    page = output or folder / NAME
    if page.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"the page {page} must end in .html; name it so with -o.")
    store = Store.existing(folder)
    board = build(store, task=task, title=title, command=_command(folder, output, task, title))
    clips = _clips(board, folder)
    with Outputs() as outputs:
        hidden = {
            suffix: outputs.reserve(page.with_suffix(suffix)) for suffix in (page.suffix, ".md", ".csv")
        }
        leaderboard.write(board, clips, hidden[page.suffix])
        hidden[".md"].write_text(export.markdown(board), encoding="utf-8")
        export.write_csv(board, hidden[".csv"])
        suffixes = list(hidden)
        with contextlib.suppress(UnavailableError):
            table = export.parquet_bytes(board)
            outputs.reserve(page.with_suffix(".parquet")).write_bytes(table)
            suffixes.append(".parquet")
    return board, [page.with_suffix(suffix) for suffix in suffixes]


def _clips(board: Mapping[str, Any], folder: Path) -> dict[str, bytes]:
    """The clips that the rows name, as far as they are there; a store may have been copied without them."""
    home = folder.resolve()
    found = {}
    for path in dict.fromkeys(path for row in board["rows"] for path in (row.get("clips") or {}).values()):
        file = (home / path).resolve()
        # A record may come from somebody else: nothing outside its store goes into the page.
        if file.is_relative_to(home) and file.is_file():
            found[path] = file.read_bytes()
    return found


def _command(folder: Path, output: Path | None, task: str | None, title: str) -> str:
    parts = ["vivace", "report", str(folder)]
    for option, value in (("--output", output), ("--task", task), ("--title", title)):
        parts += [option, str(value)] if value else []
    return shlex.join(parts)

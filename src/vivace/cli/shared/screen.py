"""The screen: one theme, results on stdout, progress, warnings and errors on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

THEME = {
    "quiet": "bright_black",
    "name": "cyan",
    "good": "green",
    "fair": "yellow",
    "bad": "red",
    "warning": "bold yellow",
    "error": "bold red",
    "gain": "bold green",
    "loss": "bold red",
    "full": "cyan",
    "saved": "green",
}
"""`full` and `saved` colour the steps of a run: computed in full, or with something left out."""

TICK, CROSS, DOT = "\N{CHECK MARK}", "\N{BALLOT X}", "\N{MIDDLE DOT}"


def screen(*, stderr: bool = False) -> Console:
    """The console of stdout or stderr, as the stream is now (tests and pagers replace it)."""
    from rich.console import Console
    from rich.theme import Theme

    return Console(theme=Theme(THEME), stderr=stderr, highlight=False)


def fail(sentence: str, code: int = 2) -> int:
    """Print an error sentence on stderr, unbroken, and hand the exit code through."""
    _say("error", sentence)
    return code


def warn(sentence: str) -> None:
    """Print a warning on stderr."""
    _say("warning", sentence)


def _say(word: str, sentence: str) -> None:
    from rich.text import Text

    # soft_wrap: a terminal may break the line, Vivace does not; a log keeps one sentence on one line.
    sys.stdout.flush()
    screen(stderr=True).print(Text.assemble((f"{word}: ", word), sentence), soft_wrap=True)


def table(*columns: str, title: str = "", right: Iterable[int] = ()) -> Table:
    """A table without lines but one under its head. `right` numbers the columns that hold figures."""
    from rich import box
    from rich.table import Table

    out = Table(
        box=box.SIMPLE_HEAD,
        title=title or None,
        title_justify="left",
        title_style="bold",
        header_style="quiet",
        border_style="quiet",
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for index, name in enumerate(columns):
        out.add_column(name, justify="right" if index in right else "left")
    return out


def facts() -> Table:
    """A borderless grid: a quiet label and its value."""
    from rich.table import Table

    out = Table.grid(padding=(0, 2))
    out.add_column(style="quiet", no_wrap=True)
    out.add_column()
    return out


@cache
def fancy(encoding: str) -> bool:
    """Whether a terminal of this encoding can show the marks above."""
    try:
        (TICK + CROSS).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def mark(state: str) -> str:
    """A coloured sign for `good`, `fair` or `bad`, in words where the terminal has no such sign."""
    signs = {"good": TICK, "fair": DOT, "bad": CROSS}
    plain = {"good": "ok", "fair": "-", "bad": "NO"}
    sign = (signs if fancy(sys.stdout.encoding or "ascii") else plain)[state]
    return f"[{state}]{sign}[/]"

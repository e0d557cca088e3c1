"""The progress line of one run: a little chart of the work of every step, the count, and the time left.

The height of a bar is the share of the step's blocks that were computed; a low green bar is work saved.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from vivace.cli.shared.screen import fancy, screen

if TYPE_CHECKING:
    from rich.text import Text

    from vivace.core.context import Clock
    from vivace.core.receipt import StepRecord

WIDEST, BESIDE = 50, 48
"""Most columns of the chart, and the columns that the words beside it take; a column may stand for several steps."""
BARS = "".join(chr(0x2581 + i) for i in range(6))
"""Lower one eighth block to lower three quarters: a full step leaves some air below the line above."""
PLAIN_BARS = "._-=*#"


class Steps:
    """Listens to the steps of a run (`on_step`) and draws them on stderr; one final line where nobody watches.

    Args:
        label: what is running.
        total: expected number of steps; the clock's own number replaces it.
    """

    def __init__(self, label: str, total: int) -> None:
        from rich.live import Live

        console = screen(stderr=True)
        self._label, self._total, self._note = label, total, "encoding the prompt"
        self._shares: list[float] = []
        self._reused = self._skipped = 0
        self._stopped = False
        self._bars = BARS if fancy(console.encoding) else PLAIN_BARS
        self._width = max(10, min(WIDEST, console.width - BESIDE))
        self._start = self._first = time.monotonic()
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self.line)

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        """A step ended: the session's listener."""
        if not self._shares:
            # The first step starts after loading and text encoding, which say nothing about the pace.
            self._first = time.monotonic() - (record.seconds or 0.0)
        self._total = clock.num_steps
        self._shares.append(_share(record))
        actions = [b.action for b in record.branches]
        self._reused += actions.count("reused")
        self._skipped += actions.count("skipped")
        self._note = "decoding" if len(self._shares) == self._total else self._saved()

    def line(self) -> Text:
        """The line as it stands now."""
        from rich.text import Text

        out = Text(no_wrap=True, overflow="ellipsis")
        out.append(f"{self._label:<12}", "bold")
        out.append_text(self._chart())
        out.append(f"  {len(self._shares):>2}/{self._total}")
        out.append(f"  {self._times()}  {self._note}", "quiet")
        return out

    def _times(self) -> str:
        now, done = time.monotonic(), len(self._shares)
        if not 1 < done < self._total or self._stopped:
            return _clock(now - self._start)
        left = (now - self._first) / done * (self._total - done)
        return f"{_clock(now - self._start)}, {_clock(left)} left"

    def _saved(self) -> str:
        counts = ((self._reused, "reused"), (self._skipped, "skipped"))
        return ", ".join(f"{n} {what}" for n, what in counts if n)

    def _chart(self) -> Text:
        """One column per step (or per few steps), done ones as bars, the others as dots."""
        from rich.text import Text

        out, total = Text(), max(self._total, 1)
        columns = min(total, self._width)
        repeat = max(1, min(4, self._width // total))
        for column in range(columns):
            start, stop = column * total // columns, (column + 1) * total // columns
            done = self._shares[start:stop]
            if len(done) < stop - start:
                out.append(("\N{MIDDLE DOT}" if self._bars == BARS else " ") * repeat, "quiet")
                continue
            share = sum(done) / len(done)
            out.append(
                self._bars[round(share * (len(self._bars) - 1))] * repeat,
                "full" if share > 1 - 1e-6 else "saved",
            )
        return out

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        if self._live.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._note = self._saved() if kind is None else "stopped"
        self._live.stop()
        if not self._live.console.is_terminal:
            self._live.console.print(self.line())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _share(record: StepRecord) -> float:
    """Share of a step's blocks that were computed; of its calls, where the model's blocks are unknown."""
    total = sum(b.blocks_total for b in record.branches)
    if total:
        return min(1.0, sum(b.blocks_run for b in record.branches) / total)
    calls = [b.action != "skipped" for b in record.branches]
    return sum(calls) / len(calls) if calls else 0.0

"""An interruption of a training run that waits for the end of an update, so that nothing learned is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interruption:
    """An interruption that may have come, and what it would have done."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.number != 0

    def act(self) -> None:
        """Do now what the interruption would have done at once: Ctrl-C raises KeyboardInterrupt."""
        self._restore()
        signal.raise_signal(self.number)

    def _hold(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        second, self.number = bool(self), number
        if second:
            self.act()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None: the handler was not set from Python, and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def held_interruption(held: bool = True) -> Iterator[Interruption]:
    """Ctrl-C and a polite kill are noted while the block lasts; a second one acts at once.

    Args:
        held: False changes nothing, as in one of several processes, which would stop at different updates; nor does a
            thread that is not the main one, where signals cannot be handled.
    """
    found = Interruption()
    if held and threading.current_thread() is threading.main_thread():
        found._hold()
    try:
        yield found
    finally:
        found._restore()


__all__ = ["Interruption", "held_interruption"]

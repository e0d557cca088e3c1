"""An interruption waits for the update that it fell into, and for its checkpoint."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest
import torch

from vivace.tiny.train.common import Budget, Processes
from vivace.training.interruption import held_interruption
from vivace.training.loop import train

HERE = Processes(0, 1, torch.device("cpu"))


def trained(
    number: int, times: int = 1, processes: Processes = HERE
) -> tuple[list[int], list[dict[str, Any]]]:
    """Updates that were ended and what was kept, of a run of 5 updates that is interrupted in the third."""
    ended: list[int] = []
    kept: list[dict[str, Any]] = []

    def update(step: int, progress: float) -> torch.Tensor:
        if step == 3:
            for _ in range(times):
                signal.raise_signal(number)
        ended.append(step)
        return torch.ones(())

    try:
        train(update, kept.append, Budget(None, 5), processes)
    except (KeyboardInterrupt, SystemExit):
        return ended, kept
    raise AssertionError("it was not interrupted")


def test_an_update_is_ended_and_kept() -> None:
    ended, kept = trained(signal.SIGINT)
    assert ended == [1, 2, 3]
    assert [k["step"] for k in kept] == [3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_polite_kill_does_what_it_did_before_behind_the_checkpoint() -> None:
    def stop(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        ended, kept = trained(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (ended, [k["step"] for k in kept]) == ([1, 2, 3], [3])


def test_the_second_interruption_acts_at_once() -> None:
    assert trained(signal.SIGINT, 2) == ([1, 2], [])


def test_several_processes_are_interrupted_at_once() -> None:
    """They would stop at different updates."""
    with pytest.raises(KeyboardInterrupt), held_interruption(False):
        signal.raise_signal(signal.SIGINT)


def test_threads_that_cannot_hold_signals_go_on() -> None:
    said: list[bool] = []

    def work() -> None:
        with held_interruption() as found:
            said.append(bool(found))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == [False]


def test_nothing_came() -> None:
    before = signal.getsignal(signal.SIGINT)
    with held_interruption() as found:
        assert not found
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before

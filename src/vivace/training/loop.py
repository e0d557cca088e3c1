"""The loop that trainers share: updates until a budget is spent, progress lines, a curve, checkpoints."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vivace.core.errors import VivaceError
from vivace.tiny.train.common import Budget, Processes
from vivace.training.interruption import held_interruption

LINE_EVERY = 10.0
"""Seconds between progress lines."""


def train(
    update: Callable[[int, float], Tensor],
    save: Callable[[dict[str, Any]], None],
    budget: Budget,
    processes: Processes,
    state: Mapping[str, Any] | None = None,
    *,
    save_every: float = 60.0,
    stop_after: int | None = None,
    look_every: int = 5,
    told: Mapping[str, Callable[[], Any]] | None = None,
    enough: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Train until the budget is spent; its clock starts now.

    A process that trains alone and is interrupted ends its update and keeps a checkpoint first.

    Args:
        update: makes update number `step` at a progress from 0 to 1, and returns the loss on the device.
        save: keeps a checkpoint; is given what this loop needs to go on (`step`, `curve`, `seconds`). Called on the
            leading process only.
        state: of the checkpoint that is taken up.
        save_every: seconds between checkpoints.
        stop_after: updates after which to stop as an interruption would, with a checkpoint (for tests).
        look_every: updates after which the device is waited for and the clock read, where the budget is in minutes.
        told: further columns of the curve and the progress lines.
        enough: asked after every update; the run ends where it says so.

    Returns:
        `steps`, `seconds`, `finished` (whether the budget is spent), `curve_columns` and `curve`, whose losses are
        means since the line before.

    Raises:
        KeyboardInterrupt: as said, behind the checkpoint.
    """
    step, curve, told = 0, [], told or {}
    if state is not None:
        step, curve, budget.spent = state["step"], state["curve"], state["seconds"]
        processes.say(f"resumed at step {step} after {budget.spent:.0f} s")
    budget.started = time.perf_counter()
    progress = processes.agree(budget.progress(step))
    saved = line = time.perf_counter()
    total, since = torch.zeros((), device=processes.device), 0
    with held_interruption(processes.world == 1) as interruption:
        while progress < 1.0:
            total, since, step = total + update(step + 1, progress), since + 1, step + 1
            if budget.steps is not None:
                progress = budget.progress(step)
            elif step % look_every == 0:
                total.item()  # waits for the device, which keeps the clock honest
                progress = processes.agree(budget.progress(step))
            if enough is not None and enough():
                progress = 1.0
            now, stopped = time.perf_counter(), bool(interruption)
            if progress >= 1.0 or now - line > LINE_EVERY:
                more = {name: value() for name, value in told.items()}
                curve.append(
                    [step, round(budget.seconds(), 1), round(float(total) / since, 5), *more.values()]
                )
                tail = "".join(f", {name} {value}" for name, value in more.items())
                processes.say(
                    f"step {step} {budget.seconds():.0f} s {100 * progress:.0f} %: loss {curve[-1][2]:.4f}{tail}"
                )
                total, since, line = torch.zeros_like(total), 0, now
            if progress >= 1.0 or now - saved > save_every or step == stop_after or stopped:
                if processes.leads:
                    save({"step": step, "curve": curve, "seconds": budget.seconds()})
                saved = time.perf_counter()
            if stopped:
                interruption.act()
            if step == stop_after:
                break
    return {
        "steps": step,
        "seconds": round(budget.seconds(), 1),
        "finished": progress >= 1.0,
        "curve_columns": ["step", "seconds", "loss", *told],
        "curve": curve,
    }


def command(main: Callable[[], Any]) -> None:
    """Run a trainer as a program: what is wrong with the input is one sentence and code 2, an interruption 130."""
    try:
        main()
    except VivaceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "interrupted; the same command goes on from the last step, or anew where training had not begun.",
            file=sys.stderr,
        )
        sys.exit(130)

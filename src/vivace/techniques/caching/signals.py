"""Signals: one number per sample that says how much has changed, measured before a span of the network is run.

All values are relative mean absolute changes (fp32 scalars on the device). A signal looks at the rows that vote (the
conditional ones); `reference` says against what: the previous step, or the last computed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vivace.core.context import Clock
from vivace.techniques.caching.memory import Memory, RowName

if TYPE_CHECKING:
    import torch


@dataclass(slots=True, eq=False)
class Moment:
    """Where a decision is made. Shapes: `entry` and `hidden` (B, S, C), before block 0 and before the span.

    At the level of the whole network both are the latents (B, C, T, H, W), and `time` is the timestep (B,).
    """

    who: list[RowName]
    hidden: torch.Tensor
    entry: torch.Tensor
    time: torch.Tensor | None = None
    text: torch.Tensor | None = None
    text_entry: torch.Tensor | None = None
    clock: Clock | None = None
    """Where the generation stands: step, noise level, and the token grid of the evaluation."""


def relative_change(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """mean|now - before| / mean|before| as a float32 scalar on the device."""
    import torch

    return (now - before).abs().mean(dtype=torch.float32) / before.abs().mean(dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class Signal:
    """Base: the change of `look(moment, row)` since its reference."""

    reference: str = "computed"

    def look(self, moment: Moment, row: int) -> torch.Tensor:
        """What is compared: a tensor of one row."""
        return moment.hidden[row]

    def measure(self, memory: Memory, moment: Moment, row: int) -> torch.Tensor:
        """The change of one row; infinite where there is nothing to compare with."""
        import torch

        marks, now = memory.row(moment.who[row]).marks, self.look(moment, row)
        before = marks.get("before")
        marks["now"] = now
        if before is None:
            return torch.full((), float("inf"), device=now.device)
        return relative_change(now, before)

    def after(self, memory: Memory, moment: Moment, row: int, out: Any, computed: bool) -> None:
        """The step is over for a row; `out` is the span's output of that row."""
        marks = memory.row(moment.who[row]).marks
        now = marks.pop("now", None)
        if now is not None and (computed or self.reference == "step"):
            # A view would keep the whole batch in memory.
            marks["before"] = now.clone() if len(moment.who) > 1 else now


@dataclass(frozen=True, slots=True)
class FrontResidual(Signal):
    """What the front blocks added to the video stream (first-block cache, DBCache)."""

    def look(self, moment: Moment, row: int) -> torch.Tensor:
        return moment.hidden[row] - moment.entry[row]


@dataclass(frozen=True, slots=True)
class TimeEmbedding(Signal):
    """The time embedding handed to the blocks; the timestep itself where blocks get none."""

    reference: str = "step"

    def look(self, moment: Moment, row: int) -> torch.Tensor:
        return moment.hidden[row] if moment.time is None else moment.time[row]


@dataclass(frozen=True, slots=True)
class TransformationRate(Signal):
    """EasyCache: the output's change from the last step, as the input's change times a rate measured before.

    For the whole network: `hidden` are the latents x and `out` is the output v. With R the last computed step and Q
    the one before: mean|v_R - v_Q| / mean|x_R - x_Q| * mean|x_t - x_(t-1)| / mean|v_R|.
    """

    reference: str = "step"

    def measure(self, memory: Memory, moment: Moment, row: int) -> torch.Tensor:
        import torch

        marks, now = memory.row(moment.who[row]).marks, self.look(moment, row)
        marks["now"] = now
        if "rate" not in marks:
            return torch.full((), float("inf"), device=now.device)
        moved = (now - marks["before"]).abs().mean(dtype=torch.float32)
        return marks["rate"] * moved / marks["output"].abs().mean(dtype=torch.float32)

    def after(self, memory: Memory, moment: Moment, row: int, out: Any, computed: bool) -> None:
        import torch

        marks = memory.row(moment.who[row]).marks
        if (now := marks.pop("now", None)) is None:
            return
        if len(moment.who) > 1:
            # A view would keep the whole batch in memory.
            now, out = now.clone(), out.clone() if computed else out
        if computed:
            if "input" in marks:
                moved = (now - marks["input"]).abs().mean(dtype=torch.float32)
                marks["rate"] = (out - marks["output"]).abs().mean(dtype=torch.float32) / moved
            marks["input"], marks["output"] = now, out
        marks["before"] = now


@dataclass(frozen=True, slots=True)
class Probe(Signal):
    """DiCache: the change of the stream after the front blocks from step to step.

    Of every row, whether it votes or not, `marks["probes"]` holds what the front blocks added at the last two computed
    steps, newest first.
    """

    reference: str = "step"

    def after(self, memory: Memory, moment: Moment, row: int, out: Any, computed: bool) -> None:
        Signal.after(self, memory, moment, row, out, computed)
        if computed:
            marks = memory.row(moment.who[row]).marks
            marks["probes"] = (moment.hidden[row] - moment.entry[row], *marks.get("probes", ())[:1])


@dataclass(frozen=True, slots=True)
class ResidualRate(Signal):
    """AdaCache: how much the span's residual changed per step between the last two computed steps, scaled by motion.

    It is known once a step was computed, so it stays the same until the next one; infinite before the second.
    """

    motion: float = 1.0

    def measure(self, memory: Memory, moment: Moment, row: int) -> torch.Tensor:
        import torch

        marks = memory.row(moment.who[row]).marks
        marks["votes"] = True
        return marks.get("rate", torch.full((), float("inf"), device=moment.hidden.device))

    def after(self, memory: Memory, moment: Moment, row: int, out: Any, computed: bool) -> None:
        marks = memory.row(moment.who[row]).marks
        if not computed or not marks.pop("votes", False) or moment.clock is None:
            return
        step, residual, score = moment.clock.step, out - moment.hidden[row], None
        if self.motion:
            score = motion_score(residual, moment.clock)
        if "residual" in marks:
            gap = step - marks["step"]
            rate = relative_change(residual, marks["residual"]) / gap
            if score is not None and marks["score"] is not None:
                lively = (score + (score - marks["score"]) / gap).clamp_min(0.0)
                rate = rate * (1.0 - self.motion + self.motion * lively)
            marks["rate"] = rate
        marks.update(residual=residual, score=score, step=step)


def motion_score(value: torch.Tensor, clock: Clock) -> torch.Tensor | None:
    """Mean change of a row's tokens (S, C) from frame to frame, relative to their size; None without frames."""
    import torch

    grid = clock.evaluation.grid if clock.evaluation is not None else None
    if grid is None or grid.frames < 2 or value.shape[0] != grid.frames * grid.height * grid.width:
        return None
    frames = value.unflatten(0, (grid.frames, -1))
    size = frames[1:].abs().mean(dtype=torch.float32)
    return (frames[1:] - frames[:-1]).abs().mean(dtype=torch.float32) / size

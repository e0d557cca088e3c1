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

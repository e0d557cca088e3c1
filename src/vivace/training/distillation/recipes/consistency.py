"""Consistency: the same end from two neighbouring points of a teacher's trajectory (LCM, VideoLCM, PCM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vivace.training.distillation.recipe import Recipe, Told, Turn
from vivace.training.losses.consistency import consistency_loss, phased_consistency_loss
from vivace.training.losses.paths import shifted_times


@dataclass(frozen=True, kw_only=True)
class Consistency(Recipe):
    """LCM (arXiv:2310.04378) and VideoLCM (arXiv:2312.09109): from any point straight to the clip.

    It differs: the student without gradient is its own target network, as in later work (arXiv:2310.14189); the
    teacher's guidance is fixed and not told to the student.

    Attributes:
        intervals: steps of the teacher's sampler between whose times points and their successors are drawn.
        huber: constant of the pseudo-Huber distance.
    """

    name: ClassVar[str] = "lcm"
    paper: ClassVar[str] = "2310.04378"
    summary: ClassVar[str] = "latent consistency: from every point of a trajectory straight to its clip"
    solver: ClassVar[str] = "consistency"
    intervals: int = 50
    huber: float = 1e-3

    def student(self, turn: Turn) -> tuple[Tensor, Told]:
        """A guided teacher's step from a point, and the same end from both."""
        s, r = neighbours(turn, self.intervals)
        own = turn.velocity
        loss = consistency_loss(
            own, own, turn.team.guided(turn.batch, self.guidance), turn.point(s), s, r,
            huber=self.huber, weight=self.weight(turn),
        )  # fmt: skip
        return loss, {}


@dataclass(frozen=True, kw_only=True)
class PhasedConsistency(Consistency):
    """PCM (arXiv:2405.18407): consistent within phases, as many as the student has steps; sampled without fresh noise.

    It differs: no adversarial consistency (see `dcm`'s losses for that), and the target network is the student.
    """

    name: ClassVar[str] = "pcm"
    paper: ClassVar[str] = "2405.18407"
    summary: ClassVar[str] = (
        "phased consistency: from every point to the end of its phase, deterministic sampling"
    )
    solver: ClassVar[str] = "flow"

    def student(self, turn: Turn) -> tuple[Tensor, Told]:
        """The same end of the phase from a point and from its successor."""
        s, r = neighbours(turn, self.intervals)
        edges = self.levels(turn.team.shift).flip(0).to(s.device)
        own = turn.velocity
        loss = phased_consistency_loss(
            own, own, turn.team.guided(turn.batch, self.guidance), turn.point(s), s, r, edges,
            huber=self.huber, weight=self.weight(turn),
        )  # fmt: skip
        return loss, {}


def neighbours(turn: Turn, intervals: int) -> tuple[Tensor, Tensor]:
    """Times s and the next lower ones r (B,) of a sampler with so many steps; every step is drawn as often."""
    times = shifted_times(intervals, turn.team.shift, device=turn.clean.device)
    number = (turn.chance.spread(turn.clean) * intervals).long().clamp_max(intervals - 1)
    return times[number], torch.where(number + 1 == intervals, 0.0, times[number + 1])

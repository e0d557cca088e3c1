"""Consistency: the same end from two neighbouring points of a teacher's trajectory (LCM, VideoLCM, PCM, DCM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vivace.core.errors import ConfigError
from vivace.training.distillation.recipe import Recipe, Told, Turn
from vivace.training.losses.consistency import (
    consistency_loss,
    consistency_pair,
    detail_discriminator_loss,
    detail_expert_loss,
    phase_end,
    phased_consistency_loss,
    semantic_expert_loss,
)
from vivace.training.losses.distribution import times_between
from vivace.training.losses.paths import renoise, shifted_times


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

    It differs: no adversarial consistency (see `dcm` for that), and the target network is the student.
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


@dataclass(frozen=True, kw_only=True)
class DualConsistency(Consistency):
    """DCM (arXiv:2506.03123): above a time layout and motion are learned, below it details, by losses of their own.

    Above, ends must also change alike from frame to frame; below, a discriminator compares the two ends. It differs:
    one network learns both, in turns drawn at random, where the paper trains two experts that are asked one after the
    other; phases are PCM's, one for each step.

    Attributes:
        boundary: the time between the two. coherence: weight of the changes; stride: latent frames between them.
        adversarial, features: weights of the discriminator's opinion and of its features.
    """

    name: ClassVar[str] = "dcm"
    paper: ClassVar[str] = "2506.03123"
    summary: ClassVar[str] = "phased consistency with motion above a time and a discriminator below it"
    solver: ClassVar[str] = "flow"
    roles: ClassVar[frozenset[str]] = frozenset({"critic", "head"})
    boundary: float = 0.75
    coherence: float = 1.0
    stride: int = 3
    adversarial: float = 0.1
    features: float = 0.2
    critic_rate: float = 5e-5

    def turns(self, update: int) -> tuple[str, ...]:
        """Both."""
        return ("critic", "student")

    def student(self, turn: Turn) -> tuple[Tensor, Told]:
        """One of the two, as often the one as the other."""
        own, teacher = turn.velocity, turn.team.guided(turn.batch, self.guidance)
        semantic = turn.chance.below(2) == 1
        s, r, end = self._points(turn, semantic=semantic)
        x, r = turn.point(s), torch.maximum(r, end)
        if semantic:
            stride = min(self.stride, turn.clean.shape[2] - 1)
            return semantic_expert_loss(
                own, own, teacher, x, s, r, end=end, coherence=self.coherence if stride else 0.0,
                stride=max(1, stride), huber=self.huber, weight=self.weight(turn),
            )  # fmt: skip
        loss, _, _, told = detail_expert_loss(
            own, own, teacher, turn.team.opinion(turn.batch), x, s, r, times_between(end, s, generator=turn.chance),
            turn.chance.normal(x), end=end, adversarial=self.adversarial, features=self.features,
            huber=self.huber, weight=self.weight(turn),
        )  # fmt: skip
        return loss, told

    def critic(self, turn: Turn) -> tuple[Tensor, Told]:
        """To tell the ends from the student's points from those from their successors, below the boundary."""
        own, teacher = turn.velocity, turn.team.guided(turn.batch, self.guidance)
        s, r, end = self._points(turn, semantic=False)
        at, noise = times_between(end, s, generator=turn.chance), turn.chance.normal(turn.clean)
        with torch.no_grad():
            ends = consistency_pair(own, own, teacher, turn.point(s), s, torch.maximum(r, end), end)
        fake, real = (renoise(x, end, at, noise) for x in ends)
        return detail_discriminator_loss(turn.team.opinion(turn.batch), fake, real, at), {}

    def _points(self, turn: Turn, *, semantic: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Times s, their successors r and the ends of their phases, all (B,), on one side of the boundary."""
        low, high = (self.boundary, 1.0) if semantic else (0.0, self.boundary)
        s, r = neighbours(turn, self.intervals, low=low, high=high)
        edges = self.levels(turn.team.shift).flip(0).to(s.device)
        return s, r, phase_end(s, edges)


def neighbours(turn: Turn, intervals: int, *, low: float = 0.0, high: float = 1.0) -> tuple[Tensor, Tensor]:
    """Times s and the next lower ones r (B,) of a sampler with so many steps; every step is drawn as often.

    Args:
        low, high: only steps that begin above `low` and not above `high`.

    Raises:
        ConfigError: there is none.
    """
    times = shifted_times(intervals, turn.team.shift)
    inside = [k for k, t in enumerate(times[:-1].tolist()) if low < t <= high + 1e-6]
    if not inside:
        raise ConfigError(
            f"none of {intervals} steps begins between {low:g} and {high:g}; move the boundary."
        )
    times = times.to(turn.clean.device)
    place = (turn.chance.spread(turn.clean) * len(inside)).long().clamp_max(len(inside) - 1)
    number = inside[0] + place
    return times[number], torch.where(number + 1 == intervals, 0.0, times[number + 1])

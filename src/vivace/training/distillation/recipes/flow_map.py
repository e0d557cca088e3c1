"""Flow maps: MeanFlow from a teacher, and maps from any time to any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vivace.training.distillation.recipe import Recipe, Told, Turn
from vivace.training.losses.flow_map import any_step_loss, instantaneous_velocity, mean_flow_loss


@dataclass(frozen=True, kw_only=True)
class MeanFlow(Recipe):
    """MeanFlow (arXiv:2505.13447), distilled: the velocity at a point is the guided teacher's.

    Attributes:
        flow: share of samples with r = s, which learn the velocity itself.
        power: of the adaptive weight.
        derivative: `jvp`, or `difference` where kernels have no forward mode (float32 only).
    """

    name: ClassVar[str] = "meanflow"
    paper: ClassVar[str] = "2505.13447"
    summary: ClassVar[str] = "mean velocity between any two times, with a forward-mode derivative"
    solver: ClassVar[str] = "flow_map"
    roles: ClassVar[frozenset[str]] = frozenset({"second_time"})
    flow: float = 0.5
    power: float = 1.0
    derivative: str = "jvp"
    rate: float = 2e-4

    def student(self, turn: Turn) -> tuple[Tensor, Told]:
        """The map against the velocity less what the map changes along the way."""
        s, r = two_times(turn, self.flow)
        x, velocity = instantaneous_velocity(
            turn.clean, turn.chance.normal(turn.clean), s, teacher=turn.team.guided(turn.batch, self.guidance)
        )
        return mean_flow_loss(
            turn.team.eager.flow_map(turn.text), x, s, r, velocity,
            power=self.power, derivative=self.derivative, weight=self.weight(turn),  # pyright: ignore[reportArgumentType]
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AnyStep(Recipe):
    """A map that composes (AnyFlow-type, arXiv:2605.13724; shortcut models, arXiv:2410.12557), without derivatives.

    Attributes:
        boundary: weight of the map at r = s, against the teacher.
    """

    name: ClassVar[str] = "anystep"
    paper: ClassVar[str] = "2605.13724"
    summary: ClassVar[str] = "flow map that composes, tied to the teacher at equal times"
    solver: ClassVar[str] = "flow_map"
    roles: ClassVar[frozenset[str]] = frozenset({"second_time"})
    boundary: float = 1.0
    rate: float = 2e-4

    def student(self, turn: Turn) -> tuple[Tensor, Told]:
        """One step against two of its own."""
        s, r = two_times(turn, 0.0)
        middle = r + turn.chance.uniform(s) * (s - r)
        own = turn.team.student.flow_map(turn.text)
        teacher = turn.team.guided(turn.batch, self.guidance)
        return any_step_loss(
            own, own, teacher, turn.point(s), s, middle, r, boundary=self.boundary, weight=self.weight(turn)
        )


def two_times(turn: Turn, same: float) -> tuple[Tensor, Tensor]:
    """Times s and r <= s (B,), shifted as the teacher's; equal for a share of the samples."""
    a, b = turn.times(0.0, 1.0), turn.times(0.0, 1.0)
    s, r = torch.maximum(a, b).clamp_min(1e-3), torch.minimum(a, b)
    return s, torch.where(turn.chance.uniform(s) < same, s, torch.minimum(r, s))

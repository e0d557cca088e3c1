"""Regression on what a teacher's steps do: progressive and guidance distillation, reflow, PeRFlow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vivace.training.distillation.recipe import Recipe, Told, Turn
from vivace.training.losses.paths import distance, weighted_mean
from vivace.training.losses.progressive import progressive_loss
from vivace.training.losses.rectified import perflow_loss, reflow_loss


@dataclass(frozen=True, kw_only=True)
class Progressive(Recipe):
    """Progressive distillation (arXiv:2202.00512): a student's step does what several of the teacher's do.

    It differs: in one stage, by `substeps` Euler steps of the guided teacher, in the place of a chain of halvings.

    Attributes:
        substeps: of the teacher in a step of the student.
    """

    name: ClassVar[str] = "progressive"
    paper: ClassVar[str] = "2202.00512"
    summary: ClassVar[str] = "one step does what several guided steps of the teacher do"
    substeps: int = 6

    def student(self, turn: Turn) -> tuple[Tensor, Told]:
        """The student's velocity at its levels against the mean velocity of the teacher's steps."""
        times = self.levels(turn.team.shift).to(turn.clean.device)
        number = (turn.chance.spread(turn.clean) * self.steps).long().clamp_max(self.steps - 1)
        s, r = times[number], times[number + 1]
        loss = progressive_loss(
            turn.velocity, turn.team.guided(turn.batch, self.guidance), turn.point(s), s, r,
            steps=self.substeps, weight=self.weight(turn),
        )  # fmt: skip
        return loss, {}


@dataclass(frozen=True, kw_only=True)
class Guidance(Recipe):
    """Guidance distillation (arXiv:2210.03142): the guided velocity in one evaluation. Halves the evaluations.

    It differs: one scale, which the student is not told.
    """

    name: ClassVar[str] = "guidance"
    paper: ClassVar[str] = "2210.03142"
    summary: ClassVar[str] = "the guided velocity in one evaluation, with the teacher's number of steps"
    steps: int = 50

    def student(self, turn: Turn) -> tuple[Tensor, Told]:
        """Error of the velocity against the guided teacher's."""
        s = turn.times(0.0, 1.0)
        x = turn.point(s)
        target = turn.team.guided(turn.batch, self.guidance)(x, s)
        return weighted_mean(distance(turn.velocity(x, s), target), self.weight(turn)), {}


@dataclass(frozen=True, kw_only=True)
class Reflow(Recipe):
    """Rectified flow (arXiv:2209.03003; InstaFlow, arXiv:2309.06380): straight lines between a teacher's pairs.

    Needs pairs of noise and clip: `vivace encode --from teacher`.
    """

    name: ClassVar[str] = "reflow"
    paper: ClassVar[str] = "2209.03003"
    summary: ClassVar[str] = "straight lines between a teacher's noise and clips (needs teacher pairs)"
    fields: ClassVar[tuple[str, ...]] = ("latents", "text", "noise")

    def student(self, turn: Turn) -> tuple[Tensor, Told]:
        """Flow matching on the teacher's pairs."""
        noise = turn.batch["noise"].float()
        loss = reflow_loss(turn.velocity, turn.clean, noise, turn.times(0.0, 1.0), weight=self.weight(turn))
        return loss, {}


@dataclass(frozen=True, kw_only=True)
class PiecewiseFlow(Recipe):
    """PeRFlow (arXiv:2405.07510): straight pieces between the student's levels.

    Attributes:
        substeps: of the teacher in a piece.
    """

    name: ClassVar[str] = "perflow"
    paper: ClassVar[str] = "2405.07510"
    summary: ClassVar[str] = "straight pieces of a teacher's trajectory between the student's levels"
    substeps: int = 6

    def student(self, turn: Turn) -> tuple[Tensor, Told]:
        """The chord of each window, anywhere on it."""
        edges = self.levels(turn.team.shift).flip(0).to(turn.clean.device)
        s = turn.times(1e-3, 1.0)
        loss = perflow_loss(
            turn.velocity, turn.team.guided(turn.batch, self.guidance), turn.clean,
            turn.chance.normal(turn.clean), s, edges, steps=self.substeps, weight=self.weight(turn),
        )  # fmt: skip
        return loss, {}

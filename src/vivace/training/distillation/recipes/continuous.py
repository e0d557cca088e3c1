"""Continuous-time consistency: sCM and rCM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vivace.training.distillation.recipe import Recipe, Told, Turn
from vivace.training.distillation.recipes.dmd import critic_of_samples, own_clips
from vivace.training.losses.continuous import (
    continuous_consistency_loss,
    regularised_consistency_loss,
    warm_up,
)
from vivace.training.losses.distribution import student_turn


@dataclass(frozen=True, kw_only=True)
class ContinuousConsistency(Recipe):
    """sCM (arXiv:2410.11081): consistency between neighbours infinitely near, by a forward-mode derivative.

    Attributes:
        warm: updates over which the derivative's part grows.
        derivative: `jvp`, or `difference` where kernels have no forward mode (float32 only).
    """

    name: ClassVar[str] = "scm"
    paper: ClassVar[str] = "2410.11081"
    summary: ClassVar[str] = "continuous-time consistency with a forward-mode derivative"
    solver: ClassVar[str] = "consistency"
    warm: int = 200
    derivative: str = "jvp"

    def student(self, turn: Turn) -> tuple[Tensor, Told]:
        """The student moves against the change of its end along the trajectory."""
        s = turn.times()
        return continuous_consistency_loss(
            turn.team.eager.velocity(turn.text),
            turn.team.guided(turn.batch, self.guidance),
            turn.point(s),
            s,
            warmup=warm_up(turn.update, self.warm),
            derivative=self.derivative,  # pyright: ignore[reportArgumentType]
            weight=self.weight(turn),
        )


@dataclass(frozen=True, kw_only=True)
class RegularisedConsistency(ContinuousConsistency):
    """rCM (arXiv:2510.08431): sCM, which covers the data, with DMD on the student's own clips, which sharpens.

    Attributes:
        regularisation: weight of the divergence. The paper's 0.01 is beside a consistency loss of another scale.
        ratio: updates of the critic for one of the student.
    """

    name: ClassVar[str] = "rcm"
    paper: ClassVar[str] = "2510.08431"
    summary: ClassVar[str] = "continuous-time consistency regularised by distribution matching"
    roles: ClassVar[frozenset[str]] = frozenset({"critic"})
    regularisation: float = 0.1
    ratio: int = 3

    def turns(self, update: int) -> tuple[str, ...]:
        """The critic always, the student after it once in `ratio` updates."""
        return ("critic", "student") if student_turn(update, self.ratio) else ("critic",)

    def student(self, turn: Turn) -> tuple[Tensor, Told]:
        """Consistency on real clips and the divergence on its own."""
        assert turn.team.critic is not None
        s = turn.times()
        point = turn.point(s)
        made = own_clips(self, turn)
        at = turn.times()
        return regularised_consistency_loss(
            turn.team.eager.velocity(turn.text),
            turn.team.guided(turn.batch, self.guidance),
            turn.team.critic.velocity(turn.text),
            point,
            s,
            made,
            at,
            turn.chance.normal(made),
            regularisation=self.regularisation,
            warmup=warm_up(turn.update // self.ratio, self.warm),
            derivative=self.derivative,  # pyright: ignore[reportArgumentType]
            weight=self.weight(turn),
        )

    def critic(self, turn: Turn) -> tuple[Tensor, Told]:
        """Flow matching on the student's clips."""
        return critic_of_samples(self, turn, 0.0)

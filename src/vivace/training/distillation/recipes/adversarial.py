"""Adversarial post-training (APT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vivace.training.distillation.recipe import Recipe, Told, Turn
from vivace.training.distillation.recipes.dmd import own_clips
from vivace.training.losses.adversarial import (
    approximated_penalty,
    relativistic_discriminator,
    relativistic_generator,
)
from vivace.training.losses.paths import interpolate


@dataclass(frozen=True, kw_only=True)
class Adversarial(Recipe):
    """APT (arXiv:2501.08316): a discriminator with the teacher's weights judges the student's clips; no teacher at all.

    It differs: several steps as well as one, by backward simulation; losses of pairs (R3GAN, arXiv:2501.05441), whose
    penalties are approximated; clips are judged with noise on them, at many times, where the paper judges clean ones
    and tells the discriminator a time. It needs a student that can nearly do it already: start it from another
    recipe's (`--init`).

    Attributes:
        penalty: weight of the approximated R1 and R2. deviation: of their noise, in latents.
        ratio: updates of the discriminator for one of the student.
    """

    name: ClassVar[str] = "adversarial"
    paper: ClassVar[str] = "2501.08316"
    summary: ClassVar[str] = "adversarial post-training with approximated penalties"
    solver: ClassVar[str] = "consistency"
    roles: ClassVar[frozenset[str]] = frozenset({"critic", "head"})
    penalty: float = 1.0
    deviation: float = 0.1
    ratio: int = 1
    rate: float = 2e-5
    critic_rate: float = 5e-5

    def turns(self, update: int) -> tuple[str, ...]:
        """The discriminator always, the student after it once in `ratio` updates."""
        return ("critic", "student") if update % self.ratio == 0 else ("critic",)

    def student(self, turn: Turn) -> tuple[Tensor, Told]:
        """To be taken for real, by comparison with real clips of the same captions."""
        made = own_clips(self, turn)
        s, noise = turn.times(), turn.chance.normal(made)
        judge = turn.team.judge(turn.batch)
        with torch.no_grad():
            real = judge(interpolate(turn.clean, noise, s), s)[1]
        return relativistic_generator(real, judge(interpolate(made, noise, s), s)[1]), {}

    def critic(self, turn: Turn) -> tuple[Tensor, Told]:
        """To tell real clips from the student's, smoothly."""
        with torch.no_grad():
            made = own_clips(self, turn)
        s, noise = turn.times(), turn.chance.normal(made)
        judge = turn.team.judge(turn.batch)
        points = [interpolate(clip, noise, s) for clip in (turn.clean, made)]
        real, fake = (judge(x, s)[1] for x in points)
        loss, moved = relativistic_discriminator(real, fake), turn.chance.normal(made)
        for x, logits in zip(points, (real, fake), strict=True):
            flat = approximated_penalty(
                lambda y: judge(y, s)[1],
                x,
                deviation=self.deviation,
                noise=moved,
                logits=logits,
                relative=True,
            )
            loss = loss + self.penalty * self.deviation**2 * flat
        return loss, {"margin": (real - fake).mean().detach()}

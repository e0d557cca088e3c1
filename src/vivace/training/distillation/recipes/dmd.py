"""Distribution matching: DMD2, also with a reward, and along trajectories: TDM, Phased DMD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vivace.core.errors import ConfigError
from vivace.training.distillation.recipe import Recipe, Told, Turn
from vivace.training.losses.adversarial import non_saturating_discriminator, non_saturating_generator
from vivace.training.losses.distribution import (
    backward_simulation,
    distribution_matching_loss,
    fake_score_loss,
    interval_score_loss,
    phased_matching_loss,
    reward_weights,
    student_turn,
    times_between,
    trajectory_matching_loss,
)
from vivace.training.losses.motion import frame_differences
from vivace.training.losses.paths import clean_from_velocity, euler_step, interpolate


@dataclass(frozen=True, kw_only=True)
class DistributionMatching(Recipe):
    """DMD2 (arXiv:2405.14867): the teacher's distribution at the student's own samples, and a discriminator.

    The student runs its own steps up to one drawn at random (backward simulation) and learns at that one. The critic
    learns in every update, the student in one of `ratio`. The discriminator reads the critic's hidden states.

    Attributes:
        ratio: updates of the critic for one of the student.
        gan: weight of the discriminator; 0 leaves it alone.
    """

    name: ClassVar[str] = "dmd2"
    paper: ClassVar[str] = "2405.14867"
    summary: ClassVar[str] = "distribution matching with a critic, backward simulation and a discriminator"
    solver: ClassVar[str] = "consistency"
    roles: ClassVar[frozenset[str]] = frozenset({"critic", "head"})
    ratio: int = 4
    gan: float = 0.01
    rate: float = 5e-5
    critic_rate: float = 2e-4

    def turns(self, update: int) -> tuple[str, ...]:
        """The critic always, the student after it once in `ratio` updates."""
        return ("critic", "student") if student_turn(update, self.ratio) else ("critic",)

    def student(self, turn: Turn) -> tuple[Tensor, Told]:
        """DMD's surrogate on its own clips, and the discriminator's opinion."""
        assert turn.team.critic is not None
        clean = own_clips(self, turn)
        s, noise = turn.times(), turn.chance.normal(clean)
        scale = self.scale(turn, clean.detach())
        loss, told = distribution_matching_loss(
            clean, turn.team.guided(turn.batch, self.guidance), turn.team.critic.velocity(turn.text), s, noise,
            scale=scale,
        )  # fmt: skip
        if scale is not None:
            told |= {"weight": scale.max()}
        if self.gan:
            fooled = non_saturating_generator(turn.team.judge(turn.batch)(interpolate(clean, noise, s), s)[1])
            loss, told = loss + self.gan * fooled, told | {"fooled": fooled.detach()}
        return loss, told

    def critic(self, turn: Turn) -> tuple[Tensor, Told]:
        """Flow matching on the student's clips; real clips against them."""
        return critic_of_samples(self, turn, self.gan)

    def scale(self, turn: Turn, made: Tensor) -> Tensor | None:
        """What the samples of the student's own clips (B, C, T, H, W) weigh, (B,); None for all alike."""
        return None


@dataclass(frozen=True, kw_only=True)
class RewardedMatching(DistributionMatching):
    """Reward Forcing's Re-DMD (arXiv:2512.04678): DMD in which clips that a reward likes weigh more.

    It differs: the paper's reward is a video language model's score of motion; here it is how much a clip's latents
    change from frame to frame beside those of a real clip with its caption, at most 1: as lively as real is enough.
    No network judges, and every model has latents.

    Attributes:
        beta: of `exp(reward / beta)`; smaller looks at the liveliest alone. most: no sample weighs more.
    """

    name: ClassVar[str] = "rewarded"
    paper: ClassVar[str] = "2512.04678"
    summary: ClassVar[str] = "distribution matching in which clips that move as real ones do weigh more"
    beta: float = 0.5
    most: float = 4.0

    def scale(self, turn: Turn, made: Tensor) -> Tensor:
        """Weights about 1: the reward less the batch's mean."""
        if made.shape[2] < 2:
            raise ConfigError(
                "one latent frame has no motion to reward; train on longer clips, or take dmd2."
            )
        moves, real = (frame_differences(x).abs().mean((1, 2, 3, 4)) for x in (made, turn.clean))
        reward = (moves / real.clamp_min(1e-6)).clamp_max(1.0)
        return reward_weights(reward, beta=self.beta, baseline=reward.mean(), high=self.most)


def own_clips(recipe: Recipe, turn: Turn) -> Tensor:
    """Clips of the student's own sampling up to a step drawn at random, with gradient through that step."""
    noise, times = turn.chance.normal(turn.clean), recipe.levels(turn.team.shift)
    x, s, _, _ = backward_simulation(turn.velocity, noise, times, generator=turn.chance)
    return clean_from_velocity(x, turn.velocity(x, s), s)


def critic_of_samples(recipe: Recipe, turn: Turn, gan: float) -> tuple[Tensor, Told]:
    """The critic's flow matching on the student's clips, with the discriminator's loss where `gan` is not 0."""
    assert turn.team.critic is not None
    with torch.no_grad():
        made = own_clips(recipe, turn)
    s, noise = turn.times(), turn.chance.normal(made)
    if not gan:
        return fake_score_loss(turn.team.critic.velocity(turn.text), made, s, noise), {}
    judge = turn.team.judge(turn.batch)
    logits: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v, answer = judge(x, t)
        logits.append(answer)
        return v

    score = fake_score_loss(velocity, made, s, noise)
    real = judge(interpolate(turn.clean, noise, s), s)[1]
    told = non_saturating_discriminator(real, logits[0])
    return score + gan * told, {"score": score.detach(), "discriminator": told.detach()}


@dataclass(frozen=True, kw_only=True)
class TrajectoryMatching(Recipe):
    """TDM (arXiv:2503.06674): every point of the student's own deterministic trajectory has the teacher's distribution.

    It differs: the critic's target is the unbiased one of Phased DMD (arXiv:2510.27684); one step is trained a turn.

    Attributes:
        ratio: updates of the critic for one of the student.
    """

    name: ClassVar[str] = "tdm"
    paper: ClassVar[str] = "2503.06674"
    summary: ClassVar[str] = "distribution matching at every point of the student's deterministic trajectory"
    solver: ClassVar[str] = "flow"
    roles: ClassVar[frozenset[str]] = frozenset({"critic"})
    ratio: int = 4
    rate: float = 5e-5

    def turns(self, update: int) -> tuple[str, ...]:
        """The critic always, the student after it once in `ratio` updates."""
        return ("critic", "student") if student_turn(update, self.ratio) else ("critic",)

    def student(self, turn: Turn) -> tuple[Tensor, Told]:
        """One step of the trajectory, drawn at random."""
        assert turn.team.critic is not None
        return trajectory_matching_loss(
            turn.velocity,
            turn.team.guided(turn.batch, self.guidance),
            turn.team.critic.velocity(turn.text),
            turn.chance.normal(turn.clean),
            self.levels(turn.team.shift),
            steps=[turn.chance.below(self.steps)],
            generator=turn.chance,
        )

    def critic(self, turn: Turn) -> tuple[Tensor, Told]:
        """The velocity field of the ends of the student's steps."""
        assert turn.team.critic is not None
        with torch.no_grad():
            x, s, r, _ = backward_simulation(
                turn.velocity,
                turn.chance.normal(turn.clean),
                self.levels(turn.team.shift),
                mode="ode",
                generator=turn.chance,
            )
            end = euler_step(x, turn.velocity(x, s), s, r)
        late = times_between(r, self.latest(s), generator=turn.chance)
        return (
            interval_score_loss(turn.team.critic.velocity(turn.text), end, r, late, turn.chance.normal(end)),
            {},
        )

    def latest(self, s: Tensor) -> Tensor:
        """Up to what times the critic learns the ends of steps that begin at s (B,)."""
        return s


@dataclass(frozen=True, kw_only=True)
class PhasedMatching(TrajectoryMatching):
    """Phased DMD (arXiv:2510.27684): the end of every step has the teacher's distribution, asked at all times above it.

    It differs: one network for all phases, a phase for each step, where the paper trains an expert for each.
    """

    name: ClassVar[str] = "phased_dmd"
    paper: ClassVar[str] = "2510.27684"
    summary: ClassVar[str] = "distribution matching at the end of every step, compared at all times above it"

    def student(self, turn: Turn) -> tuple[Tensor, Told]:
        """One step of the trajectory, drawn at random."""
        assert turn.team.critic is not None
        start = backward_simulation(
            turn.velocity,
            turn.chance.normal(turn.clean),
            self.levels(turn.team.shift),
            mode="ode",
            generator=turn.chance,
        )
        return phased_matching_loss(
            turn.velocity,
            start,
            turn.team.guided(turn.batch, self.guidance),
            turn.team.critic.velocity(turn.text),
            generator=turn.chance,
        )

    def latest(self, s: Tensor) -> Tensor:
        """All of them."""
        return torch.ones_like(s)

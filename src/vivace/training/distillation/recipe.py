"""What a recipe is: the objectives of the roles, and how the student that comes out must be sampled.

A recipe is a page in `recipes/`: a frozen dataclass with its settings and one function for each role that learns. It
has no state; what it knows of a run is the team, the batch, the random numbers of this update and the progress.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vivace.core.errors import ConfigError
from vivace.models.student_artifact import Sampler
from vivace.training.chance import Chance
from vivace.training.data.samples import Batch
from vivace.training.distillation.team import Team
from vivace.training.losses.motion import motion_emphasis, motion_weights
from vivace.training.losses.paths import Velocity, interpolate, shifted_times

Told = dict[str, Tensor]


class Turn(NamedTuple):
    """What a role's objective is given: the team, its batch, random numbers, the update's number, progress 0 to 1."""

    team: Team
    batch: Batch
    chance: Chance
    update: int
    progress: float

    @property
    def clean(self) -> Tensor:
        """Latents (B, C, T, H, W) of the batch, float32."""
        return self.batch["latents"].float()

    @property
    def text(self) -> Tensor:
        """Captions (B, L, D)."""
        return self.batch["text"]

    @property
    def velocity(self) -> Velocity:
        """The student, with captions and no guidance."""
        return self.team.student.velocity(self.text)

    def times(self, low: float = 0.02, high: float = 0.98, *, shift: float | None = None) -> Tensor:
        """A time for each sample (B,), spread evenly before the teacher's shift, from low to high after it."""
        u = self.chance.spread(self.clean)
        shift = self.team.shift if shift is None else shift
        return (shift * u / (1.0 + (shift - 1.0) * u)).clamp(low, high)

    def point(self, s: Tensor) -> Tensor:
        """Real clips noised to times s (B,)."""
        return interpolate(self.clean, self.chance.normal(self.clean), s)


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """Base of the recipes.

    Attributes:
        steps: evaluations of the student.
        shift: of the student's noise levels; the teacher's by default.
        guidance: of the teacher; its own by default.
        motion: strength of weights on what moves (`losses.motion`); 0 for none. Where the objective has weights.
        rate, critic_rate: learning rates.
        decay: of averaged weights.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    """arXiv numbers."""
    summary: ClassVar[str]
    solver: ClassVar[str] = "flow"
    roles: ClassVar[frozenset[str]] = frozenset()
    """Beside teacher and student: `critic`, `head`, `second_time`."""
    fields: ClassVar[tuple[str, ...]] = ("latents", "text")
    """Of the data."""

    steps: int = 4
    shift: float | None = None
    guidance: float | None = None
    motion: float = 0.0
    rate: float = 1e-4
    critic_rate: float = 2e-4
    decay: float = 0.99

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"a student needs 1 step or more, not {self.steps}.")

    def levels(self, team_shift: float) -> Tensor:
        """Times of the student's sampler, (steps + 1,) from 1 to 0."""
        return shifted_times(self.steps, self.shift or team_shift)

    def sampler(self, team_shift: float) -> Sampler:
        """How the student must be sampled."""
        levels = tuple(round(float(s), 6) for s in self.levels(team_shift)[:-1])
        return Sampler(
            steps=self.steps,
            sigmas=levels,
            shift=self.shift or team_shift,
            guidance=1.0,
            solver=self.solver,
        )

    def turns(self, update: int) -> tuple[str, ...]:
        """Roles that learn in an update, in order."""
        return ("student",)

    @abstractmethod
    def student(self, turn: Turn) -> tuple[Tensor, Told]:
        """The student's loss, and diagnostics."""

    def critic(self, turn: Turn) -> tuple[Tensor, Told]:
        """The critic's and the discriminator's loss, and diagnostics."""
        raise ConfigError(f"{self.name} has no critic.")

    def weight(self, turn: Turn) -> Tensor | None:
        """Weights of positions and samples, or None."""
        if not self.motion:
            return None
        clean = turn.clean
        return motion_weights(clean, strength=self.motion) * motion_emphasis(clean, strength=self.motion)

    def settings(self) -> dict[str, Any]:
        """Everything that may be set."""
        return asdict(self)


@torch.no_grad()
def sample(team: Team, recipe: Recipe, noise: Tensor, text: Tensor, student: Any = None) -> Tensor:
    """Latents (B, C, T, H, W) that a student makes of noise, by the scheduler that will sample the finished one.

    Fresh noise between steps depends on a sample's own first noise, so that samples do not depend on the batch.

    Args:
        noise: (B, C, T, H, W). text: captions (B, L, D).
        student: a network in the place of the team's student.
    """
    from vivace.models.student_scheduler import StudentScheduler

    network = team.student if student is None else student
    told = recipe.sampler(team.shift)
    scheduler = StudentScheduler(solver=told.solver or "flow", levels=told.levels())
    scheduler.set_timesteps(told.steps)
    x, levels = noise.float(), scheduler.sigmas.to(noise.device)
    for time, s, r in zip(scheduler.timesteps, levels[:-1], levels[1:], strict=True):
        s, r = s.expand(len(x)), r.expand(len(x))
        if told.solver == "flow_map":
            velocity = network.flow_map(text)(x, s, r)
        else:
            velocity = network.velocity(text)(x, s)
        x = scheduler.step(velocity, time, x, return_dict=False)[0]
    return x

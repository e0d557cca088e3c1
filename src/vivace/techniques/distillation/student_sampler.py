"""Student sampler: noise levels, solver and guidance as a few-step student was trained for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.context import COND, FUSED, UNCOND
from vivace.core.errors import ConfigError
from vivace.core.shapes import Workload
from vivace.models.adapter import Expert, ModelDescription, Need, RootCall
from vivace.models.student_artifact import SOLVERS, Sampler
from vivace.techniques.base import (
    Card,
    Cite,
    Claim,
    Estimate,
    Paradigm,
    Problem,
    RootHandler,
    Stage,
    Target,
    Technique,
    exclusive,
    knob,
)
from vivace.techniques.guidance import conditional_half, skipped, without

if TYPE_CHECKING:
    import torch

NAME = "student_sampler"
STEPS, MOST = 4, 50
_COPIED = (
    "num_train_timesteps",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal",
    "time_shift_type",
)
"""Settings of the pipeline's own scheduler that the student's keeps: pipelines read them."""


@dataclass(frozen=True, kw_only=True)
class StudentSampler(Technique):
    """Sample a few-step student by its contract, on the user's own pipeline.

    `flow` makes Euler steps on the ODE. `consistency` jumps to x0 = x - s v and goes back to the next level t with
    fresh noise, x = (1 - t) x0 + t n; n is drawn for each sample from the noise that it began with, so that it does
    not depend on the batch. `flow_map` makes Euler steps with a velocity that is told how far the step goes
    (`vivace.models.second_time`). Guidance is left out: the unconditional branch is not evaluated and is answered with
    the conditional one. A caller's `num_inference_steps` wins over the contract's.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.DISTILLATION,
        summary="Samples a distilled student at the noise levels and with the solver that it was trained for.",
        objective="fewer network evaluations",
        stage=Stage.SOLVER,
        claims=(
            exclusive("sampler.schedule"),
            exclusive("sampler.solver"),
            exclusive("guidance.branches"),
        ),
        needs=(Need.FLOW_SCHEDULER,),
        cite=Cite(
            title="Consistency Models; Improved Distribution Matching Distillation for Fast Image Synthesis; Mean "
            "Flows for One-step Generative Modeling",
            arxiv="2303.01469, 2405.14867, 2505.13447",
            code="https://github.com/tianweiy/DMD2",
            differs="fresh noise is a function of a sample's first noise and the step, not of a shared generator",
        ),
    )

    steps: int | None = knob(None, low=1, high=MOST)
    """Evaluations of the network; left out, as many as there are sigmas, or 4."""
    solver: str = knob("flow", choices=SOLVERS)
    """How a step is made."""
    shift: float | None = knob(None, low=0.1, high=20.0)
    """Flow shift of even noise levels; none keeps the pipeline's, static or by resolution."""
    sigmas: tuple[float, ...] = ()
    """The noise levels themselves, falling from at most 1, with or without the final 0; they need no shift."""
    guided: bool = knob(False, choices=(False, True))
    """Keep the pipeline's guidance, for a student that still wants it."""

    def __post_init__(self) -> None:
        if self.steps is None:
            object.__setattr__(self, "steps", len(self.levels) or STEPS)
        super().__post_init__()
        if self.steps != int(self.steps or 0):
            raise ConfigError(f"{NAME}: steps must be a whole number, not {self.steps!r}.")
        levels = self.levels
        numbers = all(isinstance(s, (int, float)) and 0.0 < s <= 1.0 for s in levels)
        if self.sigmas and not (levels and numbers and all(a > b for a, b in pairwise(levels))):
            raise ConfigError(f"{NAME}: sigmas must fall from at most 1 to 0, not {list(self.sigmas)}.")
        if levels and self.steps != len(levels):
            raise ConfigError(
                f"{NAME}: steps is {self.steps} and there are {len(levels)} sigmas; leave one of them out."
            )

    @property
    def levels(self) -> tuple[float, ...]:
        """The given noise levels without the final 0."""
        return tuple(s for s in self.sigmas if s != 0.0)

    @classmethod
    def of(cls, sampler: Sampler) -> Self:
        """The technique that fulfils a student's contract."""
        return cls(
            steps=None if sampler.sigmas is not None else sampler.steps,
            solver=sampler.solver or "flow",
            shift=None if sampler.sigmas is not None else sampler.shift,
            sigmas=tuple(sampler.sigmas or ()),
            guided=(sampler.guidance or 1.0) > 1.0,
        )

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (
            cls(steps=4, solver="consistency", shift=5.0),
            cls(sigmas=(1.0, 0.757, 0.522), solver="consistency", guided=True),
            cls(steps=4),
        )

    def line(self) -> str:
        """The technique as a line of a plan file, without what stands at its default."""
        usual = type(self)().to_dict()
        own = {k: v for k, v in self.to_dict().items() if not k.startswith("_") and v != usual[k]}
        if self.sigmas:
            own.pop("steps", None)
        else:
            own = {"steps": self.steps} | own
        return "- {" + ", ".join(f"{k}: {_yaml(v)}" for k, v in ({"technique": NAME} | own).items()) + "}"

    def claims(self, model: ModelDescription) -> tuple[Claim, ...]:
        return self.card.claims[:2] if self.guided else self.card.claims

    def check_beside(self, model: ModelDescription, others: tuple[Technique, ...]) -> list[Problem]:
        """A flow map needs weights that know how far a step goes."""
        if self.solver != "flow_map" or any(getattr(t, "brings_second_time", False) for t in others):
            return []
        message = "flow_map needs a student that was trained as a flow map; add its student_checkpoint, or use flow."
        return [self.problem("second_time", message)]

    def apply(self, target: Target) -> None:
        from vivace.models.student_scheduler import StudentScheduler

        scheduler = StudentScheduler(**self._settings(target.scheduler.config))
        clock = target.clock
        scheduler.callers_steps = lambda: clock.steps_are_the_users
        target.edit.set(target.pipeline, "scheduler", scheduler)
        target.report(NAME, "schedulers_replaced", 1)
        for expert in target.experts:
            if self.solver == "flow_map":
                target.around_expert(expert, self._telling(target, expert))
            if not self.guided:
                target.around_expert(expert, self._unguided(target))

    def _settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        settings = {k: config[k] for k in _COPIED if k in config}
        own = config.get("flow_shift", config.get("shift"))
        if self.shift is not None or self.sigmas:
            settings["use_dynamic_shifting"] = False
        shift = self.shift if self.shift is not None else own if own is not None else 1.0
        return settings | {
            "solver": self.solver,
            "steps": self.steps,
            "levels": self.levels or None,
            "shift": shift,
        }

    @staticmethod
    def _telling(target: Target, expert: Expert) -> RootHandler:
        """Tell the second time embedding how far the step goes, for the time of an evaluation."""
        from vivace.models import second_time

        clock = target.clock

        def handler(call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
            if (second := second_time.of(expert.module)) is None:
                return run(call)
            before, second.gap = second.gap, clock.sigma - clock.sigmas[clock.step + 1]
            try:
                return run(call)
            finally:
                second.gap = before

        return handler

    @staticmethod
    def _unguided(target: Target) -> RootHandler:
        """Answer the unconditional evaluation of a step with the conditional one, whichever way they are made."""
        clock = target.clock

        def handler(call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
            if clock.branch == FUSED:
                import torch

                sample = conditional_half(target, call, run)
                skipped(target, NAME)
                return torch.cat([sample, sample])
            kept = target.store.shared(NAME, "conditional", dict)
            if clock.branch == COND:
                sample = run(call)
                kept.clear()
                kept[clock.step] = sample
                return sample
            if clock.branch != UNCOND or clock.step not in kept:
                return run(call)
            skipped(target, NAME)
            return kept.pop(clock.step)

        return handler

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Exact where both branches have texts of one length: every step costs the same, and half without guidance."""
        steps = int(self.steps or STEPS)
        fewer = base.scaled(steps / workload.steps)
        return fewer if self.guided else without(model, workload.with_(steps=steps), fewer, 1.0, 1.0)


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )

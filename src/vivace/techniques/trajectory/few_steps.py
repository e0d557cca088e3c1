"""Few steps: another number of steps, or another time shift, of the scheduler the pipeline has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.core.errors import ConfigError
from vivace.core.shapes import Workload
from vivace.models.adapter import ModelDescription, Need
from vivace.techniques.base import (
    Card,
    Cite,
    Estimate,
    Paradigm,
    Problem,
    Stage,
    Target,
    Technique,
    exclusive,
    knob,
)

NAME = "few_steps"


@dataclass(frozen=True, kw_only=True)
class FewSteps(Technique):
    """Give the scheduler another number of steps, and optionally another flow shift.

    The shift s bends the noise levels to s sigma / (1 + (s - 1) sigma): with few steps a larger one spends more of
    them on high noise. The number of steps yields to a caller who gave `num_inference_steps`, `timesteps` or noise
    levels of his own.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.TRAJECTORY,
        summary="Makes the video in fewer solver steps.",
        objective="fewer network evaluations",
        stage=Stage.TRAJECTORY,
        claims=(exclusive("sampler.schedule"),),
        cite=Cite(
            title="Denoising Diffusion Implicit Models; the shift after Scaling Rectified Flow Transformers for "
            "High-Resolution Image Synthesis",
            arxiv="2010.02502, 2403.03206",
            code="https://github.com/huggingface/diffusers",
            differs="the pipeline's own scheduler makes the schedule, as it would for that number of steps",
        ),
    )

    steps: int | None = knob(12, low=1, high=100, identity=None)
    """Solver steps; none keeps the pipeline's number."""
    shift: float | None = knob(None, low=0.1, high=20.0)
    """Flow shift in the place of the scheduler's (static or by resolution); none keeps it."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(steps=4), cls())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.steps != int(self.steps):
            raise ConfigError(f"{NAME}: steps must be a whole number, not {self.steps!r}.")

    @property
    def is_identity(self) -> bool:
        """Neither the number of steps nor the shift is given."""
        return self.steps is None and self.shift is None

    def check(self, model: ModelDescription) -> list[Problem]:
        if self.shift is not None and (
            Need.FLOW_SCHEDULER not in model.offers or _shift_key(model.scheduler) is None
        ):
            name = model.scheduler_class or "no scheduler"
            return [
                self.problem(
                    "shift",
                    f"shift needs a flow-matching scheduler, and {model.name} has {name}; leave shift out.",
                )
            ]
        return []

    def apply(self, target: Target) -> None:
        if self.shift is not None:
            target.edit.set(target.pipeline, "scheduler", _shifted(target.scheduler, self.shift))
        signature = inspect.signature(target.scheduler.set_timesteps)
        target.edit.wrap(
            target.scheduler, lambda old: self._set_timesteps(target, signature, old), "set_timesteps"
        )

    def _set_timesteps(
        self, target: Target, signature: inspect.Signature, old: Callable[..., Any]
    ) -> Callable[..., Any]:
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            if self.shift is not None:
                target.report(NAME, "shifted", 1)
            if self.steps is not None and not target.clock.steps_are_the_users:
                target.report(NAME, "steps_saved", _change(call.arguments, self.steps))
            return old(*call.args, **call.kwargs)

        return set_timesteps

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Exact: every step costs the same."""
        return base if self.steps is None else base.scaled(self.steps / workload.steps)


def _change(call: dict[str, Any], steps: int) -> int:
    """Put a number of steps into the arguments of `set_timesteps`, unless they hold a schedule of the caller's own.

    Returns how many steps that saves.
    """
    if call.get("timesteps") is not None:
        return 0
    before: int | None = call.get("num_inference_steps")
    if (sigmas := call.get("sigmas")) is not None:
        if (grid := _uniform(sigmas)) is None:
            return 0
        call["sigmas"] = grid(steps)
    if before is not None:
        call["num_inference_steps"] = steps
    return (len(sigmas) if sigmas is not None else before or steps) - steps


def _uniform(sigmas: Any) -> Callable[[int], Any] | None:
    """The uniform grid that a pipeline hands to its scheduler, as a function of the number of steps.

    None when the noise levels are somebody's own. Pipelines write 1, 1 - 1/n ... 1/n in two ways that differ in the
    last bit, so the same one is used again.
    """
    import numpy as np

    grids: tuple[Callable[[int], Any], ...] = (
        lambda n: np.linspace(1.0, 1.0 / n, n),
        lambda n: np.linspace(1.0, 0.0, n + 1)[:-1],
    )
    given = np.asarray(sigmas, dtype=np.float64)
    return next((g for g in grids if np.array_equal(given, g(len(given)))), None)


def _shift_key(config: Any) -> str | None:
    """The setting that holds the static flow shift."""
    return next((k for k in ("flow_shift", "shift") if k in config), None)


def _shifted(scheduler: Any, shift: float) -> Any:
    """A new scheduler of the same class and settings with a static shift."""
    changes: dict[str, Any] = {_shift_key(scheduler.config) or "shift": shift}
    if "use_dynamic_shifting" in scheduler.config:
        changes["use_dynamic_shifting"] = False
    return type(scheduler).from_config(scheduler.config, **changes)

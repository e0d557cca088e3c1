"""Timestep placement: other noise levels for the steps of the solver that the pipeline has."""

from __future__ import annotations

import inspect
import itertools
import math
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

NAME = "timestep_placement"

_LISTS = ("gits", "explicit")
_KNOWN = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
_BENT = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "invert_sigmas")
"""Settings under which a scheduler does not take noise levels as they are."""


@dataclass(frozen=True, kw_only=True)
class TimestepPlacement(Technique):
    """Place the solver's steps by a rule, or where a search found that they do least harm.

    `shift` spaces them evenly, `ays` as Align Your Steps found, `karras` evenly in sigma ** (1 / rho); the odds
    sigma / (1 - sigma) of these are then multiplied by the shift. `gits` and `explicit` take `sigmas` as they are;
    `from_trajectory` finds those of GITS. The scheduler's own shift, static or by resolution, no longer acts.

    A caller who gave `num_inference_steps` gets that number of steps, placed by the rule; a list is only for its own
    number. A caller's own `timesteps` or noise levels stay untouched.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.TRAJECTORY,
        summary="Puts the solver's steps at the noise levels where they count most.",
        objective="less solver error per network evaluation",
        stage=Stage.TRAJECTORY,
        claims=(exclusive("sampler.schedule"),),
        needs=(Need.FLOW_SCHEDULER,),
        cite=Cite(
            title="Align Your Steps: Optimizing Sampling Schedules in Diffusion Models; On the Trajectory "
            "Regularity of ODE-based Diffusion Sampling; Elucidating the Design Space of Diffusion-Based "
            "Generative Models",
            arxiv="2404.14507, 2405.11326, 2206.00364",
            code="https://github.com/zju-pi/diff-sampler",
            differs="Align Your Steps: the knots of Stable Diffusion 1.5 at equal log-SNR, not optimised for the "
            "video model, whose larger latents hide less at the same noise (raise the shift), and a first level of "
            "pure noise; GITS: errors of Euler jumps on given trajectories, summed without a warm-up weight; "
            "Karras: the power acts on the flow's noise level from 1 to 0",
        ),
    )

    placement: str = knob("ays", choices=("shift", "ays", "karras", "gits", "explicit"))
    """The rule; `gits` and `explicit` read `sigmas`."""
    steps: int | None = knob(None, low=1, high=100)
    """Solver steps; none keeps the pipeline's number (a list's own)."""
    shift: float = knob(1.0, low=0.1, high=20.0)
    """Factor on the odds of the rule's levels; above 1 there is more noise. Not used with a list."""
    rho: float = knob(2.0, low=0.2, high=7.0)
    """Power of `karras`: above 1 crowds the steps at low noise, below 1 at high noise."""
    sigmas: tuple[float, ...] = ()
    """Falling noise levels of a list, from at most 1 to above 0; the final 0 is added."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.steps != int(self.steps):
            raise ConfigError(f"{NAME}: steps must be a whole number, not {self.steps!r}.")
        if not self.listed:
            if self.sigmas:
                raise ConfigError(f"{NAME}: {self.placement} makes its own levels; leave sigmas out.")
            return
        if not self.sigmas:
            raise ConfigError(f"{NAME}: {self.placement} needs sigmas, the noise levels to use.")
        s = self.sigmas
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) or not math.isfinite(v) for v in s):
            raise ConfigError(f"{NAME}: sigmas must be numbers.")
        if not 0.0 < s[-1] <= s[0] <= 1.0 or any(a <= b for a, b in itertools.pairwise(s)):
            raise ConfigError(f"{NAME}: sigmas must fall, from at most 1 to above 0, without the final 0.")
        if self.steps not in (None, len(s)):
            raise ConfigError(f"{NAME}: steps={self.steps} and {len(s)} sigmas differ; leave steps out.")

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (
            cls(placement="ays", steps=4),
            cls(placement="shift", shift=6.0, steps=4),
            cls(placement="karras"),
            cls(placement="explicit", sigmas=(1.0, 0.9, 0.6, 0.25)),
            cls(placement="gits", sigmas=(1.0, 0.95, 0.4)),
        )

    @classmethod
    def from_trajectory(cls, velocities: Any, sigmas: Any, steps: int, *, worst: bool = False) -> Self:
        """Levels of a fine trajectory that a coarse one of `steps` Euler steps should keep (GITS).

        Args:
            velocities: (m - 1, d), guided velocities along a fine run; several runs of the same levels may lie side
                by side along d.
            sigmas: (m,) its noise levels, falling, with the final 0.
            steps: solver steps wanted.
            worst: minimise the largest local error instead of the sum (LeMiCa's objective).

        Raises:
            ValueError: the shapes do not fit, or there are more steps than in the fine run.
        """
        from vivace.techniques.trajectory import placement_math as math_

        nodes = math_.cheapest_path(sigmas, math_.jump_costs(velocities, sigmas), steps, worst=worst)
        return cls(placement="gits", sigmas=tuple(float(sigmas[i]) for i in nodes[:-1]))

    @property
    def listed(self) -> bool:
        """Whether the levels are a list of the user's."""
        return self.placement in _LISTS

    def levels(self, steps: int) -> Any:
        """Noise levels of that number of steps, (steps,) float64 without the final 0; None for a list of another."""
        import numpy as np

        from vivace.techniques.trajectory import placement_math as math_

        if self.listed:
            return np.asarray(self.sigmas) if len(self.sigmas) == steps else None
        rule = {
            "shift": math_.uniform,
            "ays": math_.align_your_steps,
            "karras": lambda n: math_.power(n, self.rho),
        }[self.placement]
        return math_.shifted(rule(steps), self.shift)

    def check(self, model: ModelDescription) -> list[Problem]:
        config, name = model.scheduler, model.scheduler_class
        if Need.FLOW_SCHEDULER not in model.offers:
            return []  # the plan says it
        bent = [k for k in _BENT if config.get(k)]
        if name not in _KNOWN:
            message = f"{name} takes no noise levels of ours; use {' or '.join(_KNOWN)}."
        elif name != _KNOWN[0] and not config.get("use_flow_sigmas"):
            message = f"{name} without use_flow_sigmas takes no flow noise levels; turn that setting on."
        elif bent:
            message = f"{name} bends its noise levels itself; turn {' and '.join(bent)} off."
        else:
            return []
        return [self.problem("scheduler", message)]

    def apply(self, target: Target) -> None:
        scheduler = target.scheduler
        signature = inspect.signature(scheduler.set_timesteps)

        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            def set_timesteps(*args: Any, **kwargs: Any) -> Any:
                from vivace.techniques.trajectory.placement_math import ask_for, asked_steps

                call = signature.bind(*args, **kwargs)
                steps = self._number(asked_steps(call.arguments), target.clock.steps_are_the_users)
                levels = None if steps is None else self.levels(steps)
                if levels is None:
                    return old(*args, **kwargs)
                ask_for(call.arguments, len(levels))
                out = old(*call.args, **call.kwargs)
                _place(scheduler, levels, call.arguments.get("device"))
                target.report(NAME, "levels_placed", len(levels))
                return out

            return set_timesteps

        target.edit.wrap(scheduler, make, "set_timesteps")

    def _number(self, asked: int | None, users: bool) -> int | None:
        """Steps to make where so many are asked for; None when that is the caller's own schedule."""
        if asked is None or users:
            return asked
        return self.steps or len(self.sigmas) or asked

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Exact: every step costs the same."""
        steps = self.steps or len(self.sigmas)
        return base.scaled(steps / workload.steps) if steps else base


def _place(scheduler: Any, levels: Any, device: Any) -> None:
    """Lay noise levels over the schedule a scheduler has just made.

    A twin without a shift turns them into timesteps and repetitions as that class does it.
    """
    twin = _twin(scheduler)
    twin.set_timesteps(sigmas=levels.copy(), device=device)
    scheduler.sigmas, scheduler.timesteps = twin.sigmas, twin.timesteps


def _twin(scheduler: Any) -> Any:
    """A scheduler of the same class and settings that takes noise levels and does not shift them."""
    import diffusers

    cls: Any = type(scheduler)
    config = dict(scheduler.config)
    if "sigmas" not in inspect.signature(cls.set_timesteps).parameters:
        # Multistep DPM-Solver takes none; UniPC has the same noise schedule, timesteps and end.
        cls = diffusers.UniPCMultistepScheduler
        kept = (
            "num_train_timesteps",
            "final_sigmas_type",
            "flow_shift",
            "use_flow_sigmas",
            "prediction_type",
        )
        config = {k: config[k] for k in kept}
    changes = {"flow_shift": 1.0, "shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
    return cls.from_config(config, **{k: v for k, v in changes.items() if k in config})

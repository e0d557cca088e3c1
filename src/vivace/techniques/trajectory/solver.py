"""Solver: another ODE solver in the place of the pipeline's scheduler, with the same noise schedule."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.core.shapes import Workload
from vivace.models.adapter import ModelDescription
from vivace.models.describe import describe_pipeline
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

NAME = "solver"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A diffusers scheduler class and the settings that make it the wanted solver."""

    scheduler: str
    settings: Mapping[str, Any]


def _dpm(order: int) -> Recipe:
    settings = {"algorithm_type": "dpmsolver++", "solver_order": order, "solver_type": "midpoint"}
    return Recipe("DPMSolverMultistepScheduler", settings)


_UNIPC = Recipe("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"})

_OURS: Mapping[str, Recipe] = {
    "heun": Recipe("FlowHeunScheduler", {}),
    "res2m": Recipe("FlowRESMultistepScheduler", {}),
}
"""Schedulers of `_res_scheduler`, for every flow schedule. Its underscore keeps the registry from importing torch."""

_MULTISTEP: Mapping[str, Recipe] = {
    "unipc": _UNIPC,
    "dpm++2m": _dpm(2),
    "dpm++3m": _dpm(3),
    # On a straight noise path (alpha + sigma = 1) the first-order data-prediction update is Euler's.
    "euler": _dpm(1),
    **_OURS,
}
"""For schedulers that lay out the flow schedule themselves from a number of steps."""

_EULER: Mapping[str, Recipe] = {
    "unipc": _UNIPC,
    "euler": Recipe("FlowMatchEulerDiscreteScheduler", {}),
    **_OURS,
}
"""For pipelines that hand noise levels to the scheduler, which DPMSolverMultistepScheduler does not take."""

_COGVIDEOX: Mapping[str, Recipe] = {
    "euler": Recipe("CogVideoXDDIMScheduler", {}),
    "sde-dpm++2m": Recipe("CogVideoXDPMScheduler", {}),
}
"""For CogVideoX's noise schedule (zero terminal SNR, shifted SNR), which only its own two schedulers know."""

_BENT = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")
"""Settings under which the classes do not make the same noise levels."""


@dataclass(frozen=True, kw_only=True)
class Solver(Technique):
    """Swap the solver. The new one is made by diffusers' `from_config` from the pipeline's own scheduler settings.

    `unipc` is UniPC of order 2 with its corrector, `dpm++2m` and `dpm++3m` are multistep DPM-Solver++ of order 2 and
    3, `res2m` is the multistep refined exponential solver of order 2, `euler` is the first-order solver (DDIM on a
    curved path), `sde-dpm++2m` the stochastic one of CogVideoX. `heun` is of order 2 and evaluates the network twice
    a step, but for the last: n steps are 2 n - 1 steps of the pipeline's loop.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.TRAJECTORY,
        summary="Uses another solver, so that fewer steps reach the same accuracy.",
        objective="less solver error per network evaluation",
        stage=Stage.SOLVER,
        claims=(exclusive("sampler.solver"),),
        cite=Cite(
            title="DPM-Solver++; UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of "
            "Diffusion Models; Improved Order Analysis and Design of Exponential Integrator for Diffusion Models "
            "Sampling; Heun's steps after Elucidating the Design Space of Diffusion-Based Generative Models",
            arxiv="2211.01095, 2302.04867, 2308.02157, 2206.00364",
            code="https://github.com/huggingface/diffusers",
            differs="diffusers' implementations on the pipeline's own noise schedule and flow shift; the refined "
            "exponential solver is ours, deterministic and multistep only",
        ),
    )

    solver: str = knob(
        "dpm++2m", choices=("unipc", "dpm++2m", "dpm++3m", "euler", "sde-dpm++2m", "heun", "res2m")
    )
    """Which solver."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        model = describe_pipeline(pipeline)
        recipes = recipes_for(model)
        others = [name for name, recipe in recipes.items() if not _already(recipe, model)]
        return tuple(cls(solver=name) for name in others or recipes) or (cls(),)

    def check(self, model: ModelDescription) -> list[Problem]:
        recipes = recipes_for(model)
        if not recipes:
            name = model.scheduler_class or "no scheduler"
            message = f"knows no solver that keeps the noise schedule of {name}; leave it out."
            return [self.problem("scheduler", message)]
        if self.solver not in recipes:
            others = " or ".join(recipes)
            message = f"{self.solver} cannot take the place of {model.scheduler_class}; use {others}."
            return [self.problem("scheduler", message)]
        if _already(recipes[self.solver], model):
            message = f"{model.name} already uses {self.solver}, so the picture does not change."
            return [self.problem("pointless", message, "warning")]
        return []

    def apply(self, target: Target) -> None:
        new = build(recipes_for(target.model)[self.solver], target.scheduler.config)
        target.edit.set(target.pipeline, "scheduler", new)
        target.report(NAME, "solvers_replaced", 1)

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Exact: every solver evaluates once a step, but Heun's."""
        return base.scaled((2 * workload.steps - 1) / workload.steps) if self.solver == "heun" else base


def recipes_for(model: ModelDescription) -> Mapping[str, Recipe]:
    """Solvers that may take the place of a model's scheduler, by name; empty when none may."""
    config, name = model.scheduler, model.scheduler_class
    if name in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"):
        return _COGVIDEOX
    if any(config.get(k) for k in _BENT):
        return {}
    if name == "FlowMatchEulerDiscreteScheduler":
        return _EULER
    flow = config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")
    if name in (_UNIPC.scheduler, _dpm(2).scheduler) and flow:
        return _MULTISTEP
    return {}


def build(recipe: Recipe, config: Mapping[str, Any]) -> Any:
    """A diffusers scheduler after a recipe, with everything else as in another scheduler's settings."""
    cls = _class(recipe.scheduler)
    known = inspect.signature(cls.__init__).parameters
    kept = {k: v for k, v in config.items() if k in known or k.startswith("_")}
    settings = dict(recipe.settings)
    if "flow_shift" in known and "shift" in config:
        settings |= {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": config["shift"],
        }
    if "shift" in known and "flow_shift" in config:
        settings["shift"] = config["flow_shift"]
    return cls.from_config(kept, **settings)


def _class(name: str) -> Any:
    """One of our own scheduler classes, or diffusers'."""
    import diffusers

    from vivace.techniques.trajectory import _res_scheduler

    return getattr(_res_scheduler, name, None) or getattr(diffusers, name)


def _already(recipe: Recipe, model: ModelDescription) -> bool:
    return model.scheduler_class == recipe.scheduler and all(
        model.scheduler.get(k) == v for k, v in recipe.settings.items()
    )

"""A student's contract of sampling against what a plan does."""

from __future__ import annotations

from collections.abc import Iterator

from vivace.models.adapter import ModelDescription
from vivace.models.student_artifact import Sampler, noise_levels
from vivace.techniques.base import Technique
from vivace.techniques.distillation.student_sampler import StudentSampler

_CLOSE = 2e-3
"""Noise levels that differ by less are the same: integer timesteps of 1000 round more."""


def unmet(
    wants: Sampler, model: ModelDescription, others: tuple[Technique, ...]
) -> Iterator[tuple[str, str]]:
    """(kind, what the student was trained for and what the plan does instead) for each difference."""
    own = next((t for t in others if isinstance(t, StudentSampler)), None)
    planned = (getattr(t, "steps", None) for t in others)
    steps = next((s for s in planned if s), model.defaults.get("num_inference_steps", 50))
    if wants.steps is not None and steps != wants.steps:
        yield "steps", f"was trained for {wants.steps} steps and the plan makes {steps}"
    shifts = [s for t in others if (s := getattr(t, "shift", None)) is not None]
    shift = shifts[0] if shifts else model.scheduler.get("flow_shift", model.scheduler.get("shift"))
    levels = own.levels if own is not None else ()
    if wants.sigmas is None and wants.shift is not None:
        if not levels and shift != wants.shift:
            yield "shift", f"was trained with shift {wants.shift:g} and the plan has {shift}"
        elif levels and not _same(levels, noise_levels(len(levels), wants.shift)):
            yield "shift", f"was trained with shift {wants.shift:g} and the plan has other sigmas"
    wanted = wants.levels()
    if wants.sigmas is not None and wanted:
        made = levels or noise_levels(len(wanted), 1.0 if shift is None else shift)
        if not _same(made, wanted):
            named = ", ".join(f"{s:g}" for s in wants.sigmas)
            yield "sigmas", f"was trained at the noise levels {named}, which the plan does not make"
    if wants.solver is not None and (has := _solver(own, model, others)) != wants.solver:
        yield "solver", f"was trained for the solver {wants.solver} and the plan has {has}"
    guides = model.workload().guidance > 1.0
    owned = any(c.resource == "guidance.branches" for t in others for c in t.claims(model))
    if wants.guidance is not None and wants.guidance <= 1.0 and guides and not owned:
        yield "guidance", "needs no guidance and the plan guides"


def _solver(own: StudentSampler | None, model: ModelDescription, others: tuple[Technique, ...]) -> str:
    """The solver of a plan in the words of a contract, or the scheduler's own name."""
    if own is not None:
        return own.solver
    chosen = next((t for t in others if any(c.resource == "sampler.solver" for c in t.claims(model))), None)
    name = model.scheduler_class if chosen is None else str(getattr(chosen, "solver", chosen.card.name))
    return "flow" if name in ("euler", "FlowMatchEulerDiscreteScheduler") else name


def _same(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and all(abs(x - y) < _CLOSE for x, y in zip(a, b, strict=True))

"""What signal-driven caches take from a calibration artefact, and whether it was made for the run at hand.

The file is read when a plan is checked or applied. The family is known from the model's description; the weights when
the plan is put in force; shape and guidance when the first step runs. A file that was made for something else is
refused at the earliest of these places. What is taken from it serves any number of steps, any solver and any place of
the steps, so those parts of the key do not bind: a polynomial maps a change of the time embedding to a change of the
output, and MagCache's authors take their curve to other numbers of steps by the nearest value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from vivace.calibration.artifact import Calibration, Key
from vivace.core.errors import ConfigError, PlanError
from vivace.core.shapes import TokenGrid
from vivace.models.adapter import Guidance, ModelDescription, RootCall
from vivace.techniques.base import Target, Technique
from vivace.techniques.caching.votes import quantised

if TYPE_CHECKING:
    import torch

BINDING = ("family", "model_hash", "frames", "height", "width", "guidance")
"""Parts of a calibration's key that a run must share."""


def complaint(path: str, model: ModelDescription) -> str | None:
    """Why the calibration at `path` cannot serve a model; None when it can."""
    try:
        found = Calibration.load(path)
    except ConfigError as error:
        return str(error)
    if found.key.family != model.family:
        made_for = found.key.family
        return f"the calibration {path} was made for the family {made_for}, and {model.name} is of {model.family}."
    missing = [e.name for e in model.experts if "cond" not in found.curves.get(e.name, {})]
    if missing:
        return f"the calibration {path} holds no conditional curves of {', '.join(missing)}; make it for this model."
    return None


def bind(technique: Technique, path: str, target: Target) -> None:
    """Refuse a calibration that was made for other weights, and watch every first step for its shape and guidance.

    Quantised weights are not compared: rounding changes the curves little. Weights that a technique of the plan puts in
    place (a LoRA) count as the model they were put into.

    Raises:
        PlanError: other weights (at once), or another shape or guidance (from the first step of a run).
    """
    made = Calibration.load(path)

    def refuse(key: Key) -> None:
        if problems := made.problems(key, BINDING):
            raise PlanError([technique.problem("calibration", p) for p in problems])

    # A checkpoint that came quantised holds other values than the calibrated one by design.
    if target.model_hash and not any(quantised(e) for e in target.experts):
        refuse(dataclasses.replace(made.key, model_hash=target.model_hash))
    seen = -1

    def handler(call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
        nonlocal seen
        if target.clock.generation != seen:
            seen = target.clock.generation
            refuse(_key_now(made.key, target))
        return run(call)

    for expert in target.experts:
        target.around_expert(expert, handler)


def _key_now(key: Key, target: Target) -> Key:
    """The calibration's key with what the first evaluation of this run shows of shape and guidance."""
    model, pipeline = target.model, target.pipeline
    changes: dict[str, float] = {}
    if model.adapter is not None and model.guidance is not Guidance.NONE:
        scale = getattr(pipeline, model.adapter.guidance_argument, None)
        if isinstance(scale, (int, float)):
            changes["guidance"] = float(scale)
    evaluation = target.clock.evaluation
    now: TokenGrid | None = evaluation.grid if evaluation is not None else None
    then = model.grid(model.workload(frames=key.frames, height=key.height, width=key.width))
    if now is not None and then is not None:
        # Tokens count pixels in fixed strides; of frames the first stands alone.
        changes["height"] = round(key.height * now.height / then.height)
        changes["width"] = round(key.width * now.width / then.width)
        if now.frames != then.frames:
            changes["frames"] = round(1 + (key.frames - 1) * (now.frames - 1) / max(1, then.frames - 1))
    return dataclasses.replace(key, **changes)


def polynomials(path: str) -> dict[str, tuple[float, ...]]:
    """Expert -> TeaCache's polynomial (highest power first), of the conditional branch.

    Raises:
        ConfigError: the file cannot be read.
    """
    found = Calibration.load(path)
    return {expert: tuple(c["cond"].tea_polynomial) for expert, c in found.curves.items() if "cond" in c}


def ratios(path: str) -> tuple[float, ...]:
    """MagCache's ratios |r_t| / |r_(t-1)| over all steps, of the conditional branch.

    Raises:
        ConfigError: the file cannot be read, or holds no conditional branch.
    """
    return tuple(Calibration.load(path).joined("cond", "residual_ratio"))

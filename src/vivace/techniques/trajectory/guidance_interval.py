"""Guidance interval: classifier-free guidance on a part of the trajectory only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vivace.core.context import COND, FUSED, UNCOND
from vivace.core.shapes import Workload
from vivace.models.adapter import ModelDescription, RootCall
from vivace.techniques.base import (
    Card,
    Cite,
    Estimate,
    Need,
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
    from collections.abc import Callable

    import torch

NAME = "guidance_interval"


@dataclass(frozen=True, kw_only=True)
class GuidanceInterval(Technique):
    """Guide where low <= progress < high, with progress = step / steps; elsewhere the prediction is conditional.

    Outside the interval the unconditional evaluation u is not run and is answered with the conditional one c of
    the same step, so that the pipeline's own u + g (c - u) is c exactly, whatever its guidance scale g.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.TRAJECTORY,
        summary="Runs classifier-free guidance on a part of the steps and saves half of the work on the others.",
        objective="fewer network evaluations",
        stage=Stage.TRAJECTORY,
        claims=(exclusive("guidance.branches"),),
        needs=(Need.GUIDANCE,),
        cite=Cite(
            title="Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in "
            "Diffusion Models",
            arxiv="2404.07724",
            code="https://github.com/kynkaat/guidance-interval",
            differs="the interval is a share of the steps, the original's a range of noise levels",
        ),
    )

    low: float = knob(0.0, low=0.0, high=1.0, monotone="nfe")
    """Progress from which on guidance acts; 0 is the first step."""
    high: float = knob(0.6, low=0.0, high=1.0)
    """Progress at which guidance ends; 1 is after the last step."""

    @property
    def is_identity(self) -> bool:
        """The whole trajectory is guided."""
        return self.low == 0.0 and self.high == 1.0

    def guides(self, step: int, steps: int) -> bool:
        """Whether a step lies in the interval."""
        return self.low * steps <= step < self.high * steps

    def check(self, model: ModelDescription) -> list[Problem]:
        if self.low >= self.high:
            message = f"low={self.low:g} is not below high={self.high:g}, so guidance never acts."
            return [self.problem("empty", message, "warning")]
        return []

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            target.around_expert(expert, self._handler(target))

    def _handler(self, target: Target) -> RootHandler:
        clock = target.clock

        def handler(call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
            if self.guides(clock.step, clock.num_steps):
                return run(call)
            if clock.branch == FUSED:
                return self._fused(target, call, run)
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

    @staticmethod
    def _fused(target: Target, call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
        """The pair [uncond, cond] in one batch: run the second half and answer both with it."""
        import torch

        sample = conditional_half(target, call, run)
        skipped(target, NAME)
        return torch.cat([sample, sample])

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Exact where both branches have texts of one length, which joint attention of separate calls need not have."""
        guided = sum(self.guides(i, workload.steps) for i in range(workload.steps))
        share = (workload.steps - guided) / workload.steps
        return without(model, workload, base, share, share)

"""Adaptive guidance: a sample's guidance ends once its conditional and unconditional predictions agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.context import COND, FUSED, UNCOND
from vivace.core.shapes import Workload
from vivace.models.adapter import ModelDescription, RootCall
from vivace.techniques.base import (
    Card,
    Cite,
    Estimate,
    Need,
    Paradigm,
    RootHandler,
    Stage,
    Target,
    Technique,
    exclusive,
    knob,
)
from vivace.techniques.guidance import (
    Run,
    conditional_half,
    difference,
    skipped,
    unconditional,
    without,
)

if TYPE_CHECKING:
    import torch

NAME = "adaptive_guidance"
NONE, STORED = "none", "stored"


@dataclass(slots=True, eq=False)
class Memory:
    """One expert's memory in one generation."""

    step: int = -1
    cond: torch.Tensor | None = None
    """c (B, C, T, H, W) of `step`."""
    stopped: dict[int, torch.Tensor | None] = field(default_factory=dict)
    """Samples whose guidance has ended -> d (C, T, H, W) at their last guided step, or None where it is not needed."""

    def active(self, samples: int) -> list[int]:
        """Samples that are still guided."""
        return [i for i in range(samples) if i not in self.stopped]


@dataclass(frozen=True, kw_only=True)
class AdaptiveGuidance(Technique):
    """Once cos(c, u) > threshold at a step, the sample's u is not evaluated from the next step on: u := c.

    Every sample decides for itself, and its rows leave the batch when its guidance ends. With two experts each decides
    anew, because what one network's branches agree on says nothing about the other's.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.TRAJECTORY,
        summary="Ends the unconditional evaluation of a sample once both branches agree.",
        objective="fewer network evaluations",
        stage=Stage.TRAJECTORY,
        claims=(exclusive("guidance.branches"),),
        needs=(Need.GUIDANCE,),
        cite=Cite(
            title="Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models",
            arxiv="2312.12487",
            differs="decides for every sample and every expert; the last difference of the branches can be kept "
            "instead of dropping guidance",
        ),
    )

    threshold: float = knob(0.999, low=0.0, high=1.0, identity=1.0)
    """Cosine of c and u above which guidance ends; 1 never ends it.

    Velocities of flow models agree closely from the start, because both hold the same noise: a threshold of .99 that
    suits noise predictions can be passed at the first step."""
    delta: str = knob(NONE, choices=(NONE, STORED))
    """What c - u is afterwards: 0, or what it was at the sample's last guided step."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        # With random weights the cosine wanders; at this threshold it is passed early.
        return (cls(threshold=0.5), cls(threshold=0.5, delta=STORED))

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            target.around_expert(expert, self._handler(target))

    def _handler(self, target: Target) -> RootHandler:
        clock = target.clock

        def handler(call: RootCall, run: Run) -> torch.Tensor:
            memory = target.store.shared(NAME, "pair", Memory)
            if clock.branch == FUSED:
                return self._fused(target, memory, call, run)
            if clock.branch == COND:
                memory.step, memory.cond = clock.step, run(call)
                return memory.cond
            if clock.branch != UNCOND or memory.cond is None or memory.step != clock.step:
                return run(call)
            cond, active = memory.cond, memory.active(call.rows)
            if len(active) == call.rows:
                uncond = run(call)
                self._decide(memory, active, cond, uncond)
                return uncond
            part = self._part(target, call, run, active)
            return self._answer(target, memory, cond, active, part)

        return handler

    def _fused(self, target: Target, memory: Memory, call: RootCall, run: Run) -> torch.Tensor:
        """The pair [u, c] in one batch; once a sample has stopped, c of all and u of the others are run in turn."""
        import torch

        samples = call.rows // 2
        active = memory.active(samples)
        if len(active) == samples:
            pair = run(call)
            uncond, cond = pair.chunk(2)
            self._decide(memory, active, cond, uncond)
            return pair
        cond = conditional_half(target, call, run)
        part = self._part(target, call, run, active)
        return torch.cat([self._answer(target, memory, cond, active, part), cond])

    @staticmethod
    def _part(target: Target, call: RootCall, run: Run, active: Sequence[int]) -> torch.Tensor | None:
        """u of the active samples alone; None when there are none. The unconditional rows stand first in a pair."""
        if not active:
            return None
        with target.clock.narrowed(UNCOND, active):
            return run(call.rows_at(active))

    def _answer(
        self,
        target: Target,
        memory: Memory,
        cond: torch.Tensor,
        active: Sequence[int],
        part: torch.Tensor | None,
    ) -> torch.Tensor:
        """u (B, ...) from c (B, ...) and from `part`, the evaluated u of the active samples."""
        import torch

        skipped(target, NAME, (cond.shape[0] - len(active)) / cond.shape[0])
        rows = list(cond)
        for i, delta in memory.stopped.items():
            if delta is not None:
                rows[i] = unconditional(cond[i], delta)
        for i, row in zip(active, part if part is not None else (), strict=True):
            rows[i] = row
        if part is not None:
            self._decide(memory, active, cond[list(active)], part)
        return torch.stack(rows)

    def _decide(
        self, memory: Memory, active: Sequence[int], cond: torch.Tensor, uncond: torch.Tensor
    ) -> None:
        """Which samples stop after this step. `cond` and `uncond` hold the rows of the active samples only."""
        import torch

        if self.threshold >= 1.0:
            return
        cosine = torch.cosine_similarity(cond.flatten(1).float(), uncond.flatten(1).float(), dim=1)
        # The one synchronisation with the device in a step, and none once every sample has stopped.
        for k, (i, value) in enumerate(zip(active, cosine.tolist(), strict=True)):
            if value > self.threshold:
                memory.stopped[i] = difference(cond[k], uncond[k]) if self.delta == STORED else None

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Bounds: guidance never ends, or ends after the first step."""
        if self.threshold >= 1.0:
            return base
        return without(model, workload, base, 0.0, 1.0 - 1.0 / workload.steps)

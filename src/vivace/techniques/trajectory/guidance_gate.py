"""Guidance gate: after a share of the steps the unconditional evaluation is answered from a stored difference."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from vivace.core.context import COND, FUSED, UNCOND, Clock
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

NAME = "guidance_gate"
STORED, EXTRAPOLATED, NONE = "stored", "extrapolated", "none"
REACH = 1.0
"""An extrapolation goes at most this many gaps between the last two differences beyond the last one, then stands still.

Neighbouring differences are noisy: on the embedded model, 12 steps and gate .5, the latents' relative error was .35
with one gap, 1.03 with four and 2.00 without a bound, against .30 for the stored difference.
"""


@dataclass(slots=True, eq=False)
class Memory:
    """One expert's memory in one generation: c of the current step, and the last two differences d with their place."""

    step: int = -1
    cond: torch.Tensor | None = None
    shape: tuple[int, ...] = ()
    """Of the latents (one branch's rows) for which `deltas` holds."""
    deltas: deque[tuple[float, torch.Tensor]] = field(default_factory=lambda: deque(maxlen=2))

    def conditional(self, step: int) -> torch.Tensor | None:
        """c of this step, if it has been evaluated."""
        return self.cond if self.step == step else None


@dataclass(frozen=True, kw_only=True)
class GuidanceGate(Technique):
    """From step ceil(gate * steps) on, u is not evaluated: u := c - d, with d = c - u of the last guided step.

    The pipeline's own u + g (c - u) then is c + (g - 1) d: the strength of guidance does not jump at the gate. With
    two experts each has its own d, so a second expert's first step is guided even behind the gate.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.TRAJECTORY,
        summary="Ends the unconditional evaluation after a share of the steps and keeps adding the last difference "
        "between the branches.",
        objective="fewer network evaluations",
        stage=Stage.TRAJECTORY,
        claims=(exclusive("guidance.branches"),),
        needs=(Need.GUIDANCE,),
        cite=Cite(
            title="Guidance gate (FastVideo), after adaptive guidance",
            arxiv="2312.12487",
            code="https://github.com/hao-ai-lab/FastVideo",
            differs="the difference can be refreshed every few steps or extrapolated in sigma from the last two; "
            "each expert has its own",
        ),
    )

    gate: float = knob(0.5, low=0.0, high=1.0, identity=1.0)
    """Share of the steps that are guided as usual."""
    delta: str = knob(STORED, choices=(STORED, EXTRAPOLATED, NONE))
    """What d is behind the gate: the last one, one extrapolated linearly in sigma (in the timestep where the scheduler
    has no sigmas), at most `REACH` gaps far, or 0 (no guidance)."""
    every: int = knob(0, low=0, high=16)
    """Behind the gate, evaluate u every so many steps and store its d afresh; 0 never does."""

    @property
    def is_identity(self) -> bool:
        """Every step is guided."""
        return self.gate == 1.0 or self.every == 1

    def guides(self, step: int, steps: int) -> bool:
        """Whether u is evaluated at a step, as far as that is known beforehand."""
        behind = step - math.ceil(self.gate * steps)
        return behind < 0 or (self.every > 0 and (behind + 1) % self.every == 0)

    def check(self, model: ModelDescription) -> list[Problem]:
        if self.delta == NONE and self.gate == 0.0 and self.every == 0:
            return [self.problem("empty", "gate=0 with delta=none never guides.", "warning")]
        return []

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
            cond = memory.conditional(clock.step) if clock.branch == UNCOND else None
            if cond is None:
                return run(call)
            shape = tuple(call.values["hidden_states"].shape)
            if self._may_skip(memory, clock, shape):
                skipped(target, NAME)
                return self._answer(memory, clock, cond)
            uncond = run(call)
            self._remember(memory, clock, shape, cond, uncond)
            return uncond

        return handler

    def _fused(self, target: Target, memory: Memory, call: RootCall, run: Run) -> torch.Tensor:
        """The pair [u, c] in one batch: behind the gate only the second half is evaluated."""
        import torch

        hidden = call.values["hidden_states"]
        shape = (hidden.shape[0] // 2, *hidden.shape[1:])
        if not self._may_skip(memory, target.clock, shape):
            pair = run(call)
            uncond, cond = pair.chunk(2)
            self._remember(memory, target.clock, shape, cond, uncond)
            return pair
        cond = conditional_half(target, call, run)
        skipped(target, NAME)
        return torch.cat([self._answer(memory, target.clock, cond), cond])

    def _may_skip(self, memory: Memory, clock: Clock, shape: tuple[int, ...]) -> bool:
        """Whether u can be answered now. `shape` is that of the latents, which may grow during a generation."""
        if self.guides(clock.step, clock.num_steps):
            return False
        return self.delta == NONE or (bool(memory.deltas) and memory.shape == shape)

    def _remember(
        self,
        memory: Memory,
        clock: Clock,
        shape: tuple[int, ...],
        cond: torch.Tensor,
        uncond: torch.Tensor,
    ) -> None:
        """Note d of a guided step."""
        if self.delta == NONE:
            return
        if self.delta == STORED or memory.shape != shape:
            memory.deltas.clear()
        memory.shape = shape
        memory.deltas.append((place(clock), difference(cond, uncond)))

    def _answer(self, memory: Memory, clock: Clock, cond: torch.Tensor) -> torch.Tensor:
        """u, from c (B, C, T, H, W) of this step."""
        if self.delta == NONE:
            return cond
        at, delta = memory.deltas[-1]
        if self.delta == EXTRAPOLATED and len(memory.deltas) == 2:
            before, older = memory.deltas[0]
            gap = at - before
            reach = min((place(clock) - at) / gap, REACH) if gap else 0.0
            delta = delta + (delta - older) * reach
        return unconditional(cond, delta)

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Exact for one expert; a second one may have to run one pair more than the gate alone would."""
        steps = workload.steps
        guided = [self.guides(i, steps) for i in range(steps)]
        most, least = steps - sum(guided), steps - sum(guided)
        if self.delta != NONE:
            if steps and not guided[0]:
                most, least = most - 1, least - 1
            least = max(0, least - (len(model.experts) - 1))
        return without(model, workload, base, least / steps, most / steps)


def place(clock: Clock) -> float:
    """Where the current step lies: its sigma, or its timestep where the scheduler has no sigmas."""
    return clock.timestep if math.isnan(clock.sigma) else clock.sigma

"""FasterCache: attention outputs are extrapolated, and the unconditional branch is rebuilt from the conditional one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.context import COND, FUSED, UNCOND, Clock
from vivace.core.shapes import Workload
from vivace.models.adapter import Guidance, ModelDescription, RootCall
from vivace.techniques.base import (
    Card,
    Cite,
    Claim,
    Estimate,
    Need,
    Paradigm,
    RootHandler,
    Stage,
    Target,
    exclusive,
    knob,
)
from vivace.techniques.caching.frequencies import split
from vivace.techniques.caching.modules import CLAIMS, SELF, ModuleCache
from vivace.techniques.caching.predictors import Momentum, Predictor

if TYPE_CHECKING:
    import torch

NAME = "fastercache"
LOW_BAND, HIGH_BAND = (99.0, 901.0), (-1.0, 301.0)
"""Timesteps between which the low and the high frequencies of the gap are amplified."""


@dataclass(slots=True, eq=False)
class Gap:
    """What lies between the branches: unconditional minus conditional prediction of one step, in two bands."""

    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    step: int = -1
    """Step of `sample`."""
    sample: torch.Tensor | None = None
    """The conditional prediction of the step under way."""

    def keep(self, uncond: torch.Tensor, cond: torch.Tensor, clock: Clock) -> None:
        """Remember the gap of this step."""
        grid = clock.evaluation.grid if clock.evaluation is not None else None
        self.low, self.high = split(uncond - cond, grid)

    def rebuild(self, cond: torch.Tensor, low: float, high: float) -> torch.Tensor:
        """The unconditional prediction from the conditional one and the amplified bands."""
        assert self.low is not None
        assert self.high is not None
        return cond + low * self.low + high * self.high


@dataclass(frozen=True, kw_only=True)
class FasterCache(ModuleCache):
    """Attention: V_1 + w (V_1 - V_2) from the last two computed outputs. Guidance: u = c + a_low D_low + a_high D_high.

    D = u - c of the last step that evaluated both branches, split by a Fourier transform of each frame. Below a
    timestep the unconditional branch runs every `guidance_interval` steps only. w grows with progress up to `momentum`.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.CACHING,
        summary="Extrapolates attention outputs and rebuilds most unconditional predictions from conditional ones.",
        objective="fewer attention and network evaluations",
        stage=Stage.CACHE,
        claims=(*CLAIMS, exclusive("guidance.branches")),
        needs=(Need.ORDERED_BLOCKS, Need.ATTENTION_SITES),
        fidelity=0.5,
        cite=Cite(
            title="FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality",
            arxiv="2410.19355",
            code="https://github.com/Vchitect/FasterCache",
            differs="works with separate and with batched guidance, alike; at steps that refresh the unconditional "
            "branch both branches compute attention, because the values of one are old; amplification never adds up "
            "over reused steps",
        ),
    )
    kinds: ClassVar[tuple[str, ...]] = (SELF,)
    surely: ClassVar[bool] = False

    tail: int = knob(0, low=0, high=50)
    """Steps at the end that are computed in full."""
    interval: int = knob(2, low=1, high=8)
    """Steps from one computation of attention to the next."""
    momentum: float = knob(0.5, low=0.0, high=1.0)
    """Weight w of the extrapolation at the end of the trajectory; 0 is plain reuse."""
    guidance_interval: int = knob(5, low=1, high=8)
    """Steps from one evaluation of the unconditional branch to the next."""
    alpha: float = knob(1.1, low=1.0, high=1.5)
    """Factor on the gap's low frequencies at timesteps in (99, 901), on its high ones in (-1, 301)."""
    below: float = knob(661.0, low=0.0, high=1000.0)
    """Timestep (0 to 1000) below which anything is reused."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(warmup=1, below=1000.0, guidance_interval=3), cls(warmup=1, below=1000.0))

    @property
    def is_identity(self) -> bool:
        """Attention and both branches are always computed."""
        return self.interval == 1 and self.guidance_interval == 1

    def claims(self, model: ModelDescription) -> tuple[Claim, ...]:
        return CLAIMS if self.guidance_interval == 1 else self.card.claims

    def plan(self, steps: int, timesteps: tuple[float, ...] = ()) -> list[tuple[bool, bool]]:
        """(unconditional branch evaluated, attention computed) for every step; the same however guidance is run."""
        out, ran, cond, uncond = [], 0, 0, 0
        for step in range(steps):
            free = max(1, self.warmup) <= step < steps - self.tail
            free = free and (not timesteps or timesteps[step] < self.below)
            guided = not free or step - ran >= self.guidance_interval
            oldest = min(cond, uncond) if guided else cond
            computed = not free or step - oldest >= self.interval
            ran = step if guided else ran
            cond = step if computed else cond
            uncond = step if computed and guided else uncond
            out.append((guided, computed))
        return out

    def mask(self, kind: str, steps: int, timesteps: tuple[float, ...] = ()) -> tuple[bool, ...]:
        return tuple(computed for _, computed in self.plan(steps, timesteps))

    def predictor(self, clock: Clock) -> Predictor:
        return Momentum(weight=self.momentum * clock.progress)

    def factors(self, timestep: float) -> tuple[float, float]:
        """Factors on the gap's low and high frequencies."""
        low, high = (self.alpha if a < timestep < b else 1.0 for a, b in (LOW_BAND, HIGH_BAND))
        return low, high

    # -- on a live pipeline ---------------------------------------------------------------------------------------

    def apply(self, target: Target) -> None:
        super().apply(target)
        for expert in target.experts:
            target.around_expert(expert, self._around(target))

    def _around(self, target: Target) -> RootHandler:
        clock = target.clock

        def handler(call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
            gap = target.store.shared(NAME, ("guidance", clock.chunk), Gap)
            rebuilds = not self.plan(clock.num_steps, clock.timesteps)[clock.step][0] and gap.low is not None
            if clock.branch == FUSED:
                return self._fused(target, gap, call, run, rebuilds)
            if clock.branch == COND:
                gap.step, gap.sample = clock.step, run(call)
                return gap.sample
            cond, gap.sample = gap.sample if gap.step == clock.step else None, None
            if cond is None or clock.branch != UNCOND:
                return run(call)
            if rebuilds:
                self._skipped(target)
                return gap.rebuild(cond, *self.factors(clock.timestep))
            sample = run(call)
            gap.keep(sample, cond, clock)
            return sample

        return handler

    def _fused(
        self,
        target: Target,
        gap: Gap,
        call: RootCall,
        run: Callable[[RootCall], torch.Tensor],
        rebuilds: bool,
    ) -> torch.Tensor:
        """The pair [uncond, cond] in one batch."""
        import torch

        if not rebuilds:
            sample = run(call)
            uncond, cond = sample.chunk(2)
            gap.keep(uncond, cond, target.clock)
            return sample
        with target.clock.narrowed(COND):
            cond = run(call.select(call.rows // 2, call.rows))
        self._skipped(target)
        return torch.cat([gap.rebuild(cond, *self.factors(target.clock.timestep)), cond])

    @staticmethod
    def _skipped(target: Target) -> None:
        target.report(NAME, "evaluations_skipped", 1)
        if (evaluation := target.clock.evaluation) is not None:
            evaluation.mark(NAME)

    # -- before anything is loaded --------------------------------------------------------------------------------

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Bounds: which steps lie in the window is the scheduler's knowledge."""
        if self.is_identity or model.adapter is None:
            return base
        plan = self.plan(workload.steps)
        skipped = sum(not guided for guided, _ in plan) / workload.steps
        reused = sum(not computed for _, computed in plan) / workload.steps
        share = 1.0
        if base.nfe[0] < 2 * workload.steps:
            skipped = 0.0
        else:
            grid = model.grid(workload)
            longer = model.guidance is Guidance.SEPARATE and grid is not None and grid.text > 0
            # Of joint attention the conditional branch costs at least what its video tokens cost.
            share = 1.0 / (1.0 + (grid.tokens / grid.video) ** 2) if grid is not None and longer else 0.5
        out = base.scaled(1.0 - skipped / 2, 1.0, fields=("nfe", "blocks_run"))
        least = (1.0 - reused) * (share if skipped else 1.0)
        return out.scaled(least, 1.0, fields=("attention_pairs", "flops"))

"""Optimal schedule: a frozen set of computed steps for each guidance branch, the rest forecast from the outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.context import COND, FUSED, UNCOND
from vivace.core.errors import ConfigError
from vivace.core.footprint import OUTPUT, Footprint
from vivace.core.shapes import Workload
from vivace.models.adapter import Guidance, ModelDescription, RootCall
from vivace.techniques.base import (
    Card,
    Cite,
    Claim,
    Estimate,
    Paradigm,
    Problem,
    Stage,
    Target,
    Technique,
    exclusive,
    knob,
)
from vivace.techniques.caching.memory import STORAGES, History
from vivace.techniques.caching.predictors import Lagrange
from vivace.techniques.caching.schedules import power_law, resampled
from vivace.techniques.caching.signals import relative_change
from vivace.techniques.guidance import conditional_half, without

if TYPE_CHECKING:
    import torch

NAME = "optimal_schedule"
ALARM = 3.0
"""Mean drift above this many times the calibrated one is an alarm."""


@dataclass(slots=True, eq=False)
class Outputs:
    """What one expert's outputs of a generation leave behind: whole batches (B, C, T, H, W), newest first."""

    cond: History = field(default_factory=History)
    delta: History = field(default_factory=History)
    now: torch.Tensor | None = None
    step: int = -1
    drift: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class OptimalSchedule(Technique):
    """Evaluate the network at chosen steps only and forecast its output at the others.

    The conditional output c and the guidance delta d = c - u have steps of their own. Between them
    v^(s) = sum_k l_k(s) v_k, the polynomial through the last order + 1 computed outputs over the noise level s, takes
    the place of the network; the solver goes on with all of its steps. Masks are fixed before the run, so there is no
    synchronisation with the device and no graph break.

    Without masks of its own (`cond`, `uncond`) the technique places round(share * steps) pairs by `general`.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.CACHING,
        summary="Runs the network at steps found by search and forecasts its output at the others.",
        objective="fewer network evaluations on the solver's full schedule",
        stage=Stage.TRAJECTORY,
        claims=(exclusive("block.skip"), exclusive("step.skip"), exclusive("guidance.branches")),
        calibration="optional",
        fidelity=0.5,
        cite=Cite(
            title="LeMiCa; OptimalSteps (the search); TaylorSeer (the forecast)",
            arxiv="2511.00090, 2503.21774, 2503.06923",
            differs="the two guidance branches have schedules of their own (conditional output and guidance delta); "
            "outputs of the whole network are forecast by Lagrange polynomials over the noise level at uneven "
            "spacing; schedules are searched on a Gram matrix of one recorded trajectory",
        ),
    )

    share: float = knob(0.4, low=0.05, high=1.0, identity=1.0)
    """Share of the exact run's evaluations, when no steps are given."""
    cond: tuple[int, ...] = ()
    """Steps of `steps` at which the conditional branch is computed; other numbers of steps keep its share and shape."""
    uncond: tuple[int, ...] = ()
    """Steps at which the unconditional branch is computed: some of those of `cond`; () for all of them."""
    steps: int = 50
    """Number of steps that the given masks are for."""
    order: int = knob(2, low=0, high=3)
    """Degree of the forecast of the conditional output."""
    delta_order: int = knob(0, low=0, high=3)
    """Degree of the forecast of the guidance delta."""
    expected_drift: float = 0.0
    """Mean relative L1 error of the forecasts at computed steps when calibrated; 0 switches the alarm off."""
    storage: str = "same"
    """How remembered outputs lie in memory: `same`, `bf16` or `fp8`."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(share=0.5), cls(cond=(0, 1, 2, 4), uncond=(0, 1, 4), steps=6))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.storage not in STORAGES:
            raise ConfigError(f"{NAME}: storage must be one of {', '.join(STORAGES)}, not {self.storage!r}.")
        if self.cond and (min(self.cond) != 0 or max(self.cond) >= self.steps):
            raise ConfigError(f"{NAME}: cond must hold step 0 and steps below {self.steps}.")
        if set(self.uncond) - set(self.cond) or (self.uncond and 0 not in self.uncond):
            raise ConfigError(f"{NAME}: uncond must hold step 0 and only steps of cond.")

    def claims(self, model: ModelDescription) -> tuple[Claim, ...]:
        if model.guidance is Guidance.NONE:
            return tuple(c for c in self.card.claims if c.resource != "guidance.branches")
        return self.card.claims

    def schedule(self, steps: int) -> tuple[frozenset[int], frozenset[int]]:
        """Computed steps of a run of `steps` steps: (conditional, unconditional)."""
        if self.is_identity and not self.cond:
            return frozenset(range(steps)), frozenset(range(steps))
        if not self.cond:
            return general(steps, self.share)
        cond = resampled(self.cond, self.steps, steps)
        if not self.uncond or self.uncond == self.cond:
            return cond, cond
        wanted = resampled(self.uncond, self.steps, steps)
        # Rounding must not part a guidance step from its conditional one.
        return cond, frozenset(min(cond, key=lambda c, w=w: (abs(c - w), c)) for w in wanted)

    @property
    def is_identity(self) -> bool:
        """Every step is computed."""
        return self.share == 1.0 and not self.cond

    def check_beside(self, model: ModelDescription, others: tuple[Technique, ...]) -> list[Problem]:
        if self.is_identity:
            return []
        steps = next((s for o in others if isinstance(s := getattr(o, "steps", None), int)), None)
        steps = steps or model.workload().steps
        cond, uncond = self.schedule(steps)
        if len(cond) < steps or len(uncond) < steps:
            return []
        message = (
            f"computes every one of {steps} steps, so nothing can be gained; use more steps or leave it out."
        )
        return [self.problem("pointless", message, "warning")]

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Exact for one expert; a second one computes its first step, wherever that falls."""
        steps = workload.steps
        cond, uncond = self.schedule(steps)
        experts = len(model.experts)
        if base.nfe[0] < 2 * steps:
            share = len(cond) / steps
            return base.scaled(share, min(1.0, share + (experts - 1) / steps))
        pairs, extra = len(uncond) / steps, (experts - 1) / steps
        # Steps without any evaluation, then those without the unconditional one.
        out = base.scaled(len(cond) / steps, min(1.0, len(cond) / steps + extra))
        alone = 1.0 - pairs * steps / len(cond)
        if experts > 1:
            return out.scaled(1.0 - alone / 2, 1.0)
        return without(model, workload.with_(steps=len(cond)), out, alone, alone)

    def memory(self, model: ModelDescription, workload: Workload, base: Footprint) -> Footprint:
        """The conditional outputs, and the guidance deltas where there are any, of every expert."""
        if self.is_identity:
            return base
        samples = workload.batch * len(model.experts)
        base = base.remembering(samples, self.order + 1, OUTPUT, self.storage)
        if base.rows == workload.batch:
            return base
        return base.remembering(samples, self.delta_order + 1, OUTPUT, self.storage)

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            target.around_expert(expert, Forecast(self, target))


class Forecast:
    """The handler of one expert's calls."""

    def __init__(self, technique: OptimalSchedule, target: Target) -> None:
        self.technique, self.target, self.clock = technique, target, target.clock
        self.for_cond, self.for_delta = Lagrange(technique.order), Lagrange(technique.delta_order)

    @property
    def outputs(self) -> Outputs:
        return self.target.store.shared(NAME, ("outputs", self.clock.chunk), Outputs)

    @property
    def at(self) -> float:
        """Noise level of the step, or its number where the scheduler has none."""
        sigma = self.clock.sigma
        return sigma if sigma == sigma else float(self.clock.step)

    def __call__(self, call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
        clock, outputs = self.clock, self.outputs
        cond, uncond = self.technique.schedule(clock.num_steps)
        computes_delta = clock.step in uncond or not outputs.delta.entries
        computes_cond = clock.step in cond or not outputs.cond.entries
        if clock.branch == FUSED:
            sample = self._fused(call, run, computes_cond or computes_delta, computes_delta)
        elif clock.branch == UNCOND and outputs.step == clock.step and outputs.now is not None:
            sample = self._uncond(call, run, computes_delta)
        elif clock.branch == COND:
            sample = self._cond(call, run, computes_cond)
        else:
            sample = run(call)
        self._close(clock.branch)
        return sample

    def _cond(self, call: RootCall, run: Callable[[RootCall], torch.Tensor], computes: bool) -> torch.Tensor:
        outputs = self.outputs
        if computes:
            sample = run(call)
            self._push(outputs.cond, self.for_cond, sample)
        else:
            sample = self._forecast(outputs.cond, self.for_cond)
            self._skipped(1.0)
        outputs.now, outputs.step = sample, self.clock.step
        return sample

    def _uncond(
        self, call: RootCall, run: Callable[[RootCall], torch.Tensor], computes: bool
    ) -> torch.Tensor:
        outputs = self.outputs
        now, outputs.now = outputs.now, None
        assert now is not None
        if computes:
            sample = run(call)
            self._push(outputs.delta, self.for_delta, now - sample)
            return sample
        self._skipped(1.0)
        return now - self._forecast(outputs.delta, self.for_delta)

    def _fused(
        self,
        call: RootCall,
        run: Callable[[RootCall], torch.Tensor],
        computes_cond: bool,
        computes_delta: bool,
    ) -> torch.Tensor:
        """The pair [uncond, cond] in one batch."""
        import torch

        outputs, half = self.outputs, call.rows // 2
        if computes_delta:
            sample = run(call)
            self._push(outputs.cond, self.for_cond, sample[half:])
            self._push(outputs.delta, self.for_delta, sample[half:] - sample[:half])
            return sample
        if computes_cond:
            now = conditional_half(self.target, call, run)
            self._push(outputs.cond, self.for_cond, now)
            self._skipped(1.0)
        else:
            now = self._forecast(outputs.cond, self.for_cond)
            self._skipped(2.0)
        return torch.cat([now - self._forecast(outputs.delta, self.for_delta), now])

    def _push(self, history: History, predictor: Lagrange, value: torch.Tensor) -> None:
        outputs = self.outputs
        if history is outputs.cond and history.entries:
            outputs.drift.append(relative_change(self._forecast(history, predictor), value))
        history.push(
            self.at, (value,), predictor.depth, self.technique.storage, False, self.target.store.form
        )

    def _forecast(self, history: History, predictor: Lagrange) -> torch.Tensor:
        (value,) = history.combine(predictor.weights(history.nodes, self.at))
        assert value is not None
        return value

    def _skipped(self, evaluations: float) -> None:
        self.target.report(NAME, "hits", evaluations)
        if (evaluation := self.clock.evaluation) is not None:
            evaluation.mark(NAME)

    def _close(self, branch: str) -> None:
        """At the end of the last step: one look at what was noted on the device."""
        outputs = self.outputs
        if not self.clock.last or branch == UNCOND or not outputs.drift:
            return
        import torch

        mean = float(torch.stack(outputs.drift).mean())
        outputs.drift.clear()
        self.target.report(NAME, "drift", mean)
        expected = self.technique.expected_drift
        if expected and mean > ALARM * expected:
            self.target.report(NAME, "drift_alarm", 1)


def general(steps: int, share: float) -> tuple[frozenset[int], frozenset[int]]:
    """Computed steps for a model without a schedule of its own: ever sparser, for errors at the start weigh most.

    Both branches are computed at round(share * steps) steps (n u^1.6 for even u): the shape that the search found on
    the embedded model at every budget.
    """
    count = min(steps, max(2, round(share * steps)))
    last = steps - 1 if share >= 0.35 else max(1, round(0.94 * (steps - 1)))
    pairs = power_law(steps, count, last, 1.6)
    return pairs, pairs

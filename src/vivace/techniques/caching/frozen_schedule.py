"""Frozen schedule: a mask of computed steps, known before the run, at the level of the block stack or the network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.core.context import UNCOND
from vivace.core.errors import ConfigError
from vivace.core.receipt import Receipt
from vivace.models.adapter import ModelDescription, Need
from vivace.techniques.base import Card, Cite, Paradigm, Stage, Target, exclusive, knob, reads
from vivace.techniques.caching.engine import CacheTechnique
from vivace.techniques.caching.policies import Mask
from vivace.techniques.caching.predictors import Lagrange
from vivace.techniques.caching.schedules import power_law, resampled


@dataclass(frozen=True, kw_only=True)
class FrozenSchedule(CacheTechnique):
    """Compute the stack at given steps; elsewhere forecast its residual by a polynomial over the noise level.

    `FrozenSchedule.from_receipt` makes the mask of what an online cache decided in one run. The mask needs no signal,
    so nothing waits for the device; at computed steps the forecast is compared with what comes out (drift).
    """

    card: ClassVar[Card] = Card(
        name="frozen_schedule",
        paradigm=Paradigm.CACHING,
        summary="Skips the block stack at steps fixed beforehand, for example those an online cache chose once.",
        objective="fewer transformer blocks per step, without online decisions",
        stage=Stage.CACHE,
        claims=(exclusive("block.skip"), reads("block.output")),
        needs=(Need.ORDERED_BLOCKS,),
        calibration="optional",
        fidelity=0.5,
        cite=Cite(
            title="LeMiCa; steps computation mask of cache-dit",
            arxiv="2511.00090",
            code="https://github.com/vipshop/cache-dit",
            differs="masks are resampled for other numbers of steps; residuals are forecast over the noise "
            "level at uneven spacing; a drift alarm compares forecasts with computed steps",
        ),
    )
    coordinate: ClassVar[str] = "sigma"
    watches_drift: ClassVar[bool] = True

    share: float = knob(0.4, low=0.05, high=1.0, identity=1.0)
    """Share of computed steps when none are given: the first two, then ever sparser."""
    computed: tuple[int, ...] = ()
    """Computed steps of `steps`; other numbers of steps keep its share and shape."""
    steps: int = 50
    """Number of steps that `computed` is for."""
    order: int = knob(1, low=0, high=3)
    """Degree of the forecast; 0 reuses the last residual."""
    warmup: int = knob(1, low=0, high=50)
    """Steps at the start that are computed in full."""
    tail: int = knob(0, low=0, high=50)
    """Steps at the end that are computed in full."""
    max_consecutive: int = knob(50, low=0, high=50, identity=0)
    """Most skipped steps in a row."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(share=0.5), cls(computed=(0, 1, 3), steps=5, order=0))

    @classmethod
    def from_receipt(cls, receipt: Receipt, **settings: Any) -> Self:
        """The mask that an online cache chose: steps whose conditional evaluation ran in full.

        Raises:
            ConfigError: the receipt is of a run that was not completed, or no step was skipped.
        """
        computed = tuple(
            step.index
            for step in receipt.steps
            if any(b.action == "computed" for b in step.branches if b.branch != UNCOND)
        )
        if not receipt.completed or len(computed) == len(receipt.steps):
            raise ConfigError(
                "frozen_schedule: the receipt shows no skipped step to freeze; use one of a completed run with a "
                "cache that acts."
            )
        return cls(computed=computed, steps=len(receipt.steps), **settings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.computed and (min(self.computed) != 0 or max(self.computed) >= self.steps):
            raise ConfigError(f"frozen_schedule: computed must hold step 0 and steps below {self.steps}.")

    @property
    def is_identity(self) -> bool:
        """Every step is computed."""
        return (self.share == 1.0 and not self.computed) or self.max_consecutive == 0

    def predictor(self) -> Lagrange:
        return Lagrange(self.order)

    def chosen(self, steps: int) -> frozenset[int]:
        """Steps of a run of `steps` steps that the schedule wants computed."""
        if self.computed:
            return resampled(self.computed, self.steps, steps)
        count = max(2, round(self.share * steps))
        return frozenset(range(steps)) if count >= steps else power_law(steps, count, steps - 1, 1.3)

    def mask(self, model: ModelDescription | None, steps: int) -> tuple[bool, ...]:
        chosen, out, since = self.chosen(steps), [], 0
        for step in range(steps):
            inside = max(1, self.warmup) <= step < steps - self.tail and since < self.max_consecutive
            out.append(step in chosen or not inside)
            since = 0 if out[-1] else since + 1
        return tuple(out)

    def policy(self, target: Target) -> Mask:
        return Mask(lambda steps: self.mask(None, steps))

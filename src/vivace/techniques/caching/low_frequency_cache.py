"""Low-frequency cache: skip the network while what can be seen of the picture through the noise hardly changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.models.adapter import ModelDescription
from vivace.techniques.base import (
    Card,
    Cite,
    Need,
    Paradigm,
    Problem,
    Stage,
    Target,
    exclusive,
    knob,
    reads,
)
from vivace.techniques.caching.engine import NETWORK, CacheTechnique
from vivace.techniques.caching.policies import Budget
from vivace.techniques.caching.spectrum import SpectralChange


@dataclass(frozen=True, kw_only=True)
class LowFrequencyCache(CacheTechnique):
    """Skip the network while the filtered latents' relative changes add up to less than `threshold`.

    The filter keeps, of every spatial frequency f, the share a^2 S / (a^2 S + sigma^2) that is signal at the noise
    level sigma (a = 1 - sigma), with the power S ~ f^-exponent of clean pictures: at the start low frequencies only,
    at the end all. A skipped step takes the network's last output.
    """

    card: ClassVar[Card] = Card(
        name="low_frequency_cache",
        paradigm=Paradigm.CACHING,
        summary="Skips network evaluations while the latents, filtered by what is signal at the step, hardly change.",
        objective="fewer network evaluations",
        stage=Stage.CACHE,
        claims=(exclusive("block.skip"), exclusive("step.skip"), reads("block.output")),
        needs=(Need.TOKEN_GRID,),
        fidelity=0.5,
        cite=Cite(
            title="SeaCache: spectral-evolution-aware caching; PreciseCache (low-frequency difference)",
            arxiv="2602.18993",
            differs="filters the latents, where SeaCache filters the first block's input and PreciseCache the "
            "prediction of a trial pass; the filter is spatial; reuses the network's output instead of extrapolating a "
            "residual; decides for every sample",
        ),
    )
    span: ClassVar[str] = NETWORK
    feature: ClassVar[str] = "output"

    threshold: float = knob(0.1, low=0.0, high=1.0, identity=0.0)
    """Sum of relative changes of the filtered latents up to which steps are skipped."""
    exponent: float = knob(3.0, low=0.0, high=6.0)
    """Slope of the clean pictures' power over frequency; 0 filters nothing."""
    warmup: int = knob(1, low=0, high=50)
    """Steps at the start that are computed in full."""
    max_consecutive: int = knob(2, low=0, high=50, identity=0)
    """Most skipped steps in a row."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(threshold=0.5), cls(threshold=0.3, exponent=1.0, tail=0, max_consecutive=4))

    def check(self, model: ModelDescription) -> list[Problem]:
        found = super().check(model)
        if Need.FLOW_SCHEDULER not in model.offers:
            message = (
                f"{model.name} is not sampled along a straight line from noise, so the noise level is taken from the "
                "timestep: the filter is only a rough one."
            )
            found.append(self.problem("noise level", message, "warning"))
        return found

    def signal(self) -> SpectralChange:
        return SpectralChange(exponent=self.exponent)

    def policy(self, target: Target) -> Budget:
        return Budget(self.threshold)

"""TaylorSeer inside the blocks: the output of every attention and feed-forward module is forecast by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.core.context import Clock
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, knob
from vivace.techniques.caching.engine import even_mask
from vivace.techniques.caching.modules import CLAIMS, ModuleCache
from vivace.techniques.caching.predictors import Predictor, Taylor


@dataclass(frozen=True, kw_only=True)
class TaylorSeerModules(ModuleCache):
    """Compute every `interval`-th step; between, module outputs follow a Taylor series of finite differences.

    k steps after the newest computed one, the forecast is the sum over i <= order of D^i k^i / i!, with D^0 the newest
    output and D^i the change of D^(i-1) between the two newest computed steps, per step.
    """

    card: ClassVar[Card] = Card(
        name="taylorseer_modules",
        paradigm=Paradigm.CACHING,
        summary="Forecasts the output of every attention and feed-forward module by its finite differences.",
        objective="fewer attention and feed-forward evaluations",
        stage=Stage.CACHE,
        claims=CLAIMS,
        needs=(Need.ORDERED_BLOCKS, Need.ATTENTION_SITES),
        fidelity=0.5,
        cite=Cite(
            title="From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers",
            arxiv="2503.06923",
            code="https://github.com/Shenyi-Z/Cache4Diffusion",
            differs="every sample has differences of its own; with quantised weights the order falls where the weights "
            "would amplify rounding more than four times; steps at the end can be kept exact",
        ),
    )

    warmup: int = knob(3, low=0, high=50)
    """Steps at the start that are computed in full."""
    interval: int = knob(5, low=1, high=8, identity=1, monotone="flops")
    """Steps from one computation to the next."""
    order: int = knob(1, low=0, high=3)
    """Order of the series; 0 is plain reuse, and more than 1 needs more than bfloat16's digits."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(warmup=2, interval=3),)

    def mask(self, kind: str, steps: int, timesteps: tuple[float, ...] = ()) -> tuple[bool, ...]:
        return even_mask(steps, self.interval, self.warmup, self.tail)

    def predictor(self, clock: Clock) -> Predictor:
        return Taylor(order=self.order)

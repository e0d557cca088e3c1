"""TaylorSeer: forecast the output of the block stack by a Taylor series of finite differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive, knob
from vivace.techniques.caching.intervals import ForecastingCache
from vivace.techniques.caching.predictors import Taylor


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(ForecastingCache):
    """Between computed steps the stack's output is sum_i D^i k^i / i!, k steps after the newest computed one.

    D^0 is the newest output, D^i the difference of the last two D^(i-1) divided by their distance in steps. Only the
    last output is remembered (order + 1 tensors of a block's size for each sample and branch), not every module's.
    """

    card: ClassVar[Card] = Card(
        name="taylorseer",
        paradigm=Paradigm.CACHING,
        summary="Forecasts the block stack's output by a Taylor series between every n-th step.",
        objective="fewer transformer blocks per step",
        stage=Stage.CACHE,
        claims=(exclusive("block.skip"),),
        needs=(Need.ORDERED_BLOCKS,),
        fidelity=0.5,
        cite=Cite(
            title="From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers",
            arxiv="2503.06923",
            code="https://github.com/Shenyi-Z/Cache4Diffusion",
            differs="forecasts the last output only (the original's lite mode), where the paper forecasts the output "
            "of every attention and feed-forward module; on a quantised network the order falls where forecasting "
            "would amplify rounding noise more than four times",
        ),
    )

    order: int = knob(1, low=0, high=3)
    """Order of the series; 0 repeats the newest output. 1 is what bfloat16 supports."""

    def predictor(self) -> Taylor:
        return Taylor(self.order)

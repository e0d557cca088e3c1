"""HiCache: TaylorSeer in a basis of contracted Hermite polynomials."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive, knob
from vivace.techniques.caching.intervals import ForecastingCache
from vivace.techniques.caching.predictors import Hermite


@dataclass(frozen=True, kw_only=True)
class HiCache(ForecastingCache):
    """Between computed steps the stack's output is sum_i D^i s^i H_i(s k) / i!, k steps after the newest computed one.

    H_i are the physicists' Hermite polynomials and s < 1 contracts both their argument and their coefficients, so
    that a long forecast does not run away. D^i are the differences of TaylorSeer.
    """

    card: ClassVar[Card] = Card(
        name="hicache",
        paradigm=Paradigm.CACHING,
        summary="Forecasts the block stack's output in Hermite polynomials between every n-th step.",
        objective="fewer transformer blocks per step",
        stage=Stage.CACHE,
        claims=(exclusive("block.skip"),),
        needs=(Need.ORDERED_BLOCKS,),
        fidelity=0.5,
        cite=Cite(
            title="HiCache: A Plug-in Scaled-Hermite Upgrade for Taylor-Style Cache-then-Forecast Diffusion "
            "Acceleration",
            arxiv="2508.16984",
            code="https://github.com/fenglang918/HiCache",
            differs="forecasts the last output only, where the paper forecasts the output of every attention and "
            "feed-forward module; the interval of 5 is TaylorSeer's, the paper's figures use up to 7; on a quantised "
            "network the order falls where forecasting would amplify rounding noise more than four times",
        ),
    )

    order: int = knob(2, low=0, high=3)
    """Highest polynomial; 0 repeats the newest output."""
    contraction: float = knob(0.5, low=0.1, high=1.0)
    """s: scale of the polynomials' argument and coefficients."""

    def predictor(self) -> Hermite:
        return Hermite(self.order, self.contraction)

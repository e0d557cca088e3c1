"""FoCa: the stack's output as the solution of an ODE, forecast by BDF2 and calibrated by Heun's rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive
from vivace.techniques.caching.intervals import ForecastingCache
from vivace.techniques.caching.predictors import Bdf


@dataclass(frozen=True, kw_only=True)
class FoCa(ForecastingCache):
    """Between computed steps the stack's output is V_0 + k (f_0 + f_P) / 2, k steps after the newest computed one.

    f_0 is the BDF2 slope of the last three computed outputs, P = V_0 + k f_0 the forecast, and f_P the BDF2 slope of
    P, V_0 and V_1 at the forecast step (Heun's trapezium). See `predictors.Bdf` for the errors.
    """

    card: ClassVar[Card] = Card(
        name="foca",
        paradigm=Paradigm.CACHING,
        summary="Forecasts the block stack's output as an ODE's solution, and calibrates the forecast.",
        objective="fewer transformer blocks per step",
        stage=Stage.CACHE,
        claims=(exclusive("block.skip"),),
        needs=(Need.ORDERED_BLOCKS,),
        fidelity=0.5,
        cite=Cite(
            title="Forecast then Calibrate: Feature Caching as ODE for Efficient Diffusion Transformers",
            arxiv="2508.16211",
            differs="the paper names a BDF2 predictor and a Heun corrector, and its formulas were not at hand: how the "
            "two are joined is our reading, at variable steps; forecasts the last output only, where the paper "
            "forecasts every module's; on a quantised network the order falls where forecasting would amplify "
            "rounding noise more than four times",
        ),
    )

    def predictor(self) -> Bdf:
        return Bdf()

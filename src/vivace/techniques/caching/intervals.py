"""Forecasting caches: every n-th step is computed, and the steps between are forecast from the computed ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.models.adapter import ModelDescription
from vivace.techniques.base import Target, knob
from vivace.techniques.caching.engine import CacheTechnique, even_mask
from vivace.techniques.caching.policies import Interval


@dataclass(frozen=True, kw_only=True)
class ForecastingCache(CacheTechnique):
    """Base: the output of the block stack is forecast between the steps of an interval.

    Methods differ in their predictor. Which steps are computed is known beforehand, so a decision costs no
    synchronisation with the device and the estimate is exact (with two experts: up to one step for each).
    """

    abstract: ClassVar[bool] = True
    feature: ClassVar[str] = "output"

    interval: int = knob(5, low=1, high=20, identity=1, monotone="blocks_run")
    """Steps from one computed step to the next."""
    warmup: int = knob(3, low=0, high=50)
    """Steps at the start that are computed in full."""
    tail: int = knob(0, low=0, high=50)
    """Steps at the end that are computed in full."""
    max_consecutive: int = knob(19, low=0, high=50, identity=0)
    """Most skipped steps in a row; below interval - 1 it shortens the interval."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        # A run of the contract has six steps.
        return (cls(interval=2, warmup=2), cls())

    @property
    def every(self) -> int:
        """Distance of computed steps, with the cap on skips."""
        return min(self.interval, self.max_consecutive + 1)

    def policy(self, target: Target) -> Interval:
        return Interval(self.every)

    def mask(self, model: ModelDescription, steps: int) -> tuple[bool, ...]:
        return even_mask(steps, self.every, self.head_steps(steps), self.tail_steps(steps))

"""MagCache: skip the block stack where a calibrated curve of residual magnitudes says that little is lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.core.errors import ConfigError
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
from vivace.techniques.caching import calibrated
from vivace.techniques.caching.engine import CacheTechnique
from vivace.techniques.caching.policies import Mask


@dataclass(frozen=True, kw_only=True)
class MagCache(CacheTechnique):
    """Skip the stack while sum |1 - prod g| < threshold since the last computed step; add its last residual instead.

    g_t = mean(|r_t| / |r_(t-1)|) over tokens, r the stack's residual, is measured once and hardly depends on the
    prompt. Nothing is measured in a run, so the computed steps are known beforehand.
    """

    card: ClassVar[Card] = Card(
        name="magcache",
        paradigm=Paradigm.CACHING,
        summary="Skips the block stack while a calibrated curve of residual magnitudes keeps the error small.",
        objective="fewer transformer blocks per step",
        stage=Stage.CACHE,
        claims=(exclusive("block.skip"), reads("block.output")),
        needs=(Need.ORDERED_BLOCKS,),
        calibration="required",
        cite=Cite(
            title="MagCache: Fast Video Generation with Magnitude-Aware Cache",
            arxiv="2506.09045",
            code="https://github.com/Zehong-Ma/MagCache",
            differs="one curve, the conditional branch's, decides for both guidance branches, where the original has "
            "one for each; steps at the end can be kept exact",
        ),
    )

    threshold: float = knob(0.12, low=0.0, high=1.0, identity=0.0, monotone="blocks_run")
    """Accumulated error |1 - product of ratios| up to which steps are skipped."""
    retention: float = knob(0.2, low=0.0, high=1.0, identity=1.0)
    """Share of the steps, at the start, that are computed in full."""
    warmup: int = knob(1, low=0, high=50)
    """Steps at the start that are computed in full, whatever `retention` is."""
    tail: int = knob(0, low=0, high=50)
    """Steps at the end that are computed in full."""
    max_consecutive: int = knob(2, low=0, high=50, identity=0)
    """Most skipped steps in a row (K)."""
    ratios: tuple[float, ...] = ()
    """The curve, one value for each step of the run it was measured in; other numbers of steps take the nearest."""
    calibration: str = ""
    """Path of a calibration artefact that holds the curve.

    It must be of the same weights, shape and guidance; steps, scheduler and solver may differ: other numbers of steps
    take the nearest value.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratios and self.calibration:
            raise ConfigError("magcache: give ratios or a calibration, not both.")

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(ratios=(1.0, 1.02, 0.98, 0.97, 1.01, 0.95, 0.9, 0.8)),)

    def check(self, model: ModelDescription) -> list[Problem]:
        found = super().check(model)
        if self.calibration:
            if wrong := calibrated.complaint(self.calibration, model):
                found.append(self.problem("calibration", wrong))
        elif not self.ratios and not self.is_identity:
            message = (
                "has no curve of residual magnitudes for this model; measure one with `vivace calibrate` and give the "
                "file as `calibration`, or the values as `ratios`."
            )
            found.append(self.problem("calibration", message))
        return found

    def apply(self, target: Target) -> None:
        super().apply(target)
        if self.calibration:
            calibrated.bind(self, self.calibration, target)

    def head_steps(self, steps: int) -> int:
        return max(self.warmup, int(self.retention * steps))

    def policy(self, target: Target) -> Mask:
        ratios = self._ratios()
        return Mask(lambda steps: self._computed(ratios, steps))

    def mask(self, model: ModelDescription, steps: int) -> tuple[bool, ...] | None:
        if not self.ratios and not self.calibration:
            return None
        return self._computed(self._ratios(), steps)

    def _ratios(self) -> tuple[float, ...]:
        """The curve.

        Raises:
            ConfigError: the calibration cannot be read, or there is no curve at all.
        """
        if self.calibration:
            return calibrated.ratios(self.calibration)
        if not self.ratios:
            raise ConfigError("magcache has no curve; give `calibration` or `ratios`.")
        return self.ratios

    def _computed(self, ratios: tuple[float, ...], steps: int) -> tuple[bool, ...]:
        """True at the computed steps of a run of `steps` steps."""
        out: list[bool] = []
        product, error, run = 1.0, 0.0, 0
        head, stop = max(1, self.head_steps(steps)), steps - self.tail
        for step, ratio in enumerate(nearest(ratios, steps)):
            product, run = product * ratio, run + 1
            error += abs(1.0 - product)
            skipped = head <= step < stop and error < self.threshold and run <= self.max_consecutive
            if not skipped:
                product, error, run = 1.0, 0.0, 0
            out.append(not skipped)
        return tuple(out)


def nearest(curve: tuple[float, ...], steps: int) -> tuple[float, ...]:
    """The curve over another number of steps: at every step the nearest value by progress."""
    if steps == len(curve):
        return curve
    if steps == 1:
        return curve[-1:]
    scale = (len(curve) - 1) / (steps - 1)
    return tuple(curve[round(i * scale)] for i in range(steps))

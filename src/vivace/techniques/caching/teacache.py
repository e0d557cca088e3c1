"""TeaCache: skip the block stack while the changes of the time embedding, rescaled, add up to little."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
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
from vivace.techniques.caching.policies import Budget
from vivace.techniques.caching.signals import TimeEmbedding


@functools.cache
def published() -> Mapping[str, tuple[float, ...]]:
    """Model -> polynomial of the authors, highest power first."""
    import yaml

    text = Path(__file__).with_name("teacache_coefficients.yaml").read_text(encoding="utf-8")
    return {name: tuple(map(float, values)) for name, values in yaml.safe_load(text).items()}


def horner(coefficients: tuple[float, ...], x: float) -> float:
    """Value of a polynomial, highest power first."""
    total = 0.0
    for c in coefficients:
        total = total * x + c
    return total


@dataclass(frozen=True, kw_only=True)
class TeaCache(CacheTechnique):
    """Skip the stack while sum p(d_t) < threshold since the last computed step; add its last residual instead.

    d_t = mean|e_t - e_(t-1)| / mean|e_(t-1)| is the change of the time embedding e handed to the first block, and p a
    polynomial that was fitted to the change of the output. Where e depends on the timestep only, so does the pattern
    of skipped steps: steps, shift and threshold fix it.
    """

    card: ClassVar[Card] = Card(
        name="teacache",
        paradigm=Paradigm.CACHING,
        summary="Skips the block stack while the predicted changes of its output add up to less than a threshold.",
        objective="fewer transformer blocks per step",
        stage=Stage.CACHE,
        claims=(exclusive("block.skip"), reads("block.output")),
        needs=(Need.ORDERED_BLOCKS,),
        calibration="optional",
        fidelity=0.5,
        cite=Cite(
            title="Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model",
            arxiv="2411.19108",
            code="https://github.com/ali-vilab/TeaCache",
            differs="the signal is always the time embedding that the blocks get, where the original modulates the "
            "input of some models with it; the conditional branch decides for both guidance branches, and every sample "
            "for itself; without a fit the changes are added as they are",
        ),
    )

    threshold: float = knob(0.1, low=0.0, high=1.0, identity=0.0, monotone="blocks_run")
    """Sum of predicted relative changes up to which steps are skipped."""
    warmup: int = knob(5, low=0, high=50)
    """Steps at the start that are computed in full."""
    tail: int = knob(0, low=0, high=50)
    """Steps at the end that are computed in full."""
    max_consecutive: int = knob(50, low=0, high=50, identity=0)
    """Most skipped steps in a row."""
    coefficients: tuple[float, ...] = ()
    """The polynomial, highest power first; empty for what `fit` or `calibration` says."""
    fit: str = "none"
    """A polynomial of the authors, by the model's name (`teacache_coefficients.yaml`), or `none`."""
    calibration: str = ""
    """Path of a calibration artefact that holds a polynomial for every expert.

    It must be of the same weights, shape and guidance; steps, scheduler and solver may differ.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit != "none" and self.fit not in published():
            known = ", ".join(["none", *published()])
            raise ConfigError(f"teacache: fit must be one of {known}, not {self.fit!r}.")
        if sum((bool(self.coefficients), self.fit != "none", bool(self.calibration))) > 1:
            raise ConfigError("teacache: give one of coefficients, fit and calibration, not several.")

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(threshold=0.4, warmup=1), cls(coefficients=(0.5, 0.0), warmup=1, tail=1), cls())

    def check(self, model: ModelDescription) -> list[Problem]:
        found = super().check(model)
        if self.calibration and (wrong := calibrated.complaint(self.calibration, model)):
            found.append(self.problem("calibration", wrong))
        return found

    def apply(self, target: Target) -> None:
        super().apply(target)
        if self.calibration:
            calibrated.bind(self, self.calibration, target)

    def signal(self) -> TimeEmbedding:
        return TimeEmbedding()

    def policy(self, target: Target) -> Budget:
        return Budget(self.threshold, self._rescale(target))

    def _rescale(self, target: Target) -> Callable[[float], float]:
        if self.calibration:
            by_expert = calibrated.polynomials(self.calibration)
            return lambda x: horner(by_expert[target.clock.expert], x)
        coefficients = self.coefficients or (published()[self.fit] if self.fit != "none" else (1.0, 0.0))
        return lambda x: horner(coefficients, x)

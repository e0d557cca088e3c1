"""SmoothCache: error curves from exact runs say for how many steps each kind of module may be reused."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.models.adapter import ModelDescription
from vivace.techniques.base import Card, Cite, Need, Paradigm, Problem, Stage, knob
from vivace.techniques.caching.engine import even_mask
from vivace.techniques.caching.modules import CLAIMS, CROSS, FFN, KINDS, SELF, ModuleCache


@dataclass(frozen=True, kw_only=True)
class SmoothCache(ModuleCache):
    """Reuse a kind's outputs for as many steps as its calibrated relative L1 error stays below `alpha`.

    A curve holds the mean error of an output that is 1, 2, ... steps old. `ModuleErrors` measures the curves.
    """

    card: ClassVar[Card] = Card(
        name="smoothcache",
        paradigm=Paradigm.CACHING,
        summary="Reuses each kind of module for as many steps as its calibrated error curve allows.",
        objective="fewer attention and feed-forward evaluations",
        stage=Stage.CACHE,
        claims=CLAIMS,
        needs=(Need.ORDERED_BLOCKS, Need.ATTENTION_SITES),
        calibration="required",
        fidelity=0.5,
        cite=Cite(
            title="SmoothCache: A Universal Inference Acceleration Technique for Diffusion Transformers",
            arxiv="2411.10510",
            code="https://github.com/Roblox/SmoothCache",
            differs="one curve for each kind, a mean over steps and blocks, so that it serves any number of steps near "
            "the measured one; the original has a curve for every step",
        ),
    )

    alpha: float = knob(0.1, low=0.0, high=1.0, identity=0.0, monotone="flops")
    """Relative L1 error up to which an output may be reused."""
    self_errors: tuple[float, ...] = ()
    """Errors of self-attention or joint attention by age of the output in steps, from 1."""
    cross_errors: tuple[float, ...] = ()
    """The same of cross-attention; not needed where a model has none."""
    ffn_errors: tuple[float, ...] = ()
    """The same of feed-forward."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        first = cls(
            warmup=1,
            self_errors=(0.05, 0.15, 0.3),
            cross_errors=(0.05, 0.1, 0.15),
            ffn_errors=(0.05, 0.4),
        )
        return (first, first.replace(alpha=0.2))

    def curve(self, kind: str) -> tuple[float, ...]:
        """Errors of a kind by age."""
        return {SELF: self.self_errors, CROSS: self.cross_errors, FFN: self.ffn_errors}[kind]

    def longest(self, kind: str) -> int:
        """Steps for which a kind's outputs may be reused: the errors up to there are all below `alpha`."""
        return len(list(itertools.takewhile(lambda error: error < self.alpha, self.curve(kind))))

    def check(self, model: ModelDescription) -> list[Problem]:
        present = {KINDS[k] for k in model.adapter.attention.values()} | {FFN} if model.adapter else set()
        missing = [f"{kind}_errors" for kind in self.kinds if kind in present and not self.curve(kind)]
        if missing:
            message = (
                f"has no error curve for this model ({', '.join(missing)}); run the plan [ModuleErrors()] of "
                "vivace.techniques.caching.module_errors on a few prompts and give what `curves(receipt)` returns."
            )
            return [self.problem("calibration", message)]
        return []

    def mask(self, kind: str, steps: int, timesteps: tuple[float, ...] = ()) -> tuple[bool, ...]:
        return even_mask(steps, self.longest(kind) + 1, self.warmup, self.tail)

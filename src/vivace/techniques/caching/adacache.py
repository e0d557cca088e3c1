"""AdaCache: how fast the residual changes picks the distance to the next computed step; motion shortens it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, Target, exclusive, knob, reads
from vivace.techniques.caching.engine import CacheTechnique
from vivace.techniques.caching.policies import Codebook
from vivace.techniques.caching.signals import ResidualRate

BOOKS: dict[str, tuple[tuple[float, int], ...]] = {
    "slow": ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3)),
    "fast": ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.0, 1)),
}
"""The authors' books of (rate below which, distance to the next computed step): for 100 and for 30 steps."""


@dataclass(frozen=True, kw_only=True)
class AdaCache(CacheTechnique):
    """At computed steps the residual's rate of change, scaled by motion, looks up how far away the next one is.

    With r_R the stack's residual at a computed step and r_Q the one n steps before it, the rate is
    mean|r_R - r_Q| / mean|r_Q| / n times (m + dm), m = mean over frames of |r_f - r_(f-1)| / |r_f| and dm its change
    per step. Skipped steps add r_R.
    """

    card: ClassVar[Card] = Card(
        name="adacache",
        paradigm=Paradigm.CACHING,
        summary="Chooses the distance to the next computed step from how fast the residual changes, and from motion.",
        objective="fewer transformer blocks per step",
        stage=Stage.CACHE,
        claims=(exclusive("block.skip"), reads("block.output")),
        needs=(Need.ORDERED_BLOCKS,),
        fidelity=0.5,
        cite=Cite(
            title="Adaptive Caching for Faster Video Generation with Diffusion Transformers",
            arxiv="2411.02397",
            code="https://github.com/AdaCache-DiT/AdaCache",
            differs="the original caches the residual of every attention and feed-forward module and measures one of "
            "them, this one caches and measures the whole stack's; the motion score is relative to the residual's size "
            "and has no fitted scale; decides for every sample, and the conditional branch for both",
        ),
    )

    lenience: float = knob(1.0, low=0.0, high=8.0, identity=0.0)
    """Factor on the bounds of the book: larger ones skip more."""
    motion: float = knob(1.0, low=0.0, high=1.0)
    """How much of the motion score counts; 0 is the method without motion regularisation."""
    book: str = knob("fast", choices=tuple(BOOKS))
    """Which table of rates and distances."""
    max_consecutive: int = knob(11, low=0, high=50, identity=0)
    """Most skipped steps in a row."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(warmup=1), cls(lenience=0.2, motion=0.5, warmup=1, tail=0))

    def signal(self) -> ResidualRate:
        return ResidualRate(motion=self.motion)

    def policy(self, target: Target) -> Codebook:
        return Codebook(tuple((bound * self.lenience, gap) for bound, gap in BOOKS[self.book]))

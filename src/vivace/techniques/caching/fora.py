"""FORA: outputs of attention and feed-forward modules are computed every few steps and reused in between."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, knob
from vivace.techniques.caching.engine import even_mask
from vivace.techniques.caching.modules import CLAIMS, ModuleCache


@dataclass(frozen=True, kw_only=True)
class Fora(ModuleCache):
    """Compute the modules at every `interval`-th step; at the others their last outputs stand in for them.

    Gates and shifts, which depend on the timestep, are always those of the current step.
    """

    card: ClassVar[Card] = Card(
        name="fora",
        paradigm=Paradigm.CACHING,
        summary="Reuses the outputs of attention and feed-forward for some steps, then computes them again.",
        objective="fewer attention and feed-forward evaluations",
        stage=Stage.CACHE,
        claims=CLAIMS,
        needs=(Need.ORDERED_BLOCKS, Need.ATTENTION_SITES),
        fidelity=0.5,
        cite=Cite(
            title="FORA: Fast-Forward Caching in Diffusion Transformer Acceleration",
            arxiv="2407.01425",
            code="https://github.com/prathebaselva/FORA",
            differs="steps at the start and at the end can be kept exact; the original counts from the first step",
        ),
    )

    interval: int = knob(3, low=1, high=8, identity=1, monotone="flops")
    """Steps from one computation to the next."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(warmup=1),)

    def mask(self, kind: str, steps: int, timesteps: tuple[float, ...] = ()) -> tuple[bool, ...]:
        return even_mask(steps, self.interval, self.warmup, self.tail)

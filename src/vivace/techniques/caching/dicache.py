"""DiCache: the first block is a probe that decides when to skip, and how two stored residuals are blended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, Target, exclusive, knob, reads
from vivace.techniques.caching.engine import CacheTechnique
from vivace.techniques.caching.policies import Budget
from vivace.techniques.caching.predictors import Lagrange
from vivace.techniques.caching.signals import Moment, Probe

BOUNDS = (1.0, 1.5)
"""Range of the blending ratio."""


@dataclass(frozen=True, kw_only=True)
class DiCache(CacheTechnique):
    """Skip the blocks after the probe while the changes of its output, step to step, add up to less than `threshold`.

    With p the residual of the probe (the first blocks) and s the one of the rest of the stack, at the last computed
    step R and the one before it, Q: a skipped step adds s_Q + g (s_R - s_Q), where
    g = mean|p_t - p_Q| / mean|p_R - p_Q|, kept from 1 to 1.5.
    """

    card: ClassVar[Card] = Card(
        name="dicache",
        paradigm=Paradigm.CACHING,
        summary="Skips the stack after a shallow probe that measures the change and how to extrapolate two residuals.",
        objective="fewer transformer blocks per step",
        stage=Stage.CACHE,
        claims=(exclusive("block.skip"), reads("block.output")),
        needs=(Need.ORDERED_BLOCKS,),
        fidelity=0.5,
        cite=Cite(
            title="DiCache: Let Diffusion Model Determine Its Own Cache",
            arxiv="2508.17356",
            code="https://github.com/Bujiazi/DiCache",
            differs="keeps the probe's output of the skipped step and blends the residuals of the other blocks only, "
            "where the original blends those of the whole stack; decides for every sample; each guidance branch "
            "measures its own ratio and follows the conditional one's decision",
        ),
    )

    threshold: float = knob(0.1, low=0.0, high=1.0, identity=0.0)
    """Sum of the probe's relative changes up to which steps are skipped."""
    probe_blocks: int = knob(1, low=1, high=8)
    """Blocks of the probe; they always run."""
    retention: float = knob(0.2, low=0.0, high=1.0, identity=1.0)
    """Share of the steps, at the start, that are computed in full, and one more."""
    warmup: int = knob(1, low=0, high=50)
    """Steps at the start that are computed in full, whatever `retention` is."""
    max_consecutive: int = knob(50, low=0, high=50, identity=0)
    """Most skipped steps in a row."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        # With random weights neighbouring steps differ more than a trained model's do.
        return (cls(threshold=1.0, max_consecutive=2), cls(threshold=0.5))

    @property
    def front(self) -> int:
        return self.probe_blocks

    def head_steps(self, steps: int) -> int:
        return max(self.warmup, int(self.retention * steps) + 1)

    def signal(self) -> Probe:
        return Probe()

    def policy(self, target: Target) -> Budget:
        return Budget(self.threshold)

    def predictor(self) -> Lagrange:
        return Lagrange(1)

    def weights(self, row: Any, moment: Moment, index: int, at: float, gain: float) -> Iterable[Any]:
        import torch

        probes = row.marks.get("probes", ())
        if len(probes) < 2 or len(row.history) < 2:
            return (1.0,)
        now = moment.hidden[index] - moment.entry[index]
        ahead = (now - probes[1]).abs().mean(dtype=torch.float32)
        span = (probes[0] - probes[1]).abs().mean(dtype=torch.float32)
        # A probe that did not move at all says nothing: reuse.
        ratio = torch.where(span > 0, ahead / span, torch.ones_like(span)).clamp(*BOUNDS)
        return ratio, 1.0 - ratio

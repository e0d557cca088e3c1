"""EasyCache: skip the whole network while its predicted change, input change times a measured rate, stays small."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.techniques.base import Card, Cite, Paradigm, Stage, Target, exclusive, knob, reads
from vivace.techniques.caching.engine import NETWORK, CacheTechnique
from vivace.techniques.caching.policies import Budget
from vivace.techniques.caching.signals import TransformationRate


@dataclass(frozen=True, kw_only=True)
class EasyCache(CacheTechnique):
    """Skip the network while sum k mean|x_t - x_(t-1)| / mean|v_R| < threshold; its output is then x_t + (v_R - x_R).

    x are the latents, v the network's output, R the last computed step and Q the one before it. The rate
    k = mean|v_R - v_Q| / mean|x_R - x_Q| is renewed at every computed step.
    """

    card: ClassVar[Card] = Card(
        name="easycache",
        paradigm=Paradigm.CACHING,
        summary="Skips network evaluations while the measured rate of change predicts a small change of the output.",
        objective="fewer network evaluations",
        stage=Stage.CACHE,
        claims=(exclusive("block.skip"), exclusive("step.skip"), reads("block.output")),
        fidelity=0.5,
        cite=Cite(
            title="Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching",
            arxiv="2507.02860",
            code="https://github.com/H-EmbodVis/EasyCache",
            differs="decides for every sample, the original once for the whole batch; the rate is taken between the "
            "last two computed steps; the number of skips in a row has a cap",
        ),
    )
    span: ClassVar[str] = NETWORK

    threshold: float = knob(0.05, low=0.0, high=1.0, identity=0.0)
    """Sum of predicted relative changes up to which steps are skipped."""
    warmup: int = knob(10, low=0, high=50)
    """Steps at the start that are computed in full."""
    max_consecutive: int = knob(50, low=0, high=50, identity=0)
    """Most skipped steps in a row."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        # With random weights the output changes faster than a trained model's does.
        return (cls(threshold=1.0, warmup=2), cls(threshold=0.5, warmup=1))

    def signal(self) -> TransformationRate:
        return TransformationRate()

    def policy(self, target: Target) -> Budget:
        return Budget(self.threshold)

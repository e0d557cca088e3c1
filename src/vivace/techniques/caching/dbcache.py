"""DBCache: the first blocks are the probe, the last blocks mend, and the blocks between are skipped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, Target, exclusive, knob, reads
from vivace.techniques.caching.engine import CacheTechnique
from vivace.techniques.caching.policies import Threshold
from vivace.techniques.caching.signals import FrontResidual


@dataclass(frozen=True, kw_only=True)
class DualBlockCache(CacheTechnique):
    """Run the first n blocks and the last m; where the first ones' residual hardly moved, reuse that of the middle.

    With r_t what the first n blocks add and R the step last computed in full, the middle is skipped when
    mean|r_t - r_R| < threshold * mean|r_R|. Its stored residual is added, and the last m blocks run on the sum.
    """

    card: ClassVar[Card] = Card(
        name="dbcache",
        paradigm=Paradigm.CACHING,
        summary="Skips the middle of the block stack when what the first blocks add hardly changed.",
        objective="fewer transformer blocks per step",
        stage=Stage.CACHE,
        claims=(exclusive("block.skip"), reads("block.output")),
        needs=(Need.ORDERED_BLOCKS,),
        fidelity=0.5,
        cite=Cite(
            title="DBCache: Dual Block Cache (cache-dit)",
            code="https://github.com/vipshop/cache-dit",
            differs="decides for every sample, the original once for the whole batch; the conditional branch decides "
            "for both guidance branches; steps at the end can be kept exact",
        ),
    )

    threshold: float = knob(0.08, low=0.0, high=1.0, identity=0.0, monotone="blocks_run")
    """Relative mean absolute change of the first blocks' residual below which the middle is skipped."""
    first_blocks: int = knob(8, low=1, high=64)
    """Blocks at the start that always run and are watched (Fn)."""
    last_blocks: int = knob(0, low=0, high=64)
    """Blocks at the end that always run (Bn)."""
    warmup: int = knob(8, low=0, high=50)
    """Steps at the start that are computed in full."""
    tail: int = knob(0, low=0, high=50)
    """Steps at the end that are computed in full."""
    max_consecutive: int = knob(50, low=0, high=50, identity=0)
    """Most skipped steps in a row."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (
            cls(threshold=1.0, first_blocks=1, last_blocks=1, warmup=1, max_consecutive=2),
            cls(threshold=1.0, first_blocks=2, warmup=2),
        )

    @property
    def front(self) -> int:
        return self.first_blocks

    @property
    def back(self) -> int:
        return self.last_blocks

    def signal(self) -> FrontResidual:
        return FrontResidual()

    def policy(self, target: Target) -> Threshold:
        return Threshold(self.threshold)

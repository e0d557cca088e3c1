"""First-block cache: skip the rest of the stack when the first block's residual barely moved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, Target, exclusive, knob, reads
from vivace.techniques.caching.engine import CacheTechnique
from vivace.techniques.caching.policies import Threshold
from vivace.techniques.caching.signals import FrontResidual


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache(CacheTechnique):
    """Run block 0; where its residual is close to the last computed one, add the stored residual of the others.

    With r_t = block_0(h_t) - h_t and R the step last computed in full, a sample is skipped when
    mean|r_t - r_R| < threshold * mean|r_R|; its output is then block_0(h_t) + (stack_R - block_0(h_R)).
    """

    card: ClassVar[Card] = Card(
        name="first_block_cache",
        paradigm=Paradigm.CACHING,
        summary="Skips all blocks but the first on steps where the first block's output change is small.",
        objective="fewer transformer blocks per step",
        stage=Stage.CACHE,
        claims=(exclusive("block.skip"), reads("block.output")),
        needs=(Need.ORDERED_BLOCKS,),
        calibration="optional",
        fidelity=0.25,
        cite=Cite(
            title="First Block Cache (ParaAttention), after TeaCache",
            arxiv="2411.19108",
            code="https://github.com/chengzeyi/ParaAttention",
            differs="decides for every sample, the original once for the whole batch; the conditional branch decides "
            "for both guidance branches; steps at the end can be kept exact, and the number of skips in a row has a "
            "cap",
        ),
    )

    threshold: float = knob(0.08, low=0.0, high=1.0, identity=0.0, monotone="blocks_run")
    """Relative mean absolute change of the first block's residual below which the other blocks are skipped."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        # With random weights neighbouring steps differ more than a trained model's do.
        return (cls(threshold=1.0, warmup=1), cls())

    @property
    def front(self) -> int:
        return 1

    def signal(self) -> FrontResidual:
        return FrontResidual()

    def policy(self, target: Target) -> Threshold:
        return Threshold(self.threshold)

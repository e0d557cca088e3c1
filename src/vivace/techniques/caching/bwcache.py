"""BWCache: measure the change of every block between steps; once all are calm, reuse the stack for a run of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.context import COND, Clock
from vivace.models.adapter import BlockCall, Expert
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, Target, exclusive, knob, reads
from vivace.techniques.caching.engine import Cache, CacheTechnique
from vivace.techniques.caching.memory import Ballot, Memory, Stored
from vivace.techniques.caching.policies import Policy
from vivace.techniques.caching.signals import Moment, Signal, relative_change

if TYPE_CHECKING:
    import torch

    Streams = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, kw_only=True)
class BWCache(CacheTechnique):
    """Reuse the stack's output for a run of steps when the blocks' outputs change little from step to step.

    At every computed step b_i is mean|h_i,t - h_i,s| / mean|h_i,s| for the output h_i of block i, with s the computed
    step before. Where the mean of b_i over the blocks is below the threshold, the next `run_share` of all steps (at
    least one) reuse the output; then a step is computed and all is measured again. Every block's last output is
    remembered, for the conditional branch: as many tensors as the model has blocks.
    """

    card: ClassVar[Card] = Card(
        name="bwcache",
        paradigm=Paradigm.CACHING,
        summary="Reuses the block stack's output for a run of steps once all blocks change little between steps.",
        objective="fewer transformer blocks per step",
        stage=Stage.CACHE,
        claims=(exclusive("block.skip"), reads("block.output")),
        needs=(Need.ORDERED_BLOCKS,),
        fidelity=0.25,
        cite=Cite(
            title="BWCache: Accelerating Video Diffusion Transformers through Block-Wise Caching",
            arxiv="2509.13789",
            code="https://github.com/hsc113/BWCache",
            differs="decides for every sample, and the conditional branch decides for both; of the blocks' outputs "
            "only the last is reused (what blocks before it give has no effect while all are reused), the others are "
            "kept to be compared with; a cap on the steps reused in a row",
        ),
    )

    threshold: float = knob(0.15, low=0.0, high=1.0, identity=0.0)
    """Mean over the blocks of the relative change of their outputs below which a run of reuse begins."""
    run_share: float = knob(0.1, low=0.0, high=0.5)
    """Length of a run of reuse, as a share of all steps."""
    max_consecutive: int = knob(50, low=0, high=50, identity=0)
    """Most skipped steps in a row."""

    feature: ClassVar[str] = "output"

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        # With random weights neighbouring steps differ more than a trained model's do.
        return (cls(threshold=1.0, run_share=0.2, tail=0), cls())

    def signal(self) -> BlockChange:
        return BlockChange()

    def policy(self, target: Target) -> Runs:
        return Runs(self.threshold, self.run_share)

    def cache(self, target: Target, expert: Expert) -> Cache:
        return BlockwiseCache(self, target, expert)


@dataclass(frozen=True, slots=True)
class Runs(Policy):
    """Reuse for a run of steps when the last computed step changed by less than `bound`, then compute one."""

    online: ClassVar[bool] = True
    bound: float
    share: float

    def reuse(self, ballot: Ballot, value: float, clock: Clock) -> bool:
        length = max(1, round(self.share * clock.num_steps))
        return value < self.bound and ballot.skips < length


@dataclass(frozen=True, slots=True)
class BlockChange(Signal):
    """Mean over the blocks of the change between the last two computed steps; infinite before there are two."""

    def measure(self, memory: Memory, moment: Moment, row: int) -> torch.Tensor:
        import torch

        change = memory.row(moment.who[row]).marks.get("change")
        return torch.full((), float("inf"), device=moment.hidden.device) if change is None else change

    def after(self, memory: Memory, moment: Moment, row: int, out: Any, computed: bool) -> None:
        """The mean of what `BlockwiseCache` noted at this step."""
        import torch

        marks = memory.row(moment.who[row]).marks
        marks["block"] = 0
        if noted := marks.pop("noted", None):
            marks["change"] = torch.stack(noted).mean()


class BlockwiseCache(Cache):
    """The engine, with every block's output compared to the one before."""

    def span_block(self, *, first: bool, last: bool) -> Callable[..., Streams]:
        handler = super().span_block(first=first, last=last)

        def noting(call: BlockCall, run: Callable[[BlockCall], Streams]) -> Streams:
            def seen(inner: BlockCall) -> Streams:
                hidden, text = run(inner)
                self._note(self.memory, hidden)
                return hidden, text

            return handler(call, seen)

        return noting

    def _note(self, memory: Memory, hidden: torch.Tensor) -> None:
        """Compare a block's output (rows that run, S, C) with the same block's at the computed step before."""
        t, now = self.technique, memory.now
        for place, i in enumerate(now.run):
            if now.moment.who[i][0] != COND:
                continue
            marks = memory.row(now.moment.who[i]).marks
            outputs: list[Stored] = marks.setdefault("outputs", [])
            block = marks.get("block", 0)
            value = hidden[place]
            if block < len(outputs):
                marks.setdefault("noted", []).append(relative_change(value, outputs[block].get()))
            # A view would keep the rows of the whole batch in memory.
            value = value.clone() if hidden.shape[0] > 1 else value
            before = outputs[block] if block < len(outputs) else None
            kept = memory.keep(value, t.storage, t.offload, before)
            outputs[block : block + 1] = [kept]
            marks["block"] = block + 1

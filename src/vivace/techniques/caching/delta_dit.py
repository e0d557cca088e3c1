"""Delta-DiT: skip what the back blocks add in early steps, and what the front blocks add in late ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.context import Clock
from vivace.models.adapter import Block, Expert, ModelDescription
from vivace.techniques.base import Card, Cite, Need, Paradigm, Problem, Stage, Target, exclusive, knob
from vivace.techniques.caching.engine import Cache, CacheTechnique, even_mask
from vivace.techniques.caching.memory import Ballot
from vivace.techniques.caching.policies import Policy

if TYPE_CHECKING:
    from vivace.techniques.caching.engine import Pass
    from vivace.techniques.caching.memory import Value


@dataclass(frozen=True, kw_only=True)
class DeltaDiT(CacheTechnique):
    """Every `interval`-th step is computed in full; between them a group of blocks adds what it added there.

    With n blocks in the group and d(x) = group(x) - x stored at the last full step, a group that is skipped gives
    x + d. Up to the share `switch` of the steps (when outlines form) the group is the last n blocks, afterwards (when
    details form) the first n.
    """

    card: ClassVar[Card] = Card(
        name="delta_dit",
        paradigm=Paradigm.CACHING,
        summary="Skips the back blocks in early steps and the front blocks in late ones, adding their last residual.",
        objective="fewer transformer blocks per step",
        stage=Stage.CACHE,
        claims=(exclusive("block.skip"),),
        needs=(Need.ORDERED_BLOCKS,),
        fidelity=0.5,
        cite=Cite(
            title="Delta-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers",
            arxiv="2406.01125",
            differs="the group is a share of the blocks, not a number tuned for one model: three quarters at interval "
            "2 is what gives the paper's 1.6 times; the first and last steps can be kept whole",
        ),
    )

    blocks: float = knob(0.75, low=0.0, high=1.0, identity=0.0, monotone="blocks_run")
    """Share of the blocks that is skipped, rounded to whole blocks."""
    interval: int = knob(2, low=1, high=20, identity=1, monotone="blocks_run")
    """Steps from one full step to the next."""
    switch: float = knob(0.5, low=0.0, high=1.0)
    """Share of the steps during which the back blocks are skipped."""
    warmup: int = knob(1, low=0, high=50)
    """Steps at the start that are computed in full."""
    tail: int = knob(0, low=0, high=50)
    """Steps at the end that are computed in full."""
    max_consecutive: int = knob(19, low=0, high=50, identity=0)
    """Most skipped steps in a row; below interval - 1 it shortens the interval."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(), cls(interval=3, blocks=0.5))

    def count(self, depth: int) -> int:
        """Blocks of the group in a stack of `depth`."""
        return round(self.blocks * depth)

    def work_share(self, model: ModelDescription) -> float:
        return self.count(model.depth) / model.depth

    def check(self, model: ModelDescription) -> list[Problem]:
        found = super().check(model)
        if model.depth and self.blocks > 0.0 and not self.count(model.depth):
            found.append(
                self.problem(
                    "no_effect",
                    f"{self.blocks:g} of {model.depth} blocks is less than half a block, so none would be skipped; "
                    f"one block is {1 / model.depth:.2g}.",
                )
            )
        return found

    def mask(self, model: ModelDescription, steps: int) -> tuple[bool, ...]:
        return self.full_steps(steps)

    def full_steps(self, steps: int) -> tuple[bool, ...]:
        """True where all blocks run."""
        every = min(self.interval, self.max_consecutive + 1)
        return even_mask(steps, every, self.head_steps(steps), self.tail_steps(steps))

    def early(self, clock: Clock) -> bool:
        """Whether outlines are forming: the back blocks are skipped."""
        return clock.step < self.switch * clock.num_steps

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            count = self.count(len(expert.blocks))
            if count:
                for early, group in ((False, expert.blocks[:count]), (True, expert.blocks[-count:])):
                    self._around(target, expert, group, early)

    def _around(self, target: Target, expert: Expert, group: list[Block], early: bool) -> None:
        cache = GroupCache(self, target, expert, early)
        for block in group:
            target.around_block(block, cache.span_block(first=block is group[0], last=block is group[-1]))


@dataclass(frozen=True, slots=True)
class StageMask(Policy):
    """Reuse between full steps, in one of the two stages."""

    technique: DeltaDiT
    early: bool

    def reuse(self, ballot: Ballot, value: float, clock: Clock) -> bool:
        full = self.technique.full_steps(clock.num_steps)[clock.step]
        return not full and self.technique.early(clock) is self.early


class GroupCache(Cache):
    """The engine on one group of blocks, in one stage."""

    def __init__(self, technique: DeltaDiT, target: Target, expert: Expert, early: bool) -> None:
        super().__init__(technique, target, expert, "back" if early else "front")
        self.delta, self.early = technique, early
        self.policy = StageMask(technique, early)

    def remember(self, now: Pass, row: int, value: Value, whole: Any) -> None:
        """Only residuals of steps in which all blocks ran, and only while the group's stage may come."""
        clock = self.clock
        over = self.early and not self.delta.early(clock)
        full = self.delta.full_steps(clock.num_steps)[clock.step]
        first = not len(self.memory.row(now.moment.who[row]).history)
        if not over and (full or first):
            super().remember(now, row, value, whole)

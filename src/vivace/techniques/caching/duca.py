"""DuCa: reused steps take turns between reusing everything and computing a few random tokens anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.context import Clock
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, Target, knob
from vivace.techniques.caching.memory import Memory
from vivace.techniques.caching.modules import CLAIMS, Seat, Turn
from vivace.techniques.caching.tokens import TokenCache

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class DuCa(TokenCache):
    """After a full step: aggressive (everything is reused), conservative (random tokens are refreshed), and so on.

    The tokens come from a generator seeded by step and block, so they are the same for every sample and every run.
    """

    card: ClassVar[Card] = Card(
        name="duca",
        paradigm=Paradigm.CACHING,
        summary="Reuses attention and feed-forward outputs, and refreshes random tokens at every second reused step.",
        objective="fewer attention evaluations, fewer tokens in the feed-forward",
        stage=Stage.CACHE,
        claims=CLAIMS,
        needs=(Need.ORDERED_BLOCKS, Need.ATTENTION_SITES),
        fidelity=0.5,
        cite=Cite(
            title="Accelerating Diffusion Transformers with Dual Feature Caching",
            arxiv="2412.18911",
            code="https://github.com/Shenyi-Z/DuCa",
            differs="tokens are refreshed in the feed-forward only; conservative steps reuse attention as well",
        ),
    )

    interval: int = knob(4, low=1, high=8, identity=1)
    """Steps from one full computation to the next."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(warmup=1, interval=3, fraction=0.3),)

    def refreshes(self, clock: Clock) -> bool:
        return self.fraction > 0.0 and self.since(clock) % 2 == 0

    def choose(self, target: Target, seat: Seat, turn: Turn, memory: Memory, count: int) -> torch.Tensor:
        import torch

        tokens = seat.given.shape[1]
        generator = torch.Generator().manual_seed(target.clock.step * 65_537 + seat.block)
        chosen = torch.randperm(tokens, generator=generator)[:count]
        return chosen.to(seat.given.device).expand(len(turn.who), -1)

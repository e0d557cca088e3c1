"""ToCa: on reused steps the tokens that matter most and have waited longest are computed anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, Target, knob
from vivace.techniques.caching.memory import Memory
from vivace.techniques.caching.modules import CLAIMS, Seat, Turn
from vivace.techniques.caching.tokens import TokenCache, TokenSeat, in_space

if TYPE_CHECKING:
    import torch

AGE, SPREAD = 0.25, 0.4
"""Weights of a token's age in steps and of being the best of its neighbourhood, beside a mean influence of one."""


@dataclass(frozen=True, kw_only=True)
class ToCa(TokenCache):
    """Score = ||f_i|| / mean_j ||f_j|| + 0.25 age_i + 0.4 (best of its 2 x 2 neighbourhood), f the cached outputs.

    The `fraction` of tokens with the highest scores goes through the feed-forward; their age starts again at zero.
    """

    card: ClassVar[Card] = Card(
        name="toca",
        paradigm=Paradigm.CACHING,
        summary="Reuses attention and feed-forward outputs, but computes the tokens with the highest scores anew.",
        objective="fewer attention evaluations, fewer tokens in the feed-forward",
        stage=Stage.CACHE,
        claims=CLAIMS,
        needs=(Need.ORDERED_BLOCKS, Need.ATTENTION_SITES),
        fidelity=0.5,
        cite=Cite(
            title="Accelerating Diffusion Transformers with Token-wise Feature Caching",
            arxiv="2410.05317",
            code="https://github.com/Shenyi-Z/ToCa",
            differs="a token's influence is the norm of its cached feed-forward output, not its column of the "
            "attention map, which fused kernels do not give; tokens are refreshed in the feed-forward only; the "
            "fraction is the same for all layers and steps",
        ),
    )

    interval: int = knob(3, low=1, high=8, identity=1, monotone="flops")
    """Steps from one full computation to the next."""
    fraction: float = knob(0.1, low=0.0, high=1.0, identity=1.0)
    """Share of the tokens that is refreshed; with all of them every step is a full one."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(warmup=1, fraction=0.3),)

    def mask(self, kind: str, steps: int, timesteps: tuple[float, ...] = ()) -> tuple[bool, ...]:
        return (True,) * steps if self.fraction == 1.0 else super().mask(kind, steps, timesteps)

    def choose(self, target: Target, seat: Seat, turn: Turn, memory: Memory, count: int) -> torch.Tensor:
        import torch

        grid = target.clock.evaluation.grid if target.clock.evaluation is not None else None
        influence = seat.given.float().norm(dim=2)
        influence = influence / influence.mean(dim=1, keepdim=True).clamp_min(1e-12)
        scores = influence + AGE * torch.stack(self._ages(turn, memory, seat.given))
        return in_space(scores, grid, SPREAD).topk(count, dim=1).indices

    def _ages(self, turn: Turn, memory: Memory, given: torch.Tensor) -> list[torch.Tensor]:
        """Steps since each token was computed, (S,) for every row."""
        import torch

        rows = [memory.row(name).marks for name in turn.who]
        zeros = torch.zeros(given.shape[1], device=given.device)
        return [row.get("age", zeros) + 1.0 for row in rows]

    def after(self, target: Target, seat: Seat, turn: Turn, memory: Memory) -> None:
        if isinstance(seat, TokenSeat) and seat.index is not None:
            for i, age in enumerate(self._ages(turn, memory, seat.given)):
                memory.row(turn.who[i]).marks["age"] = age.index_fill(0, seat.index[i], 0.0)
        super().after(target, seat, turn, memory)

    def computed(self, target: Target, seat: Seat, turn: Turn, memory: Memory) -> None:
        for name in turn.who:
            memory.row(name).marks.pop("age", None)

"""Caches that refresh some tokens: on reused steps the feed-forward runs for a few tokens and the others reuse.

A feed-forward works token by token, so part of the tokens can be computed alone, exactly. Attention outputs are reused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.core.context import Clock
from vivace.core.shapes import TokenGrid
from vivace.models.adapter import AttentionSite, FeedForwardSite
from vivace.techniques.base import Target, knob
from vivace.techniques.caching.engine import even_mask
from vivace.techniques.caching.memory import Memory
from vivace.techniques.caching.modules import FFN, ModuleCache, Seat, Turn, remember

if TYPE_CHECKING:
    import torch


class TokenSeat(Seat):
    """A feed-forward of which some tokens are computed anew: `index` (B, k) int64, or None to reuse all."""

    def __init__(self, site: AttentionSite | FeedForwardSite) -> None:
        super().__init__(site)
        self.index: torch.Tensor | None = None

    def call(self, old: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.reuse or self.index is None:
            return super().call(old, args, kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        given = self.given
        fresh = old(x.gather(1, self.index[:, :, None].expand(-1, -1, x.shape[2])))
        out = given.scatter(1, self.index[:, :, None].expand(-1, -1, given.shape[2]), fresh)
        self.kept = out
        return out

    def clear(self) -> None:
        super().clear()
        self.index = None


@dataclass(frozen=True, kw_only=True)
class TokenCache(ModuleCache):
    """Base: a subclass says which tokens are refreshed."""

    abstract: ClassVar[bool] = True

    interval: int = knob(3, low=1, high=8, identity=1)
    """Steps from one full computation to the next."""
    fraction: float = knob(0.1, low=0.0, high=1.0)
    """Share of the tokens that is refreshed."""

    def choose(self, target: Target, seat: Seat, turn: Turn, memory: Memory, count: int) -> torch.Tensor:
        """Which `count` tokens are refreshed: (B, count) int64, each at most once."""
        raise TypeError(f"{type(self).__name__} does not say which tokens it refreshes")

    def refreshes(self, clock: Clock) -> bool:
        """Whether this reused step refreshes any tokens."""
        return self.fraction > 0.0

    def mask(self, kind: str, steps: int, timesteps: tuple[float, ...] = ()) -> tuple[bool, ...]:
        return even_mask(steps, self.interval, self.warmup, self.tail)

    def since(self, clock: Clock) -> int:
        """Steps since the last full computation."""
        mask, step = self.mask(FFN, clock.num_steps), clock.step
        while step > 0 and not mask[step]:
            step -= 1
        return clock.step - step

    def shade(self, clock: Clock) -> tuple[str, ...]:
        return ("refreshed",) if self.refreshes(clock) else ()

    def seat(self, site: AttentionSite | FeedForwardSite) -> Seat:
        return TokenSeat(site) if isinstance(site, FeedForwardSite) else Seat(site)

    def prepare(self, target: Target, seat: Seat, turn: Turn, memory: Memory) -> None:
        if not isinstance(seat, TokenSeat) or not self.refreshes(target.clock):
            return
        tokens = seat.given.shape[1]
        count = min(tokens, max(1, round(self.fraction * tokens)))
        seat.index = self.choose(target, seat, turn, memory, count)
        target.report(self.card.name, "tokens_refreshed", count * len(turn.who))

    def after(self, target: Target, seat: Seat, turn: Turn, memory: Memory) -> None:
        if seat.kept is not None:
            remember(self, memory, target.clock, turn.who, seat.kept)


def in_space(scores: torch.Tensor, grid: TokenGrid | None, bonus: float) -> torch.Tensor:
    """Scores (B, S) with a bonus for the best token of every 2 x 2 neighbourhood of a frame.

    Sequences that are neither the grid's video tokens nor those with the text beside them stay as they are.
    """
    import torch
    from torch.nn import functional

    if grid is None or scores.shape[1] not in (grid.video, grid.tokens):
        return scores
    start = grid.text if grid.text_first and scores.shape[1] == grid.tokens else 0
    video = scores[:, start : start + grid.video].unflatten(1, (grid.frames, grid.height, grid.width))
    best = functional.max_pool2d(video, 2, ceil_mode=True)
    best = best.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[:, :, : grid.height, : grid.width]
    video = (video + bonus * (video >= best)).flatten(1)
    return torch.cat([scores[:, :start], video, scores[:, start + grid.video :]], dim=1)

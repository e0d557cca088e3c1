"""Pyramid attention broadcast: attention outputs are reused in the middle of the trajectory, each kind for its time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.models.adapter import ModelDescription
from vivace.techniques.base import Card, Cite, Need, Paradigm, Problem, Stage, knob
from vivace.techniques.caching.modules import CLAIMS, CROSS, SELF, ModuleCache


@dataclass(frozen=True, kw_only=True)
class PyramidAttentionBroadcast(ModuleCache):
    """Reuse self-attention (and joint attention) for `self_interval - 1` steps, cross-attention for longer.

    A step may reuse where its timestep t lies in low < t < high, and its kind was computed less than its interval of
    steps ago. Feed-forward always runs.
    """

    card: ClassVar[Card] = Card(
        name="pyramid_attention_broadcast",
        paradigm=Paradigm.CACHING,
        summary="Reuses attention outputs in the middle of the trajectory, those of cross-attention longest.",
        objective="fewer attention evaluations",
        stage=Stage.CACHE,
        claims=CLAIMS,
        needs=(Need.ORDERED_BLOCKS, Need.ATTENTION_SITES),
        fidelity=0.5,
        cite=Cite(
            title="Real-Time Video Generation with Pyramid Attention Broadcast",
            arxiv="2408.12588",
            code="https://github.com/NUS-HPC-AI-Lab/VideoSys",
            differs="models with attention over space and time together have no temporal kind; joint attention counts "
            "as self-attention; a kind's interval runs from its last computed step, whether that lay in the window "
            "or before it",
        ),
    )
    kinds: ClassVar[tuple[str, ...]] = (SELF, CROSS)
    surely: ClassVar[bool] = False

    warmup: int = knob(1, low=0, high=50)
    """Steps at the start that are computed in full, whatever their timesteps."""
    tail: int = knob(0, low=0, high=50)
    """Steps at the end that are computed in full, whatever their timesteps."""
    self_interval: int = knob(2, low=1, high=8)
    """Steps from one computation of self-attention or joint attention to the next."""
    cross_interval: int = knob(6, low=1, high=16)
    """Steps from one computation of cross-attention to the next."""
    low: float = knob(100.0, low=0.0, high=1000.0)
    """Timestep (0 to 1000) above which outputs are reused."""
    high: float = knob(850.0, low=0.0, high=1000.0)
    """Timestep below which outputs are reused."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        # Few steps have few timesteps in the paper's window.
        return (cls(low=0.0, high=1000.0, cross_interval=3), cls(low=0.0, high=1000.0))

    @property
    def is_identity(self) -> bool:
        """Both kinds are always computed."""
        return self.self_interval == 1 and self.cross_interval == 1

    def check(self, model: ModelDescription) -> list[Problem]:
        if self.low < self.high:
            return []
        message = f"low={self.low:g} is not below high={self.high:g}, so no step may reuse."
        return [self.problem("empty", message, "warning")]

    def mask(self, kind: str, steps: int, timesteps: tuple[float, ...] = ()) -> tuple[bool, ...]:
        every = {SELF: self.self_interval, CROSS: self.cross_interval}[kind]
        mask, last = [], 0
        for step in range(steps):
            inside = not timesteps or self.low < timesteps[step] < self.high
            free = inside and max(1, self.warmup) <= step < steps - self.tail
            computed = not free or step - last >= every
            last = step if computed else last
            mask.append(computed)
        return tuple(mask)

"""Shapes: the token grid a transformer works on, and the workload a user asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vivace.core.errors import ShapeError


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """Video tokens as (frames, height, width), flattened in that order, and the text tokens beside them.

    `text` counts text tokens that sit in the *same* attention as the video (joint attention); `text_first` says
    whether they stand before the video tokens there. Cross-attention text is not part of the grid.
    """

    frames: int
    height: int
    width: int
    text: int = 0
    text_first: bool = False

    @property
    def video(self) -> int:
        """Number of video tokens."""
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        """Sequence length of self- or joint attention."""
        return self.video + self.text

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}" + (f"+{self.text} text" if self.text else "")


@dataclass(frozen=True, slots=True)
class Workload:
    """What is to be made: pixels, steps, guidance.  `text` is the length of the text sequence."""

    frames: int
    height: int
    width: int
    steps: int = 50
    guidance: float = 5.0
    batch: int = 1
    text: int = 512

    @property
    def branches(self) -> int:
        """Network evaluations per step."""
        return 2 if self.guidance > 1.0 else 1

    def with_(self, **changes: Any) -> Workload:
        """A copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class PixelRules:
    """Which clips a pipeline can make: frames = k * temporal + 1, height and width multiples of `spatial`."""

    temporal: int
    spatial: int

    def check(self, frames: int, height: int, width: int) -> None:
        """Raises:
        ShapeError: a value is not valid; the sentence gives the nearest valid ones.
        """
        wrong = []
        if frames < 1 or (frames - 1) % self.temporal:
            wrong.append(f"frames must be {self.temporal}k+1 (nearest to {frames}: {self._frames(frames)})")
        for name, value in (("height", height), ("width", width)):
            if value < self.spatial or value % self.spatial:
                wrong.append(
                    f"{name} must be a multiple of {self.spatial} (nearest to {value}: {self._side(value)})"
                )
        if wrong:
            raise ShapeError(f"{frames} frames of {width}x{height} cannot be made: {'; '.join(wrong)}.")

    def _frames(self, frames: int) -> str:
        below = max(0, frames - 1) // self.temporal * self.temporal + 1
        return _pair(below, below + self.temporal, frames)

    def _side(self, value: int) -> str:
        below = value // self.spatial * self.spatial
        return str(self.spatial) if below < self.spatial else _pair(below, below + self.spatial, value)


def _pair(below: int, above: int, value: int) -> str:
    return f"{below} or {above}" if value >= 1 else str(below)

"""Frozen and duplicate frames: the marks of a cache that went on too long, or of a model that stopped moving."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from vivace.evaluation.metrics.base import Better, Context, Group, MetricCard, SampleMetric, Scope, Series

if TYPE_CHECKING:
    import torch

STILL = 1e-3
"""Mean absolute difference, of full scale, below which a frame counts as frozen: a quarter of a level."""


class Frozen(SampleMetric):
    """Shares of frames that repeat the one before."""

    card: ClassVar[MetricCard] = MetricCard(
        name="frozen",
        version=1,
        title="Frozen frames",
        scope=Scope.SAMPLE,
        group=Group.ABSOLUTE,
        series=(
            Series(
                name="frozen",
                better=Better.LOWER,
                low=0.0,
                high=1.0,
                about="Share of the frames after the first that hardly differ from the one before.",
            ),
            Series(
                name="duplicates",
                better=Better.LOWER,
                low=0.0,
                high=1.0,
                about="Share of the frames after the first that equal the one before in every 8-bit level.",
            ),
        ),
        convention=f"frozen: mean absolute RGB difference to the frame before below {STILL:g} of full scale. "
        "duplicates: equal after rounding to 8 bits. A prompt that asks for a still scene is right to "
        "have both; compare with the exact run.",
        sees=(
            "freeze",
            "stutter",
        ),
        blind_to=(
            "flicker",
            "blur",
            "noise",
            "shuffle",
            "reverse",
            "colour_shift",
            "colour_drift",
            "wrong_motion",
            "wrong_clip",
            "wrong_colour",
            "warp_jitter",
        ),
    )

    def sample(self, clips: torch.Tensor, context: Context) -> dict[str, list[float]]:
        columns: dict[str, list[float]] = {"frozen": [], "duplicates": []}
        for clip in clips:
            still, same = [], []
            for t in range(len(clip) - 1):
                still.append(bool((clip[t + 1] - clip[t]).abs().double().mean() < STILL))
                same.append(bool(((clip[t + 1] * 255.0).round() == (clip[t] * 255.0).round()).all()))
            for name, found in (("frozen", still), ("duplicates", same)):
                columns[name].append(sum(found) / len(found) if found else math.nan)
        return columns

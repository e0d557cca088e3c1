"""Flicker: brightness that jumps up and down, and VBench's temporal flickering (arXiv:2311.17982)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from vivace.evaluation.metrics.base import Better, Context, Group, MetricCard, SampleMetric, Scope, Series

if TYPE_CHECKING:
    import torch

LUMA = (0.299, 0.587, 0.114)


def temporal_flickering(clip: torch.Tensor) -> float:
    """VBench's formula: 1 less the mean absolute difference of neighbours, `clip` (T, H, W, 3) in [0, 1].

    Made for still scenes: it falls with any motion and is 1 for a frozen clip. NaN for a single frame.
    """
    if len(clip) < 2:
        return math.nan
    # Pair by pair: a float64 difference of a whole clip would be twice the clip.
    steps = [float((clip[t + 1] - clip[t]).abs().double().mean()) for t in range(len(clip) - 1)]
    return 1.0 - sum(steps) / len(steps)


class Flicker(SampleMetric):
    """Second difference of the mean luma, which steady motion and slow fades leave near zero, and VBench's score."""

    card: ClassVar[MetricCard] = MetricCard(
        name="flicker",
        version=1,
        title="Flicker",
        scope=Scope.SAMPLE,
        group=Group.ABSOLUTE,
        series=(
            Series(
                name="flicker",
                better=Better.LOWER,
                unit="levels",
                low=0.0,
                high=510.0,
                about="How much the brightness of the whole frame jumps from frame to frame.",
            ),
            Series(
                name="vbench_flicker",
                better=Better.SAME,
                low=0.0,
                high=1.0,
                about="VBench's temporal flickering; a frozen clip has the best value, so a rise is a departure too.",
            ),
        ),
        convention="flicker: mean over t of |Y(t - 1) - 2 Y(t) + Y(t + 1)|, Y the frame's mean luma (BT.601 weights "
        "on the decoded values) in levels of 255. vbench_flicker: 1 - mean |frame(t + 1) - frame(t)|, RGB"
        " in [0, 1].",
        sees=(
            "flicker",
            "shuffle",
            "stutter",
            "warp_jitter",
        ),
        blind_to=(
            "freeze",
            "blur",
            "reverse",
            "colour_shift",
            "wrong_motion",
            "wrong_clip",
            "wrong_colour",
        ),
        cite="arXiv:2311.17982",
    )

    def sample(self, clips: torch.Tensor, context: Context) -> dict[str, list[float]]:
        import torch

        weights = torch.tensor(LUMA, dtype=torch.float64, device=clips.device)
        jumps = []
        for clip in clips:
            luma = torch.stack([frame.double().mean(dim=(0, 1)) for frame in clip]) @ weights * 255.0
            jumps.append(float(luma.diff(n=2).abs().mean()) if len(luma) > 2 else math.nan)
        return {"flicker": jumps, "vbench_flicker": [temporal_flickering(clip) for clip in clips]}

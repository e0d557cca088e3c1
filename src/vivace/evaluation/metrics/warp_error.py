"""Warp error: what is left of a frame's difference to the next one after the motion is taken out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from vivace.evaluation import flow as flows
from vivace.evaluation.metrics.base import Better, Context, Group, MetricCard, SampleMetric, Scope, Series

if TYPE_CHECKING:
    import torch


class WarpError(SampleMetric):
    """Mean absolute difference of each frame to the next one along the flow (Lai et al., arXiv:1808.00449)."""

    card: ClassVar[MetricCard] = MetricCard(
        name="warp_error",
        version=1,
        title="Warp error",
        scope=Scope.SAMPLE,
        group=Group.ABSOLUTE,
        series=(
            Series(
                name="warp_error",
                better=Better.LOWER,
                unit="levels",
                low=0.0,
                high=255.0,
                about="Difference between frames that the motion between them does not explain.",
            ),
        ),
        convention="DIS flow (medium) of the luma from frame t to t + 1; frame t + 1 looked up along it (bilinear); "
        "mean absolute RGB difference to frame t in levels of 255 over the pixels whose target lies "
        "inside, no mask for hidden pixels; mean over pairs.",
        sees=(
            "flicker",
            "noise",
            "shuffle",
            "warp_jitter",
            "colour_drift",
        ),
        blind_to=(
            "freeze",
            "stutter",
            "blur",
            "reverse",
            "colour_shift",
            "wrong_motion",
            "wrong_clip",
            "wrong_colour",
        ),
        packages=("cv2",),
        cite="arXiv:1808.00449",
    )

    def sample(self, clips: torch.Tensor, context: Context) -> dict[str, list[float]]:
        import torch

        values = []
        for clip, flow in zip(clips, flows.optical_flow(clips), strict=True):
            pairs = []
            for t in range(len(flow)):
                along = torch.tensor(flow[t : t + 1], device=clips.device)
                moved, inside = flows.warp(clip[t + 1 : t + 2], along)
                error = (moved - clip[t : t + 1]).abs().mean(dim=-1)[inside]
                if error.numel():
                    pairs.append(error.double().mean() * 255.0)
            values.append(float(torch.stack(pairs).mean()) if pairs else math.nan)
        return {"warp_error": values}

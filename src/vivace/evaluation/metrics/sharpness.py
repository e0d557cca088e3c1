"""Sharpness as the strength of the Laplacian, which blur lowers and noise raises."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vivace.evaluation.frames import FrameError
from vivace.evaluation.metrics.base import Better, Context, Group, MetricCard, SampleMetric, Scope, Series
from vivace.evaluation.metrics.flicker import LUMA

if TYPE_CHECKING:
    import torch


class Sharpness(SampleMetric):
    """Root mean square of the luma's Laplacian (Pech-Pacheco et al., ICPR 2000, who take its variance)."""

    card: ClassVar[MetricCard] = MetricCard(
        name="sharpness",
        version=1,
        title="Sharpness",
        scope=Scope.SAMPLE,
        group=Group.ABSOLUTE,
        series=(
            Series(
                name="sharpness",
                better=Better.SAME,
                unit="levels",
                low=0.0,
                high=1020.0,
                about="Strength of fine detail; less is blur, more is noise or ringing.",
            ),
        ),
        convention="Luma (BT.601 weights) in levels of 255; Laplacian with four neighbours, inner pixels only; root "
        "of the mean square over the frame; mean over frames.",
        sees=(
            "blur",
            "noise",
            "warp_jitter",
        ),
        blind_to=(
            "freeze",
            "stutter",
            "shuffle",
            "reverse",
            "flicker",
            "wrong_motion",
            "wrong_clip",
        ),
        cite="Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, ICPR 2000",
    )

    def sample(self, clips: torch.Tensor, context: Context) -> dict[str, list[float]]:
        import torch

        if min(clips.shape[2:4]) < 3:
            raise FrameError("sharpness needs frames of at least 3x3 pixels; make larger clips")
        weights = torch.tensor(LUMA, dtype=torch.float64, device=clips.device)
        values = []
        for clip in clips:
            frames = []
            for frame in clip:
                luma = frame.double() @ weights * 255.0
                inner = luma[1:-1, 1:-1]
                around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
                frames.append((around - 4.0 * inner).square().mean().sqrt())
            values.append(float(torch.stack(frames).mean()))
        return {"sharpness": values}

"""Peak signal-to-noise ratio over RGB, peak 1.

The clip's value comes from the *pooled* mean squared error, not from the mean of the frames' decibels: a mean
of decibels needs an arbitrary cap for equal frames, and a few of those then hide the frames that drifted.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.evaluation.frames import FrameMetric, unit_pair, worst_frame
from vivace.evaluation.metrics.base import Better, Group, MetricCard, PairMetric, Scope, Series

if TYPE_CHECKING:
    import torch

VERSION = "psnr@1: RGB, peak 1, clip value from the pooled MSE, no cap"


def psnr(reference: Any, candidate: Any) -> FrameMetric:
    """PSNR in dB per frame and for the clip; equal frames give `inf`.

    Args:
        reference, candidate: frames `(T, H, W, 3)`, uint8 or float in [0, 1], of equal shape.

    Raises:
        FrameError: a shape, type or range is wrong, or the shapes differ.
    """
    first, second = unit_pair(reference, candidate)
    mse = ((first - second) ** 2).mean(axis=(1, 2, 3))
    per_frame = tuple(_decibel(float(value)) for value in mse)
    return FrameMetric(
        name="psnr",
        version=VERSION,
        unit="dB",
        higher_is_better=True,
        per_frame=per_frame,
        pooled=_decibel(float(mse.mean())),
        worst=worst_frame(per_frame, higher_is_better=True),
    )


class Psnr(PairMetric):
    """`psnr` for batches of clips, on any device; squared errors are summed in float64."""

    card: ClassVar[MetricCard] = MetricCard(
        name="psnr",
        version=1,
        title="Peak signal-to-noise ratio",
        scope=Scope.PAIR,
        group=Group.FIDELITY,
        series=(
            Series(
                name="psnr",
                better=Better.HIGHER,
                unit="dB",
                low=0.0,
                about="From the squared error pooled over the whole clip; infinite for equal clips.",
            ),
            Series(
                name="psnr_worst",
                better=Better.HIGHER,
                unit="dB",
                low=0.0,
                about="Of the frame with the largest squared error.",
            ),
        ),
        convention="RGB as decoded, peak 1, mean squared error over frames, pixels and channels, no cap.",
        sees=(
            "freeze",
            "stutter",
            "shuffle",
            "reverse",
            "there_and_back",
            "wrong_motion",
            "wrong_clip",
            "flicker",
            "blur",
            "noise",
            "colour_shift",
            "colour_drift",
            "wrong_colour",
            "warp_jitter",
        ),
        blind_to=("quality of a clip that departs from the reference",),
        symmetric=True,
    )

    def pair(self, reference: torch.Tensor, clips: torch.Tensor) -> dict[str, list[float]]:
        pooled, worst = [], []
        # Clip by clip: the float64 difference of a whole batch would be four times the batch.
        for first, second in zip(reference, clips, strict=True):
            mse = (first.double() - second.double()).square_().mean(dim=(1, 2, 3))
            pooled.append(mse.mean())
            worst.append(mse.max())
        return {
            "psnr": [_decibel(float(value)) for value in pooled],
            "psnr_worst": [_decibel(float(value)) for value in worst],
        }


def _decibel(mse: float) -> float:
    return -10.0 * math.log10(mse) if mse > 0.0 else math.inf

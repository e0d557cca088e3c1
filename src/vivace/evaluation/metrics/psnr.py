"""Peak signal-to-noise ratio over RGB, peak 1.

The clip's value comes from the *pooled* mean squared error, not from the mean of the frames' decibels: a mean
of decibels needs an arbitrary cap for equal frames, and a few of those then hide the frames that drifted.
"""

from __future__ import annotations

import math
from typing import Any

from vivace.evaluation.frames import FrameMetric, unit_pair, worst_frame

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


def _decibel(mse: float) -> float:
    return -10.0 * math.log10(mse) if mse > 0.0 else math.inf

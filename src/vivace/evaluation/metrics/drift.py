"""Drift of colour over the clip, and pixels at the ends of the range."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from vivace.evaluation.metrics.base import Better, Context, Group, MetricCard, SampleMetric, Scope, Series

if TYPE_CHECKING:
    import torch

_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
"""Linear sRGB to XYZ (IEC 61966-2-1, D65)."""
_EPSILON, _KAPPA = 216.0 / 24389.0, 24389.0 / 27.0
"""Constants of CIE 15:2004."""
LEAST = 4


def lab(frame: torch.Tensor) -> torch.Tensor:
    """CIE L*a*b* (D65), float64, of sRGB values (..., 3) in [0, 1]."""
    import torch

    value = frame.double()
    linear = torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor(_TO_XYZ, dtype=torch.float64, device=frame.device)
    ratio = (
        linear @ (matrix / matrix.sum(dim=1, keepdim=True)).T
    )  # the white point is the matrix' image of white
    f = torch.where(ratio > _EPSILON, ratio.clamp_min(1e-12) ** (1.0 / 3.0), (_KAPPA * ratio + 16.0) / 116.0)
    x, y, z = f.unbind(-1)
    return torch.stack((116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)), dim=-1)


def quarter(frames: int) -> int:
    """How many frames the first and the last quarter hold."""
    return max(1, frames // 4)


class Drift(SampleMetric):
    """Departure of the last quarter's colours from the first quarter's, and the share of clipped values."""

    card: ClassVar[MetricCard] = MetricCard(
        name="drift",
        version=1,
        title="Colour drift and clipping",
        scope=Scope.SAMPLE,
        group=Group.ABSOLUTE,
        series=(
            Series(
                name="colour_drift",
                better=Better.LOWER,
                unit="dE",
                low=0.0,
                about="Distance of the mean colour of the last quarter to that of the first (CIE76).",
            ),
            Series(
                name="saturation_drift",
                better=Better.LOWER,
                unit="chroma",
                low=0.0,
                about="Change of the mean chroma from the first quarter to the last.",
            ),
            Series(
                name="clipped",
                better=Better.LOWER,
                low=0.0,
                high=1.0,
                about="Share of the values that are black or white to within half a level.",
            ),
        ),
        convention="sRGB to CIE L*a*b* (D65) pixel by pixel, mean over the frames of each quarter (T // 4, at least "
        "one); colour_drift: Euclidean distance of the means; saturation_drift: absolute difference of "
        "the mean chroma; clipped: R, G and B values at or beyond 0.5 and 254.5 levels. Clips under four "
        "frames have no drift. A moving camera drifts by right; compare with the exact run.",
        sees=("colour_drift",),
        blind_to=(
            "freeze",
            "stutter",
            "shuffle",
            "reverse",
            "flicker",
            "blur",
            "colour_shift",
            "wrong_motion",
            "wrong_clip",
            "wrong_colour",
            "warp_jitter",
        ),
        cite="CIE 15:2004",
    )

    def sample(self, clips: torch.Tensor, context: Context) -> dict[str, list[float]]:
        import torch

        columns: dict[str, list[float]] = {"colour_drift": [], "saturation_drift": [], "clipped": []}
        for clip in clips:
            ends = ((clip <= 0.5 / 255.0) | (clip >= 254.5 / 255.0)).double().mean()
            columns["clipped"].append(float(ends))
            if len(clip) < LEAST:
                columns["colour_drift"].append(math.nan)
                columns["saturation_drift"].append(math.nan)
                continue
            count = quarter(len(clip))
            first, last = (lab(part).flatten(0, 2) for part in (clip[:count], clip[-count:]))
            columns["colour_drift"].append(float((last.mean(dim=0) - first.mean(dim=0)).norm()))
            chroma = [torch.linalg.vector_norm(part[:, 1:], dim=1).mean() for part in (first, last)]
            columns["saturation_drift"].append(float((chroma[1] - chroma[0]).abs()))
        return columns

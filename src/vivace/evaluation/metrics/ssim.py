"""Structural similarity (Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", IEEE TIP 2004).

One stated convention, since the common packages disagree by 0.1 on the same pair: Gaussian window 11 x 11
with sigma 1.5, K1 = 0.01, K2 = 0.03, data range 1, biased variances, only windows that lie fully inside the
frame, each RGB channel by itself and then the mean over channels and positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from vivace.evaluation.frames import FrameError, FrameMetric, unit_pair, worst_frame
from vivace.evaluation.metrics.base import Better, Group, MetricCard, PairMetric, Scope, Series

if TYPE_CHECKING:
    import torch

VERSION = "ssim@1: RGB mean, Gaussian 11x11 sigma 1.5, K1 0.01, K2 0.03, valid region, mean over frames"
WINDOW = 11
SIGMA = 1.5
C1 = 0.01**2
C2 = 0.03**2
BLOCK = 2**25
"""Numbers in the five maps that an accelerator filters at once; a CPU goes frame by frame, to stay in its cache."""


def ssim(reference: Any, candidate: Any) -> FrameMetric:
    """SSIM per frame; the clip's value is the mean over frames.

    Args:
        reference, candidate: frames `(T, H, W, 3)`, uint8 or float in [0, 1], of equal shape, sides >= 11.

    Raises:
        FrameError: a shape, type or range is wrong, the shapes differ, or a side is shorter than the window.
    """
    first, second = unit_pair(reference, candidate)
    _check_size(*first.shape[1:3])
    taps = _gaussian_taps()
    # Frame by frame: five filtered maps of a whole clip would be many times the clip itself.
    per_frame = tuple(_frame_ssim(x, y, taps) for x, y in zip(first, second, strict=True))
    return FrameMetric(
        name="ssim",
        version=VERSION,
        unit="",
        higher_is_better=True,
        per_frame=per_frame,
        pooled=float(np.mean(per_frame)),
        worst=worst_frame(per_frame, higher_is_better=True),
    )


class Ssim(PairMetric):
    """`ssim` for batches of clips, on any device, in float64: the variances are small differences of large means."""

    card: ClassVar[MetricCard] = MetricCard(
        name="ssim",
        version=1,
        title="Structural similarity",
        scope=Scope.PAIR,
        group=Group.FIDELITY,
        series=(
            Series(name="ssim", better=Better.HIGHER, low=-1.0, high=1.0, about="Mean over the frames."),
            Series(
                name="ssim_worst",
                better=Better.HIGHER,
                low=-1.0,
                high=1.0,
                about="Of the least similar frame.",
            ),
        ),
        convention="Each RGB channel by itself, range 1, Gaussian window 11x11 with sigma 1.5, K1 0.01, K2 0.03, "
        "biased variances, only windows that lie inside the frame, mean over positions, channels and frames.",
        sees=(
            "freeze",
            "stutter",
            "shuffle",
            "reverse",
            "there_and_back",
            "wrong_motion",
            "wrong_clip",
            "blur",
            "noise",
            "wrong_colour",
            "warp_jitter",
        ),
        blind_to=(
            "flicker",
            "colour_shift",
            "colour_drift",
            "quality of a clip that departs from the reference",
        ),
        cite="Wang, Bovik, Sheikh, Simoncelli, IEEE Transactions on Image Processing 13(4), 2004",
        symmetric=True,
    )

    def pair(self, reference: torch.Tensor, clips: torch.Tensor) -> dict[str, list[float]]:
        import torch

        batch, frames, height, width, _ = clips.shape
        _check_size(height, width)
        first, second = reference.flatten(0, 1), clips.flatten(0, 1)
        block = 1 if clips.device.type == "cpu" else max(1, BLOCK // (15 * height * width))
        values = torch.cat(
            [_torch_ssim(x, y) for x, y in zip(first.split(block), second.split(block), strict=True)]
        ).reshape(batch, frames)
        return {"ssim": values.mean(dim=1).tolist(), "ssim_worst": values.amin(dim=1).tolist()}


def _check_size(height: int, width: int) -> None:
    if min(height, width) < WINDOW:
        raise FrameError(
            f"ssim needs frames of at least {WINDOW}x{WINDOW} pixels, got {height}x{width}; use psnr instead"
        )


def _torch_ssim(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """SSIM (N,) of two stacks `(N, H, W, 3)`; the same steps as `_frame_ssim`."""
    import torch

    x, y = first.double(), second.double()
    maps = torch.stack((x, y, x * x, y * y, x * y))
    for axis in (2, 3):
        size = maps.shape[axis] - WINDOW + 1
        out = torch.zeros(())
        for offset, tap in enumerate(_gaussian_taps().tolist()):
            view = maps.narrow(axis, offset, size)
            out = view * tap if offset == 0 else out.add_(view, alpha=tap)
        maps = out
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = maps
    both = mean_x.square() + mean_y.square()
    luminance = (2.0 * mean_x * mean_y + C1) / (both + C1)
    structure = (2.0 * (mean_xy - mean_x * mean_y) + C2) / (mean_xx + mean_yy - both + C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _gaussian_taps() -> np.ndarray:
    offsets = np.arange(WINDOW) - WINDOW // 2
    taps = np.exp(-(offsets**2) / (2.0 * SIGMA**2))
    return taps / taps.sum()


def _frame_ssim(x: np.ndarray, y: np.ndarray, taps: np.ndarray) -> float:
    """SSIM (eq. 13 of the paper) of two `(H, W, 3)` frames."""
    # The maps are filtered together: (5, H, W, 3).
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blur_valid(np.stack((x, y, x * x, y * y, x * y)), taps)
    variance_x = mean_xx - mean_x * mean_x
    variance_y = mean_yy - mean_y * mean_y
    covariance = mean_xy - mean_x * mean_y
    luminance = (2.0 * mean_x * mean_y + C1) / (mean_x * mean_x + mean_y * mean_y + C1)
    structure = (2.0 * covariance + C2) / (variance_x + variance_y + C2)
    return float((luminance * structure).mean())


def _blur_valid(maps: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Separable filter over axes 1 and 2 of `(N, H, W, C)`; gives `(N, H - 10, W - 10, C)`."""
    down = sliding_window_view(maps, WINDOW, axis=1) @ taps
    return sliding_window_view(down, WINDOW, axis=2) @ taps

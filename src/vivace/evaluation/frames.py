"""What a frame metric takes (checked frames) and what it gives back (`FrameMetric`).

A frame stack is `(T, H, W, 3)`, RGB. It is uint8 in [0, 255] or floating point in [0, 1]; both give equal
results. Everything else is refused: a wrong range does not crash a metric, it silently moves the number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vivace.core.errors import VivaceError

if TYPE_CHECKING:
    import torch

RANGE_SLACK = 1e-4
"""How far a float frame may leave [0, 1] by rounding before it is refused; what is over is clipped."""


class FrameError(VivaceError, ValueError):
    """Frames of a shape, type or range that the called function cannot take."""


@dataclass(frozen=True, kw_only=True)
class FrameMetric:
    """One metric over one clip pair: a value per frame, one for the clip, and the worst frame."""

    name: str
    """Short name, e.g. `psnr`."""
    version: str
    """The convention in words; two numbers are comparable only when these are equal."""
    unit: str
    """`dB`, or empty for a dimensionless score."""
    higher_is_better: bool
    per_frame: tuple[float, ...] = ()
    """T values, empty when skipped; infinite PSNR (equal frames) is kept as `inf`."""
    pooled: float | None = None
    """The clip's value; None when skipped."""
    worst: int | None = None
    """Index of the worst frame (the first of equals); None when skipped."""
    skipped: str | None = None
    """Why there is no value. A skipped metric never carries a number."""

    def __post_init__(self) -> None:
        if self.skipped is None and (not self.per_frame or self.pooled is None or self.worst is None):
            raise ValueError(
                f"metric {self.name!r} has neither values nor a reason for skipping; give one of them"
            )
        if self.skipped is not None and (self.per_frame or self.pooled is not None or self.worst is not None):
            raise ValueError(f"metric {self.name!r} is skipped and must not carry values; drop one of them")


def worst_frame(per_frame: tuple[float, ...], *, higher_is_better: bool) -> int:
    """Index of the lowest value, or of the highest when lower is better."""
    return int(np.argmin(per_frame) if higher_is_better else np.argmax(per_frame))


def check_uint8(frames: Any, name: str = "frames") -> np.ndarray:
    """The frames as a uint8 array `(T, H, W, 3)`.  Raises `FrameError` for any other shape or type."""
    array = _to_numpy(frames)
    _check_shape(array, name)
    if array.dtype != np.uint8:
        raise FrameError(
            f"{name} must be uint8 in [0, 255], got {array.dtype}; scale [0, 1] by 255, round, and convert"
        )
    return array


def unit_frames(frames: Any, name: str = "frames") -> np.ndarray:
    """The frames as float64 `(T, H, W, 3)` in [0, 1].

    Takes a numpy array or a torch tensor, uint8 or floating point.
    Raises `FrameError` when shape, type or range is wrong; the sentence says what to do.
    """
    array = _to_numpy(frames)
    _check_shape(array, name)
    if array.dtype == np.uint8:
        return array.astype(np.float64) / 255.0
    if not np.issubdtype(array.dtype, np.floating):
        raise FrameError(f"{name} must be uint8 or floating point, got {array.dtype}; convert them first")
    values = array.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise FrameError(f"{name} hold NaN or infinite values; find out which step produced them")
    if low < -RANGE_SLACK or high > 1.0 + RANGE_SLACK:
        raise FrameError(
            f"{name} are floating point in [{low:.4g}, {high:.4g}], wanted [0, 1]; "
            "rescale them or pass uint8 frames"
        )
    return values.clip(0.0, 1.0)


def unit_pair(reference: Any, candidate: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both clips as float64 in [0, 1].  Raises `FrameError` when either is bad or the shapes differ."""
    first, second = unit_frames(reference, "reference frames"), unit_frames(candidate, "candidate frames")
    check_same_shape(first, second)
    return first, second


def unit_clips(clips: Any, name: str = "clips", device: Any = "cpu") -> torch.Tensor:
    """A batch of clips as float32 `(B, T, H, W, 3)` in [0, 1] on `device`.

    Takes a numpy array or a torch tensor, uint8 or floating point; uint8 and the same levels as float are equal.
    Raises `FrameError` when shape, type or range is wrong; the sentence says what to do.
    """
    import torch

    tensor = torch.as_tensor(clips)
    if tensor.ndim != 5 or tensor.shape[-1] != 3 or 0 in tensor.shape:
        raise FrameError(
            f"{name} must have the shape (B, T, H, W, 3) with nothing empty, got {tuple(tensor.shape)}; "
            "reorder the axes"
        )
    tensor = tensor.to(device)
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255.0
    if not tensor.is_floating_point():
        raise FrameError(f"{name} must be uint8 or floating point, got {tensor.dtype}; convert them first")
    values = tensor.float()
    low, high = (float(v) for v in torch.aminmax(values))
    if not np.isfinite(low) or not np.isfinite(high):
        raise FrameError(f"{name} hold NaN or infinite values; find out which step produced them")
    if low < -RANGE_SLACK or high > 1.0 + RANGE_SLACK:
        raise FrameError(
            f"{name} are floating point in [{low:.4g}, {high:.4g}], wanted [0, 1]; rescale them or pass uint8 frames"
        )
    return values.clamp(0.0, 1.0)


def check_same_shape(reference: Any, candidate: Any) -> None:
    """Raises `FrameError` unless both clips have the same frames, height and width."""
    if reference.shape != candidate.shape:
        raise FrameError(
            f"the clips differ in shape, {tuple(reference.shape)} against {tuple(candidate.shape)}; "
            "compare clips of equal frame count, height and width"
        )


def _to_numpy(frames: Any) -> np.ndarray:
    if hasattr(frames, "detach"):  # a torch tensor, recognised without importing torch
        tensor = frames.detach().cpu()
        frames = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return np.asarray(frames)


def _check_shape(array: np.ndarray, name: str) -> None:
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise FrameError(
            f"{name} must have the shape (T, H, W, 3) with nothing empty, got {array.shape}; reorder the axes"
        )

"""Frame metrics: one file each, pure functions of two frame stacks, one result type."""

from vivace.evaluation.frames import FrameError, FrameMetric
from vivace.evaluation.metrics.lpips import lpips
from vivace.evaluation.metrics.psnr import psnr
from vivace.evaluation.metrics.ssim import ssim

__all__ = ["FrameError", "FrameMetric", "lpips", "psnr", "ssim"]

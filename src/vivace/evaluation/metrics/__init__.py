"""Metrics: one file each. Frame metrics are pure functions of two frame stacks with one result type."""

from vivace.evaluation.frames import FrameError, FrameMetric
from vivace.evaluation.metrics.frechet import frechet_distance
from vivace.evaluation.metrics.lpips import lpips
from vivace.evaluation.metrics.psnr import psnr
from vivace.evaluation.metrics.ssim import ssim

__all__ = ["FrameError", "FrameMetric", "frechet_distance", "lpips", "psnr", "ssim"]

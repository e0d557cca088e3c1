"""Do the frames as a set look like the exact run's frames?  Kernel distance of ImageNet features, as KID."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vivace.evaluation import two_sample
from vivace.evaluation.metrics._effnet import BACKBONE, SPREADS, EffNetMetric
from vivace.evaluation.metrics.base import Better, Context, Group, MetricCard, Scope, Series, SetValue

if TYPE_CHECKING:
    import numpy as np
    import torch


class FrameMmd(EffNetMetric):
    """Squared kernel distance (Binkowski et al., arXiv:1801.01401) of the clips' mean frame features."""

    card = MetricCard(
        name="frame_mmd",
        version=1,
        title="Frame distance (kernel, EfficientNet-Lite0)",
        scope=Scope.SET,
        group=Group.DISTRIBUTION,
        series=(
            Series(
                name="frame_mmd",
                better=Better.LOWER,
                about="Unbiased squared kernel distance between the frames of both sets; 0 when equal, can be below.",
            ),
        ),
        convention=(
            "EfficientNet-Lite0 features of every frame (shorter side 160, bilinear, antialiased), mean over frames, "
            f"divided by {SPREADS[0]}; kernel (x.y/1280 + 1)^3; {two_sample.PROCEDURE}"
        ),
        sees=("blur", "noise", "warp_jitter", "wrong_colour", "colour_shift", "colour_drift"),
        blind_to=("stutter", "shuffle", "reverse", "there_and_back", "flicker", "wrong_motion", "wrong_clip"),
        backbone=BACKBONE,
        cite="arXiv:1801.01401",
        symmetric=True,
    )

    def embed(self, clips: torch.Tensor, context: Context) -> np.ndarray:
        return pooled(self.frames(clips))

    def distance(
        self, reference: np.ndarray, candidate: np.ndarray, groups: Sequence[int], seed: int = 0
    ) -> dict[str, SetValue]:
        x, y, numbers = two_sample.paired_tables(reference, candidate, groups)
        h = two_sample.pairs(x, y, two_sample.polynomial_kernel)
        return {"frame_mmd": two_sample.compare_sets(h, numbers, seed)}


def pooled(frames: np.ndarray) -> np.ndarray:
    """The row of each clip, (B, D), from features of its frames, (B, T, D)."""
    return frames.mean(axis=1) / SPREADS[0]

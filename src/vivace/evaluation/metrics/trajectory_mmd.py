"""Do the clips as a set change in time like the exact run's?  Kernel distance of features and their differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vivace.evaluation import two_sample
from vivace.evaluation.frames import FrameError
from vivace.evaluation.metrics._effnet import BACKBONE, SPREADS, EffNetMetric
from vivace.evaluation.metrics.base import Better, Context, Group, MetricCard, Scope, Series, SetValue

if TYPE_CHECKING:
    import torch

LEAST_FRAMES = 3
"""A second difference needs three."""


class TrajectoryMmd(EffNetMetric):
    """Squared kernel distance of the clips' paths through feature space."""

    card = MetricCard(
        name="trajectory_mmd",
        version=1,
        title="Trajectory distance (kernel, EfficientNet-Lite0)",
        scope=Scope.SET,
        group=Group.DISTRIBUTION,
        series=(
            Series(
                name="trajectory_mmd",
                better=Better.LOWER,
                about=(
                    "Unbiased squared kernel distance between frames and their changes in both sets; "
                    "0 when equal, can be below."
                ),
            ),
        ),
        convention=(
            "EfficientNet-Lite0 features of every frame (shorter side 160, bilinear, antialiased); mean over frames, "
            f"mean absolute first and second difference in time, divided by {SPREADS}, side by side; "
            f"kernel (x.y/3840 + 1)^3; {two_sample.PROCEDURE}"
        ),
        sees=("blur", "noise", "warp_jitter", "flicker", "freeze", "stutter", "shuffle", "there_and_back"),
        blind_to=("reverse", "wrong_motion", "wrong_clip"),
        backbone=BACKBONE,
        cite="arXiv:1801.01401",
        symmetric=True,
    )

    def embed(self, clips: torch.Tensor, context: Context) -> np.ndarray:
        if clips.shape[1] < LEAST_FRAMES:
            raise FrameError(
                f"trajectory_mmd needs clips of {LEAST_FRAMES} frames or more, not {clips.shape[1]}; make longer clips."
            )
        return path(self.frames(clips))

    def distance(
        self, reference: np.ndarray, candidate: np.ndarray, groups: Sequence[int], seed: int = 0
    ) -> dict[str, SetValue]:
        x, y, numbers = two_sample.paired_tables(reference, candidate, groups)
        h = two_sample.pairs(x, y, two_sample.polynomial_kernel)
        return {"trajectory_mmd": two_sample.compare_sets(h, numbers, seed)}


def path(frames: np.ndarray) -> np.ndarray:
    """The row of each clip, (B, 3 D), from features of its frames, (B, T, D). The same for a clip run backwards."""
    changes = [np.abs(np.diff(frames, n=n, axis=1)).mean(axis=1) for n in (1, 2)]
    parts = zip((frames.mean(axis=1), *changes), SPREADS, strict=True)
    return np.concatenate([part / spread for part, spread in parts], axis=1)

"""What the distribution metrics on EfficientNet-Lite0 features share. Not a metric."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vivace.evaluation import weights
from vivace.evaluation.metrics.base import Backbone, SetMetric

if TYPE_CHECKING:
    import numpy as np
    import torch

WEIGHTS = "efficientnet_lite0"
_known = weights.known[WEIGHTS]
BACKBONE = Backbone(
    name="EfficientNet-Lite0 (ImageNet), pooled features at a shorter side of 160 pixels",
    sha256=_known.sha256,
    licence=_known.licence,
    source=_known.source,
)
SPREADS = (0.7, 0.1, 0.15)
"""Root mean square of the features, and of their first and second differences in time, on clips of the world, rounded.

Fixed numbers, not those of the reference: with a scale taken from one of the two sets the test of "equal" rejects two
to three times too often at 16 prompts, and every reference would have its own metric.
"""


class EffNetMetric(SetMetric):
    """Base of metrics on frame features (B, T, 1280)."""

    abstract: ClassVar[bool] = True

    def missing(self) -> str:
        return super().missing() or weights.missing(WEIGHTS)

    def frames(self, clips: torch.Tensor) -> np.ndarray:
        """Features of every frame, float64 (B, T, 1280)."""
        from vivace.evaluation import efficientnet

        return efficientnet.features(clips, self.device).double().cpu().numpy()

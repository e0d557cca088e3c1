"""Subject consistency and identity drift on ImageNet features (EfficientNet-Lite0).

VBench (arXiv:2311.17982) takes DINO features; the formula here is the same, the features are not, so the numbers must
not stand beside VBench's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from vivace.evaluation import weights
from vivace.evaluation.metrics.base import (
    Backbone,
    Better,
    Context,
    Group,
    MetricCard,
    SampleMetric,
    Scope,
    Series,
)
from vivace.evaluation.metrics.drift import LEAST, quarter

if TYPE_CHECKING:
    import torch

NET = "efficientnet_lite0"


def backbone() -> Backbone:
    """EfficientNet-Lite0, for a metric's card."""
    known = weights.known[NET]
    return Backbone(name=known.title, sha256=known.sha256, licence=known.licence, source=known.source)


def consistency(features: torch.Tensor) -> float:
    """Mean over the frames after the first of (cosine to the frame before + cosine to the first) / 2, each at least 0.

    `features` is (T, D). NaN for a single frame.
    """
    import torch

    if len(features) < 2:
        return math.nan
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    before = (unit[1:] * unit[:-1]).sum(dim=-1).clamp_min(0.0)
    first = (unit[1:] @ unit[0]).clamp_min(0.0)
    return float(((before + first) / 2.0).mean().clamp_max(1.0))


def identity_drift(features: torch.Tensor) -> float:
    """1 less the cosine between the mean features of the first and of the last quarter; NaN under four frames."""
    import torch

    if len(features) < LEAST:
        return math.nan
    count = quarter(len(features))
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    first, last = unit[:count].mean(dim=0), unit[-count:].mean(dim=0)
    return float((1.0 - torch.nn.functional.cosine_similarity(first, last, dim=0)).clamp_min(0.0))


class SubjectConsistency(SampleMetric):
    """Whether the picture's content stays the same: neighbour by neighbour, and from the beginning to the end."""

    card: ClassVar[MetricCard] = MetricCard(
        name="subject_consistency",
        version=1,
        title="Subject consistency (EfficientNet)",
        scope=Scope.SAMPLE,
        group=Group.ABSOLUTE,
        series=(
            Series(
                name="subject_consistency",
                better=Better.SAME,
                low=0.0,
                high=1.0,
                about="How alike the frames are in content; a frozen clip has 1, so a rise is a departure too.",
            ),
            Series(
                name="identity_drift",
                better=Better.LOWER,
                low=0.0,
                high=2.0,
                about="How far the content moves from the first quarter to the last.",
            ),
        ),
        convention="EfficientNet-Lite0 features before the classifier, mean over places, shorter side 160 pixels. "
        "subject_consistency: mean over frames of (cosine to the frame before + cosine to the first) / 2,"
        " each at least 0. identity_drift: 1 - cosine of the mean unit features of the first and the last"
        " quarter (T // 4 frames).",
        sees=("noise", "warp_jitter", "colour_drift"),
        blind_to=("freeze", "stutter", "blur", "reverse", "colour_shift", "wrong_motion", "wrong_clip"),
        backbone=backbone(),
        cite="arXiv:2311.17982",
    )

    def missing(self) -> str:
        return super().missing() or weights.missing(NET)

    def sample(self, clips: torch.Tensor, context: Context) -> dict[str, list[float]]:
        from vivace.evaluation import efficientnet

        rows = efficientnet.features(clips, self.device)
        return {
            "subject_consistency": [consistency(row) for row in rows],
            "identity_drift": [identity_drift(row) for row in rows],
        }

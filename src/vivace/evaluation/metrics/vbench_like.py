"""VBench's dimensions that can be had without its weights, under names that say so.

The formulas are VBench's (Huang et al., arXiv:2311.17982); where it takes a network (RAFT, AMT, DINO) another means
stands in. Only numbers of VBench's own code bear its name (`vbench_official`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from vivace.evaluation import flow as flows
from vivace.evaluation import weights
from vivace.evaluation.metrics.base import Better, Context, Group, MetricCard, SampleMetric, Scope, Series
from vivace.evaluation.metrics.dynamic_degree import fastest, is_dynamic, thinned
from vivace.evaluation.metrics.flicker import temporal_flickering
from vivace.evaluation.metrics.subject_consistency import NET, backbone, consistency

if TYPE_CHECKING:
    import torch

_SAME = {"better": Better.SAME, "low": 0.0, "high": 1.0}


def motion_smoothness(clip: torch.Tensor) -> float:
    """1 less the mean absolute error of frames interpolated from their neighbours; `clip` (T, H, W, 3) in [0, 1].

    Frames 1, 3, 5 ... are left out and made again from the frames on either side: each is looked up half way along the
    flow between them, and the two are averaged (VBench takes the network AMT-S). NaN under three frames.
    """
    import torch

    kept = clip[::2]
    count = min(len(kept) - 1, len(clip) // 2)
    if count < 1:
        return math.nan
    errors = []
    for k, flow in enumerate(flows.optical_flow(kept[None])[0][:count]):
        half = torch.tensor(flow[None] / 2.0, device=clip.device)
        behind, _ = flows.warp(kept[k : k + 1], -half)
        ahead, _ = flows.warp(kept[k + 1 : k + 2], half)
        errors.append(float(((behind + ahead) / 2.0 - clip[2 * k + 1]).abs().double().mean()))
    return 1.0 - sum(errors) / len(errors)


class VBenchLike(SampleMetric):
    """Temporal flickering as VBench has it; motion smoothness and dynamic degree on DIS flow."""

    card: ClassVar[MetricCard] = MetricCard(
        name="vbench_like",
        version=1,
        title="VBench-like (no weights)",
        scope=Scope.SAMPLE,
        group=Group.ABSOLUTE,
        series=(
            Series(
                name="like_temporal_flickering",
                about="vbench-like: 1 less the difference of neighbours; the formula is VBench's own.",
                **_SAME,
            ),
            Series(
                name="like_motion_smoothness",
                about="vbench-like: how well every second frame follows from its neighbours, by DIS flow for AMT-S.",
                **_SAME,
            ),
            Series(
                name="like_dynamic_degree",
                binary=True,
                margin=0.03,
                about="vbench-like: whether the clip moves, by DIS flow for RAFT.",
                **_SAME,
            ),
        ),
        convention="vbench-like. Flickering: 1 - mean |frame(t + 1) - frame(t)|. Smoothness: odd frames made again "
        "from their neighbours half way along DIS flow, 1 - mean absolute error. Dynamic degree: as the "
        "metric dynamic_degree. On decoded frames, not on an mp4, and on all prompts, not on VBench's for"
        " each dimension.",
        sees=(
            "flicker",
            "noise",
            "shuffle",
            "warp_jitter",
        ),
        blind_to=(
            "freeze",
            "blur",
            "reverse",
            "colour_shift",
            "wrong_motion",
            "wrong_clip",
            "wrong_colour",
        ),
        packages=("cv2",),
        cite="arXiv:2311.17982",
    )

    def sample(self, clips: torch.Tensor, context: Context) -> dict[str, list[float]]:
        flow = flows.optical_flow(thinned(clips, context.fps))
        side = min(clips.shape[2:4])
        return {
            "like_temporal_flickering": [temporal_flickering(clip) for clip in clips],
            "like_motion_smoothness": [motion_smoothness(clip) for clip in clips],
            "like_dynamic_degree": [is_dynamic(speeds, side) for speeds in fastest(flow)],
        }


class VBenchLikeSubject(SampleMetric):
    """VBench's subject consistency on EfficientNet features; apart, since it alone needs weights."""

    card: ClassVar[MetricCard] = MetricCard(
        name="vbench_like_subject",
        version=1,
        title="VBench-like subject consistency",
        scope=Scope.SAMPLE,
        group=Group.ABSOLUTE,
        series=(
            Series(
                name="like_subject_consistency",
                about="vbench-like: how alike the frames are, by EfficientNet features for DINO's.",
                **_SAME,
            ),
        ),
        convention="vbench-like. As the series subject_consistency: EfficientNet-Lite0, shorter side 160 pixels, "
        "mean over frames of (cosine to the frame before + cosine to the first) / 2.",
        sees=("noise", "warp_jitter", "colour_drift"),
        blind_to=("freeze", "stutter", "blur", "reverse", "colour_shift", "wrong_motion", "wrong_clip"),
        backbone=backbone(),
        cite="arXiv:2311.17982",
    )

    def missing(self) -> str:
        return super().missing() or weights.missing(NET)

    def sample(self, clips: torch.Tensor, context: Context) -> dict[str, list[float]]:
        from vivace.evaluation import efficientnet

        return {
            "like_subject_consistency": [
                consistency(row) for row in efficientnet.features(clips, self.device)
            ]
        }

"""Dynamic degree: whether anything moves enough, by VBench's rule (Huang et al., arXiv:2311.17982) on DIS flow."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from vivace.evaluation import flow as flows
from vivace.evaluation.metrics.base import Better, Context, Group, MetricCard, SampleMetric, Scope, Series

if TYPE_CHECKING:
    import torch

FPS = 8.0
"""Rate that clips are thinned to before pairs are formed."""
TOP = 0.05
"""Share of the pixels, the fastest ones, whose mean speed counts."""
FAST, SIDE = 6.0, 256.0
"""A pair moves when that speed is above `FAST` pixels, for a shorter side of `SIDE` pixels."""
SHARE = 4.0 / 16.0
"""A clip is dynamic when so many pairs, counted by its thinned frames, move."""
MARGIN = 0.03


def thinned(clips: torch.Tensor, fps: float) -> torch.Tensor:
    """Every so manieth frame, so that about `FPS` a second are left."""
    return clips[:, :: max(1, round(fps / FPS))]


def fastest(flow: np.ndarray) -> np.ndarray:
    """Mean speed of the fastest pixels of each pair, (B, T - 1), in pixels; flow is (B, T - 1, H, W, 2)."""
    speed = np.linalg.norm(flow, axis=-1).reshape(*flow.shape[:2], flow.shape[2] * flow.shape[3])
    count = max(1, int(speed.shape[-1] * TOP))
    return np.partition(speed, -count, axis=-1)[..., -count:].mean(axis=-1)


def is_dynamic(speeds: np.ndarray, side: int) -> float:
    """1.0 or 0.0 for one clip: `speeds` (T - 1,) of its pairs, `side` its shorter side. NaN without a pair."""
    if len(speeds) == 0:
        return math.nan
    wanted = max(1, round(SHARE * (len(speeds) + 1)))
    return float((speeds > FAST * side / SIDE).sum() >= wanted)


class DynamicDegree(SampleMetric):
    """Share of dynamic clips, and how fast the picture moves."""

    card: ClassVar[MetricCard] = MetricCard(
        name="dynamic_degree",
        version=1,
        title="Dynamic degree",
        scope=Scope.SAMPLE,
        group=Group.ABSOLUTE,
        series=(
            Series(
                name="dynamic_degree",
                better=Better.SAME,
                low=0.0,
                high=1.0,
                margin=MARGIN,
                binary=True,
                about="Whether the clip moves; more than the exact run moves is a departure too.",
            ),
            Series(
                name="flow_magnitude",
                better=Better.SAME,
                unit="% of the side a frame",
                low=0.0,
                about="Mean speed of all pixels, relative to the shorter side.",
            ),
        ),
        convention="Frames thinned to about 8 a second (every round(fps / 8)-th), DIS flow (medium) of the luma "
        "between neighbours; a pair moves if the mean speed of its fastest 5 % of the pixels is above 6 "
        "px * side / 256; a clip is dynamic if at least round(T / 4), and at least one, of its pairs "
        "move. VBench uses RAFT's flow instead.",
        sees=(
            "freeze",
            "shuffle",
            "flicker",
            "warp_jitter",
        ),
        blind_to=(
            "reverse",
            "blur",
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
        speed = np.linalg.norm(flow, axis=-1)
        return {
            "dynamic_degree": [is_dynamic(speeds, side) for speeds in fastest(flow)],
            "flow_magnitude": [float(v.mean() / side * 100.0) if v.size else math.nan for v in speed],
        }

"""Do the clips as a set move like the exact run's clips?  Energy distance of motion scalars; no weights needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vivace.evaluation import two_sample
from vivace.evaluation.frames import FrameError
from vivace.evaluation.metrics.base import (
    Better,
    Context,
    Group,
    MetricCard,
    Scope,
    Series,
    SetMetric,
    SetValue,
)

if TYPE_CHECKING:
    import torch

LEAST_FRAMES = 4
"""A second difference of flows needs three flows."""
SIDE = 256
"""Flow is counted in pixels of a frame whose shorter side has so many."""
SPEED, GRADIENT = 0.1, 0.02
"""What counts as hardly any motion: pixels per frame, and change of it per pixel."""
DIRECTIONS = 8
SPEEDS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, np.inf)
SCALARS = (
    "mean speed",
    "median speed",
    "95th percentile of speed",
    "spread of speed over places",
    "mean change of flow",
    "95th percentile of change of flow",
    "mean change of the frame's speed",
    "mean second change of flow",
    "change of flow relative to speed",
    "divergence",
    "curl",
    "gradient",
    "spread of speed over time",
    "least speed of a frame",
    "greatest speed of a frame",
    "share of still frames",
    "spread of directions",
    "spread of speeds",
)
SIGNED = 16
"""Two components of the mean flow, in two halves of the clip, in four quarters of the frame."""


class MotionEnergy(SetMetric):
    """Energy distances (Szekely and Rizzo 2013) of what optical flow says about motion."""

    card = MetricCard(
        name="motion_energy",
        version=1,
        title="Motion distance (energy, optical flow)",
        scope=Scope.SET,
        group=Group.DISTRIBUTION,
        series=(
            Series(
                name="motion_energy",
                better=Better.LOWER,
                about=(
                    f"Energy distance of {len(SCALARS)} scalars of speed, its changes and its pattern; "
                    "does not know left from right."
                ),
            ),
            Series(
                name="motion_energy_signed",
                better=Better.LOWER,
                about="Energy distance of the directed mean flow in quarters of the frame and halves of the clip.",
            ),
            Series(
                name="motion_energy_by_prompt",
                better=Better.LOWER,
                about=(
                    "The signed distance within each prompt, mean over prompts with two clips or more; "
                    "sees directions that cancel over all prompts."
                ),
            ),
        ),
        convention=(
            "DIS optical flow (medium) on luma, in pixels of a frame with shorter side 256; scalars as "
            f"log(1 + value / s), s = {SPEED} for speeds and {GRADIENT} for gradients, fixed, so that every set is "
            f"measured alike; {two_sample.PROCEDURE} By prompt: pairs of clips of one prompt, and clips exchanged."
        ),
        # reverse and wrong_motion: by_prompt alone, and the signed series where the prompts favour a direction.
        sees=(
            "freeze",
            "stutter",
            "shuffle",
            "there_and_back",
            "flicker",
            "noise",
            "warp_jitter",
            "reverse",
            "wrong_motion",
        ),
        blind_to=("blur", "colour_shift", "wrong_clip"),
        packages=("cv2",),
        cite="doi:10.1016/j.jspi.2013.03.018",
        symmetric=True,
    )

    def embed(self, clips: torch.Tensor, context: Context) -> np.ndarray:
        from vivace.evaluation.flow import optical_flow

        if clips.shape[1] < LEAST_FRAMES:
            raise FrameError(
                f"motion_energy needs clips of {LEAST_FRAMES} frames or more, not {clips.shape[1]}; make longer clips."
            )
        return np.stack([row(optical_flow(clip[None])[0]) for clip in clips])

    def distance(
        self, reference: np.ndarray, candidate: np.ndarray, groups: Sequence[int], seed: int = 0
    ) -> dict[str, SetValue]:
        x, y, numbers = two_sample.paired_tables(reference, candidate, groups)
        cut = len(SCALARS)
        plain = two_sample.pairs(x[:, :cut], y[:, :cut], two_sample.distance_kernel)
        signed = two_sample.pairs(x[:, cut:], y[:, cut:], two_sample.distance_kernel)
        values = {
            "motion_energy": two_sample.compare_sets(plain, numbers, seed),
            "motion_energy_signed": two_sample.compare_sets(signed, numbers, seed),
        }
        within = two_sample.compare_within(signed, numbers, seed)
        return values if within is None else values | {"motion_energy_by_prompt": within}


def row(flow: np.ndarray) -> np.ndarray:
    """The 18 scalars of `SCALARS` and the 16 signed ones of a clip's flow (T - 1, H, W, 2) in pixels: (34,)."""
    height, width = flow.shape[1:3]
    step = max(1, min(height, width) // SIDE)  # a finer grid than this adds cost and nothing else
    pixels = flow[:, ::step, ::step].astype(np.float32)
    moved = pixels * np.float32(SIDE / min(height, width))
    return np.concatenate([_scalars(pixels / step, moved), _signed(moved)]).astype(np.float64)


def _scalars(pixels: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """`pixels` (P, H, W, 2) in steps of the grid, for gradients, and `moved` in units of `SIDE`, for speeds."""
    speed = np.linalg.norm(moved, axis=-1)
    frame = speed.mean(axis=(1, 2))
    change = np.linalg.norm(np.diff(moved, axis=0), axis=-1)
    second = np.linalg.norm(np.diff(moved, n=2, axis=0), axis=-1)
    right, down = np.diff(pixels, axis=2)[:, :-1], np.diff(pixels, axis=1)[:, :, :-1]
    gradients = (
        np.abs(right[..., 0] + down[..., 1]).mean(),
        np.abs(right[..., 1] - down[..., 0]).mean(),
        np.sqrt((right**2).sum(-1) + (down**2).sum(-1)).mean(),
    )
    speeds = (
        speed.mean(),
        np.quantile(speed, 0.5),
        np.quantile(speed, 0.95),
        speed.std(axis=(1, 2)).mean(),
        change.mean(),
        np.quantile(change, 0.95),
        np.abs(np.diff(frame)).mean(),
        second.mean(),
    )
    over_time = np.log1p(np.array([frame.std(), frame.min(), frame.max()]) / SPEED)
    logs = np.log1p(np.array(speeds) / SPEED)
    angle = (np.arctan2(moved[..., 1], moved[..., 0]) / (2 * np.pi) + 0.5) * DIRECTIONS
    # Weighted by speed, so that the direction of what stands still does not count.
    turns = np.bincount((angle.astype(int) % DIRECTIONS).ravel(), speed.ravel().astype(float), DIRECTIONS)
    rates = np.histogram(speed, SPEEDS)[0] / speed.size
    return np.concatenate(
        [
            logs,
            [logs[4] - logs[0]],
            np.log1p(np.array(gradients) / GRADIENT),
            over_time,
            [(frame < SPEED).mean(), _entropy(turns / speed.size + SPEED), _entropy(rates)],
        ]
    )


def _signed(moved: np.ndarray) -> np.ndarray:
    """Mean flow in halves of the clip and quarters of the frame, compressed by sign(v) log(1 + |v| / s): (16,)."""
    halves = np.array_split(moved, 2)
    means = [
        quarter.mean(axis=(0, 1, 2))
        for half in halves
        for band in np.array_split(half, 2, axis=1)
        for quarter in np.array_split(band, 2, axis=2)
    ]
    values = np.concatenate(means)
    return np.sign(values) * np.log1p(np.abs(values) / SPEED)


def _entropy(weights: np.ndarray) -> float:
    """In nats, of weights that need not sum to 1."""
    share = weights[weights > 0] / weights.sum()
    return float(-(share * np.log(share)).sum())

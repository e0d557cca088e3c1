"""What the distribution metrics see and what they are blind to, on clips of the world."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from vivace.evaluation import efficientnet, two_sample
from vivace.evaluation.damage import DAMAGES
from vivace.evaluation.frames import FrameError
from vivace.evaluation.metrics.base import Context, SetValue, registry
from vivace.evaluation.metrics.frame_mmd import FrameMmd, pooled
from vivace.evaluation.metrics.motion_energy import SCALARS, SIGNED, MotionEnergy, row
from vivace.evaluation.metrics.trajectory_mmd import TrajectoryMmd, path
from vivace.evaluation.metrics.verifier_distance import VerifierDistance
from vivace.world import Attributes, render, sample_scenes

COUNT, FRAMES, SIDE = 24, 8, 64
needs_weights = pytest.mark.skipif(bool(efficientnet.missing()), reason=efficientnet.missing() or "here")
IN_TIME = ("freeze", "stutter", "shuffle", "reverse")
"""Damages that only choose frames."""


def clips_of(seeds, wanted=None, frames: int = FRAMES, side: int = SIDE) -> torch.Tensor:
    scenes = sample_scenes(list(seeds), wanted)
    return render(scenes, frames=frames, height=side, width=side, with_mask=False).video


@cache
def clips(kind: str) -> torch.Tensor:
    """The clips of an exact run, of the same prompts with other seeds, or of a damaged run."""
    if kind == "clean":
        return clips_of(range(COUNT))
    if kind == "other seed":
        return clips_of(range(900, 900 + COUNT), [s.attributes for s in sample_scenes(list(range(COUNT)))])
    return DAMAGES[kind](clips("clean"))


@cache
def frames_of(kind: str) -> np.ndarray:
    """Features of all frames; at 64 pixels, for speed. What chooses frames chooses features."""
    if kind in IN_TIME:
        numbers = torch.arange(FRAMES, dtype=torch.uint8)[None, :, None, None, None].expand(
            1, FRAMES, 1, 1, 3
        )
        return frames_of("clean")[:, DAMAGES[kind](numbers)[0, :, 0, 0, 0].long().numpy()]
    return efficientnet.features(clips(kind).float() / 255, side=SIDE).double().numpy()


@cache
def motion_of(kind: str) -> np.ndarray:
    return MotionEnergy().features(clips(kind), Context())


def chance(found: SetValue) -> float:
    assert found.p is not None
    return found.p


def frame(kind: str) -> SetValue:
    tables = (pooled(frames_of(k)) for k in ("clean", kind))
    return FrameMmd().distance(*tables, groups=range(COUNT))["frame_mmd"]


def trajectory(kind: str) -> SetValue:
    tables = (path(frames_of(k)) for k in ("clean", kind))
    return TrajectoryMmd().distance(*tables, groups=range(COUNT))["trajectory_mmd"]


def motion(kind: str) -> SetValue:
    return MotionEnergy().distance(motion_of("clean"), motion_of(kind), range(COUNT))["motion_energy"]


@pytest.mark.parametrize(
    "measure",
    [pytest.param(frame, marks=needs_weights), pytest.param(trajectory, marks=needs_weights), motion],
)
def test_other_seeds_of_the_same_prompts_are_not_told_apart(measure) -> None:
    found = measure("other seed")
    assert found.low <= 0 <= found.high
    assert chance(found) > 0.05


@needs_weights
@pytest.mark.parametrize("kind", ["blur", "noise"])
def test_damaged_frames_are_seen_in_frames(kind) -> None:
    found = frame(kind)
    assert chance(found) == pytest.approx(0.001)
    assert found.low > 3 * frame("other seed").high


@needs_weights
@pytest.mark.parametrize("kind", [*IN_TIME, "flicker"])
def test_frames_one_by_one_are_blind_to_time(kind) -> None:
    # A freeze keeps one frame of each clip, which is a frame of the set. p may be small, since the pairs are alike.
    assert frame(kind).value < 0.1 * frame("blur").value


@needs_weights
@pytest.mark.parametrize("kind", ["freeze", "stutter", "shuffle", "flicker"])
def test_damage_in_time_is_seen_in_trajectories(kind) -> None:
    found = trajectory(kind)
    assert chance(found) == pytest.approx(0.001)
    assert found.low > trajectory("other seed").high


@pytest.mark.parametrize("kind", ["freeze", "stutter", "shuffle", "flicker"])
def test_damage_in_time_is_seen_in_motion(kind) -> None:
    found = motion(kind)
    assert chance(found) == pytest.approx(0.001)
    assert found.low > 5 * motion("other seed").high


def test_blur_is_not_seen_in_motion() -> None:
    assert motion("blur").value < 0.02 * motion("flicker").value


@needs_weights
def test_trajectories_and_frames_are_blind_to_reversal() -> None:
    assert trajectory("reverse").value == pytest.approx(0.0, abs=1e-9)
    assert frame("reverse").value == pytest.approx(0.0, abs=1e-9)


def test_reversal_is_seen_by_signed_motion_alone() -> None:
    """Everything slides to the right or comes nearer, so the set has a direction."""
    wanted = [Attributes(motion=m, camera="static") for m in ("slide_right", "approach")] * 8
    exact = clips_of(range(16), wanted)
    tables = [MotionEnergy().features(c, Context()) for c in (exact, DAMAGES["reverse"](exact))]
    found = MotionEnergy().distance(*tables, groups=range(16))
    assert set(found) == {"motion_energy", "motion_energy_signed"}  # one clip for each prompt
    assert found["motion_energy_signed"].p == pytest.approx(0.001)
    assert found["motion_energy_signed"].low > 0
    assert found["motion_energy"].low <= 0  # a search for flow is not quite the same backwards
    assert found["motion_energy"].value < 0.01 * found["motion_energy_signed"].value


def test_directions_that_balance_are_seen_within_prompts() -> None:
    wanted = [
        Attributes(motion=m, camera="static") for m in ("slide_right", "slide_left") for _ in range(2)
    ] * 6
    exact = clips_of(range(24), wanted)
    groups = [i // 2 for i in range(24)]
    tables = [MotionEnergy().features(c, Context()) for c in (exact, DAMAGES["reverse"](exact))]
    found = MotionEnergy().distance(*tables, groups=groups)
    within, over_all = found["motion_energy_by_prompt"], found["motion_energy_signed"]
    assert within.low > 0
    assert within.p == pytest.approx(0.001)
    assert over_all.low <= 0
    assert within.value > 3 * over_all.value


def test_motion_scalars_of_a_known_flow() -> None:
    """A plane that moves 2 pixels to the right, and zooms by 1 % of the distance from the corner, on 128 pixels."""
    y, x = np.meshgrid(np.arange(128.0), np.arange(128.0), indexing="ij")
    field = np.stack([2.0 + 0.01 * x, 0.01 * y], axis=-1)
    values = row(np.repeat(field[None], 5, axis=0).astype(np.float32))
    assert values.shape == (len(SCALARS) + SIGNED,)
    named = dict(zip(SCALARS, values, strict=False))
    speed = 2 * np.hypot(field[..., 0], field[..., 1])  # a frame of 256 pixels has twice the pixels
    assert named["mean speed"] == pytest.approx(np.log1p(speed.mean() / 0.1), rel=1e-5)
    assert named["divergence"] == pytest.approx(np.log1p(0.02 / 0.02), rel=1e-4)
    assert named["curl"] == pytest.approx(0.0, abs=1e-4)
    for name in (
        "mean change of flow",
        "mean second change of flow",
        "spread of speed over time",
        "share of still frames",
    ):
        assert named[name] == pytest.approx(0.0, abs=1e-4)
    right = 2 * field[:64, :64, 0].mean()
    assert values[len(SCALARS)] == pytest.approx(np.log1p(right / 0.1), rel=1e-5)
    turned = row(np.repeat(-field[None], 5, axis=0).astype(np.float32))
    assert turned[: len(SCALARS)] == pytest.approx(values[: len(SCALARS)], abs=1e-4)
    assert turned[len(SCALARS) :] == pytest.approx(-values[len(SCALARS) :], abs=1e-4)


def test_the_grid_of_the_flow_does_not_matter() -> None:
    """The same motion on a frame of 512 pixels, which is thinned to every second one."""
    y, x = np.meshgrid(np.arange(128.0), np.arange(128.0), indexing="ij")
    y4, x4 = np.meshgrid(np.arange(512.0) / 4, np.arange(512.0) / 4, indexing="ij")
    small, large = (np.stack([2 + np.sin(b / 40), np.cos(a / 40)], axis=-1) for a, b in ((x, y), (x4, y4)))
    fields = [np.stack([k * f for k in (1.0, 1.5, 1.2, 0.7)]) for f in (small, 4 * large)]
    one, two = (row(f.astype(np.float32)) for f in fields)
    assert two == pytest.approx(one, abs=0.03)


def test_the_verifier_sees_wrong_things_and_not_other_seeds() -> None:
    scenes = [s.attributes for s in sample_scenes(list(range(10)))]
    exact, other = (clips_of(range(k, k + 10), scenes, frames=9) for k in (0, 500))
    metric = VerifierDistance()
    sets = {"exact": exact, "other": other, "wrong_colour": DAMAGES["wrong_colour"](exact)}
    tables = {name: metric.features(c, Context()) for name, c in sets.items()}
    for series in ("verifier_mmd", "verifier_energy"):
        same = metric.distance(tables["exact"], tables["other"], range(10))[series]
        wrong = metric.distance(tables["exact"], tables["wrong_colour"], range(10))[series]
        assert chance(same) > 0.05
        assert chance(wrong) <= 0.01
        assert wrong.value > max(same.value, same.high)


@pytest.mark.parametrize(
    ("name", "frames", "side"),
    [
        pytest.param("frame_mmd", 2, 32, marks=needs_weights),
        pytest.param("trajectory_mmd", 3, 32, marks=needs_weights),
        ("motion_energy", 5, 48),
        ("verifier_distance", 9, 32),
    ],
)
def test_three_shards_are_one(name, frames, side) -> None:
    batch = clips_of(range(4), frames=frames, side=side)
    whole = registry[name]().features(batch, Context())
    parts = [registry[name]().features(batch[rows], Context()) for rows in ([0], [1, 2], [3])]
    assert np.array_equal(np.concatenate(parts), whole)
    assert whole.dtype == np.float64


@pytest.mark.parametrize(
    ("name", "least"), [pytest.param("trajectory_mmd", 3, marks=needs_weights), ("motion_energy", 4)]
)
def test_clips_too_short_for_a_change_are_refused(name, least) -> None:
    with pytest.raises(FrameError, match=f"needs clips of {least} frames or more"):
        registry[name]().features(torch.zeros(1, least - 1, 32, 32, 3), Context())


def test_a_scale_from_one_set_finds_differences_that_are_not_there() -> None:
    """Why the scales are fixed: 16 prompts, many features, nothing between the sets."""
    rng = np.random.default_rng(0)
    own, fixed = [], []
    for k in range(100):
        x, y = rng.normal(size=(2, 16, 200))
        for found, scale in ((own, (x.mean(0), x.std(0))), (fixed, (0.0, 1.0))):
            h = two_sample.pairs(
                (x - scale[0]) / scale[1], (y - scale[0]) / scale[1], two_sample.distance_kernel
            )
            found.append(chance(two_sample.compare_sets(h, np.arange(16), k, draws=2, flips=99)) <= 0.05)
    assert np.mean(fixed) < 0.1
    assert np.mean(own) > 0.2

"""Metrics of one clip alone, against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from vivace.core.errors import ConfigError, ShapeError, UnavailableError, WeightsError
from vivace.evaluation import flow as flows
from vivace.evaluation import weights
from vivace.evaluation.frames import FrameError
from vivace.evaluation.metrics import attributes as attributes_module
from vivace.evaluation.metrics.attributes import ATTRIBUTES, Attributes
from vivace.evaluation.metrics.base import Context, Metric, SampleMetric
from vivace.evaluation.metrics.drift import Drift, lab
from vivace.evaluation.metrics.dynamic_degree import DynamicDegree, fastest, is_dynamic, thinned
from vivace.evaluation.metrics.flicker import Flicker, temporal_flickering
from vivace.evaluation.metrics.frozen import Frozen
from vivace.evaluation.metrics.sharpness import Sharpness
from vivace.evaluation.metrics.subject_consistency import SubjectConsistency, consistency, identity_drift
from vivace.evaluation.metrics.vbench_like import VBenchLike, VBenchLikeSubject, motion_smoothness
from vivace.evaluation.metrics.warp_error import WarpError
from vivace.world import caption, render, sample_scenes
from vivace.world.splits import VALIDATION

PLAIN: tuple[type[SampleMetric], ...] = (
    DynamicDegree,
    WarpError,
    Flicker,
    Frozen,
    Sharpness,
    Drift,
    VBenchLike,
)
"""Those that need neither prompt nor network."""


def levels(*values: float, side: int = 16) -> torch.Tensor:
    """A grey clip (1, T, side, side, 3), one level of 255 a frame."""
    frames = torch.tensor(values, dtype=torch.float32) / 255.0
    return frames.reshape(1, -1, 1, 1, 1).expand(1, len(values), side, side, 3).contiguous()


def measure(metric: type[Metric], clips: Any, **context: Any) -> dict[str, list[float]]:
    return metric().measure(clips, Context(**context))


def same(one: dict[str, list[float]], two: dict[str, list[float]]) -> bool:
    return one.keys() == two.keys() and all(
        one[k] == pytest.approx(two[k], abs=1e-9, nan_ok=True) for k in two
    )


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    """Three renders of the world, uint8 (3, 9, 64, 64, 3)."""
    return render(sample_scenes(VALIDATION[:3]), frames=9, height=64, width=64, supersample=1).video


@pytest.mark.parametrize("metric", PLAIN)
def test_a_clip_has_one_value_whatever_lies_beside_it_and_however_it_is_stored(metric, clips) -> None:
    whole = measure(metric, clips)
    assert set(whole) == {s.name for s in metric.card.series}
    parts = [measure(metric, clips[i : i + 1]) for i in range(3)]
    assert whole == {name: [p[name][0] for p in parts] for name in whole}
    assert same(measure(metric, clips.float() / 255.0), whole)
    for series in metric.card.series:
        low, high = series.low, series.high
        for value in whole[series.name]:
            assert math.isfinite(value)
            assert low is None or value >= low
            assert high is None or value <= high


@pytest.mark.parametrize("metric", PLAIN)
def test_one_frame_has_no_motion(metric, clips) -> None:
    values = measure(metric, clips[:, :1])
    still = {"sharpness", "clipped"}
    assert {name for name, v in values.items() if not math.isnan(v[0])} == still & set(values)


@pytest.mark.parametrize("metric", PLAIN)
def test_a_wrong_range_is_refused(metric) -> None:
    with pytest.raises(FrameError, match="wanted"):
        measure(metric, levels(10, 20, 30, 40) * 255.0)


# -- one by one ---------------------------------------------------------------------------------------------------


def test_flicker_is_the_second_difference_of_brightness() -> None:
    assert measure(Flicker, levels(10, 20, 30, 40))["flicker"] == pytest.approx([0.0], abs=1e-4)
    # |100 - 2 * 120 + 100| = 40 at the peak and |120 - 2 * 100 + 120| = 40 in the valley.
    assert measure(Flicker, levels(100, 120, 100, 120))["flicker"] == pytest.approx([40.0], abs=1e-4)
    green = torch.zeros(1, 3, 4, 4, 3)
    green[:, 1, ..., 1] = 1.0
    assert measure(Flicker, green)["flicker"] == pytest.approx([2 * 0.587 * 255.0], abs=1e-4)


def test_vbench_flicker_is_the_mean_step() -> None:
    assert temporal_flickering(levels(0, 51, 51)[0]) == pytest.approx(1.0 - 0.2 / 2)
    assert measure(Flicker, levels(0, 51, 51))["vbench_flicker"] == pytest.approx([0.9])
    assert measure(VBenchLike, levels(0, 51, 51))["like_temporal_flickering"] == pytest.approx([0.9])


def test_frozen_and_duplicate_frames_are_counted() -> None:
    values = measure(Frozen, levels(10, 10, 10.2, 12, 12))
    assert values == {"frozen": [0.75], "duplicates": [0.75]}
    # One pixel of 256 moved by 20 levels: hardly a change, but no duplicate.
    clip = levels(10, 10)
    clip[0, 1, 0, 0] = 30.0 / 255.0
    assert measure(Frozen, clip) == {"frozen": [1.0], "duplicates": [0.0]}


def test_sharpness_of_a_checkerboard_and_of_a_ramp() -> None:
    board = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(8, 8) * (10.0 / 255.0)
    clip = board.reshape(1, 1, 16, 16, 1).expand(1, 2, 16, 16, 3)
    assert measure(Sharpness, clip)["sharpness"] == pytest.approx([40.0], abs=1e-4)
    ramp = (torch.arange(16.0) / 255.0).reshape(1, 1, 1, 16, 1).expand(1, 2, 16, 16, 3)
    assert measure(Sharpness, ramp)["sharpness"] == pytest.approx([0.0], abs=1e-4)
    with pytest.raises(FrameError, match="3x3"):
        measure(Sharpness, torch.zeros(1, 1, 2, 9, 3))


def test_lab_of_known_colours() -> None:
    # CIE L*a*b* of the sRGB primaries and of mid grey, D65, as the standard's formulas give them.
    colours = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [119 / 255.0] * 3])
    wanted = [
        [100.0, 0.0, 0.0],
        [53.241, 80.092, 67.203],
        [87.735, -86.183, 83.179],
        [32.297, 79.188, -107.860],
        [0.0, 0.0, 0.0],
        [50.034, 0.0, 0.0],
    ]
    assert lab(colours).numpy() == pytest.approx(np.array(wanted), abs=0.02)


def test_drift_is_the_distance_of_the_quarters() -> None:
    clip = torch.zeros(1, 8, 4, 4, 3)
    clip[:, 6:, ..., 0] = 1.0  # black, then red
    values = measure(Drift, clip)
    assert values["colour_drift"] == pytest.approx([math.hypot(53.241, 80.092, 67.203)], abs=0.05)
    assert values["saturation_drift"] == pytest.approx([math.hypot(80.092, 67.203)], abs=0.05)
    assert values["clipped"] == [1.0]
    clip[:, 2:6] = 0.5  # the middle does not count
    assert measure(Drift, clip)["colour_drift"] == pytest.approx(values["colour_drift"])
    assert measure(Drift, clip)["clipped"] == [0.5]
    assert math.isnan(measure(Drift, clip[:, :3])["colour_drift"][0])


def test_dynamic_degree_follows_the_rule() -> None:
    # Side 128: a pair moves above 3 px. Of 29 frames round(29 / 4) = 7 pairs must move, of 16 frames 4.
    assert is_dynamic(np.array([3.1] * 7 + [0.0] * 21), 128) == 1.0
    assert is_dynamic(np.array([3.1] * 6 + [0.0] * 22), 128) == 0.0
    assert is_dynamic(np.array([3.0] * 28), 128) == 0.0
    assert is_dynamic(np.array([6.1] * 4 + [0.0] * 11), 256) == 1.0
    assert is_dynamic(np.array([6.1] * 3 + [0.0] * 12), 256) == 0.0
    assert math.isnan(is_dynamic(np.array([]), 128))


def test_only_the_fastest_pixels_count() -> None:
    flow = np.zeros((1, 1, 10, 20, 2), np.float32)
    flow[0, 0, 0, :10] = (3.0, 4.0)  # 10 of 200 pixels, 5 % of them
    assert fastest(flow) == pytest.approx(np.array([[5.0]]))
    flow[0, 0, 0, :5] = 0.0
    assert fastest(flow) == pytest.approx(np.array([[2.5]]))


@pytest.mark.parametrize(("fps", "left"), [(8, 16), (16, 8), (24, 6), (5, 16), (12, 8), (11, 16)])
def test_clips_are_thinned_to_about_eight_frames_a_second(fps: float, left: int) -> None:
    assert thinned(torch.zeros(1, 16, 2, 2, 3), fps).shape[1] == left


def test_magnitude_is_relative_to_the_side() -> None:
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((1, 3, 24, 24))).float()
    wide = torch.nn.functional.interpolate(coarse, (96, 96), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
    clip = torch.stack([wide[16:80, 16 - 2 * t : 80 - 2 * t] for t in range(4)])[None]
    values = measure(DynamicDegree, clip)
    assert values["flow_magnitude"] == pytest.approx([2.0 / 64 * 100], rel=0.05)
    assert values["dynamic_degree"] == [1.0]  # 2 px are above 6 * 64 / 256
    assert measure(DynamicDegree, clip, fps=16)["flow_magnitude"] == pytest.approx([4.0 / 64 * 100], rel=0.1)
    # What moves steadily is explained by its flow, and a frame left out is half way.
    assert measure(WarpError, clip)["warp_error"][0] < 1.0
    assert motion_smoothness(clip[0]) > 0.99
    assert motion_smoothness(clip[0, [0, 3, 1, 2]]) < 0.98


def test_warp_error_of_a_jump_in_brightness_is_the_jump() -> None:
    assert measure(WarpError, levels(10, 30, 10))["warp_error"] == pytest.approx([20.0], abs=1e-3)


def test_motion_smoothness_leaves_out_every_second_frame() -> None:
    # Frames 1 and 3 lie 5 and 15 levels off the mean of their neighbours; an even tail has nothing on its far side.
    clip = levels(0, 15, 20, 45, 40, 200)[0]
    assert motion_smoothness(clip) == pytest.approx(1.0 - (5 + 15) / 2 / 255, abs=1e-4)
    assert math.isnan(motion_smoothness(clip[:2]))


def test_consistency_by_hand() -> None:
    features = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 1.0], [-1.0, 0.0]])
    # Cosines to the frame before: 0, 1, 0; to the first: 0, 0, -1, which counts as 0.
    assert consistency(features) == pytest.approx(1.0 / 6.0)
    assert identity_drift(features) == pytest.approx(2.0)
    assert identity_drift(features[[0, 1, 2, 0]]) == pytest.approx(0.0)
    assert consistency(features[[0, 0, 0]]) == 1.0
    assert math.isnan(consistency(features[:1]))
    assert math.isnan(identity_drift(features[:3]))


# -- with weights -------------------------------------------------------------------------------------------------


def test_subject_consistency_on_the_network(clips) -> None:
    if why := weights.missing("efficientnet_lite0"):
        pytest.skip(why)
    two = clips[:2, :4]
    values = measure(SubjectConsistency, two)
    assert all(0.5 < v < 1.0 for v in values["subject_consistency"])
    assert measure(SubjectConsistency, two[1:])["subject_consistency"] == values["subject_consistency"][1:]
    assert measure(VBenchLikeSubject, two.float() / 255.0)["like_subject_consistency"] == pytest.approx(
        values["subject_consistency"], abs=1e-6
    )


@pytest.mark.parametrize("metric", [SubjectConsistency, VBenchLikeSubject])
def test_without_weights_there_is_a_reason_and_no_number(metric, tmp_path, monkeypatch, clips) -> None:
    monkeypatch.setenv("VIVACE_CACHE", str(tmp_path))
    assert weights.COMMAND in metric().missing()
    with pytest.raises(UnavailableError, match="efficientnet_lite0"):
        measure(metric, clips)


@pytest.mark.parametrize("metric", [DynamicDegree, WarpError, VBenchLike])
def test_without_opencv_there_is_a_reason_and_no_number(metric, monkeypatch, clips) -> None:
    monkeypatch.setattr(flows.importlib.util, "find_spec", lambda name: None)
    assert "cv2" in metric().missing()
    with pytest.raises(UnavailableError, match="pip install"):
        measure(metric, clips)


# -- attributes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told() -> tuple[torch.Tensor, tuple[str, ...]]:
    """Three clips of the world at 128 pixels and their captions."""
    scenes = sample_scenes(VALIDATION[:3])
    video = render(scenes, frames=16, height=128, width=128, supersample=1).video
    return video, tuple(caption(s.attributes, s.seed) for s in scenes)


def test_attributes_are_those_that_the_prompt_states(told) -> None:
    video, prompts = told
    values = measure(Attributes, video, prompts=prompts)
    assert values["attributes"] == pytest.approx([1.0] * 3, abs=0.2)
    for i in range(3):
        stated = [v for n in ATTRIBUTES if not math.isnan(v := values[f"attribute_{n}"][i])]
        assert values["attributes"][i] == pytest.approx(sum(stated) / len(stated))
        assert values["all_attributes"][i] == float(all(stated))
    alone = measure(Attributes, video[1:2].float() / 255.0, prompts=prompts[1:2])
    assert same(alone, {name: v[1:2] for name, v in values.items()})


def test_what_is_not_said_has_no_value_and_what_is_wrong_has_zero(told) -> None:
    video = told[0][:1].expand(3, -1, -1, -1, -1)
    seen = Attributes()._load().verify(video[:1])[0]
    other = "grass" if seen.floor != "grass" else "sand"
    prompts = ("a symphony in D", f"on {other}", f"on a {seen.floor} floor")
    values = measure(Attributes, video, prompts=prompts)
    assert [math.isnan(v) for v in values["attributes"]] == [True, False, False]
    assert values["attribute_floor"][1] == values["attributes"][1] == values["all_attributes"][1] == 0.0
    assert math.isnan(values["attribute_motion"][1])
    assert all(math.isnan(v[0]) for v in values.values())


def test_attributes_say_what_they_need(told, tmp_path, monkeypatch) -> None:
    video, prompts = told
    with pytest.raises(ConfigError, match="one prompt a clip"):
        measure(Attributes, video, prompts=prompts[:2])
    with pytest.raises(ShapeError, match="square"):
        measure(Attributes, video[:, :, :64], prompts=prompts)
    bad = tmp_path / "verifier.safetensors"
    monkeypatch.setattr(attributes_module, "WEIGHTS", bad)
    assert "missing" in Attributes().missing()
    bad.write_bytes(b"no weights")
    assert "damaged" in Attributes().missing()
    with pytest.raises(UnavailableError, match="damaged"):
        measure(Attributes, video, prompts=prompts)
    with pytest.raises(WeightsError):
        Attributes()._load()


def test_the_card_names_the_packaged_verifier() -> None:
    import hashlib

    from vivace.world.verifier import WEIGHTS

    assert WEIGHTS.resolve() == attributes_module.WEIGHTS.resolve()
    assert Attributes.card.backbone is not None
    assert Attributes.card.backbone.sha256 == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()

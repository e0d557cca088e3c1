"""The renderer: deterministic, independent of the batch, and faithful to its own ground truth."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from vivace.core.errors import ConfigError, ShapeError
from vivace.world import (
    CAMERAS,
    COLOURS,
    FLOORS,
    MOTIONS,
    SHAPES,
    Attributes,
    ObjectSpec,
    Scene,
    render,
    sample_scene,
    sample_scenes,
)
from vivace.world.render import PALETTE

SMALL = {"frames": 9, "height": 64, "width": 64}


def _single(
    motion: str, shape: str = "cube", size: str = "large", camera: str = "static", colour: str = "red"
):
    return Attributes((ObjectSpec(shape, colour, size, "matte"),), motion, camera, "plain")


def _track(clip, number: int = 1):
    """Centroid x, y and pixel count of one object over the frames of the first clip."""
    here = (clip.index[0] == number).float()
    area = here.sum((1, 2))
    ys, xs = torch.arange(here.shape[1]).float(), torch.arange(here.shape[2]).float()
    return (here.sum(1) @ xs) / area, (here.sum(2) @ ys) / area, area


def test_a_scene_depends_on_its_seed_alone():
    many = sample_scenes(range(40))
    assert many[17] == sample_scene(17)
    assert many == sample_scenes(range(40))
    assert len({scene.attributes for scene in many}) > 30


def test_a_clip_has_the_same_bytes_in_any_batch():
    scenes = sample_scenes(range(9))
    together = render(scenes, **SMALL)
    again = render(scenes[::-1], **SMALL)
    assert torch.equal(together.video, again.video.flip(0))
    assert torch.equal(together.index, again.index.flip(0))
    for i in (0, 4, 8):
        alone = render([scenes[i]], **SMALL)
        assert torch.equal(alone.video[0], together.video[i])
        assert torch.equal(alone.mask[0], together.mask[i])


def test_a_scene_survives_json():
    for scene in sample_scenes(range(20)):
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene
    with pytest.raises(ConfigError, match="exactly these parameters"):
        Scene.from_json({"seed": 1})


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(1, 64, 64), (5, 32, 48), (12, 80, 64), (29, 128, 128)]
)
def test_any_number_of_frames_and_any_size(frames, height, width):
    clip = render(sample_scenes([1, 2]), frames=frames, height=height, width=width)
    assert clip.video.shape == (2, frames, height, width, 3)
    assert clip.video.dtype == torch.uint8
    assert clip.mask.shape == (2, frames, height, width)
    assert clip.mask.any()
    assert clip.video.float().std() > 10


def test_bad_sizes_and_missing_masks_are_refused():
    with pytest.raises(ShapeError, match="at least 1 frame"):
        render(sample_scenes([1]), frames=0)
    with pytest.raises(ConfigError, match="with_mask=True"):
        _ = render(sample_scenes([1]), frames=1, with_mask=False).mask
    assert render([], frames=2).video.shape == (0, 2, 128, 128, 3)


@pytest.mark.parametrize("colour", COLOURS)
def test_the_pixels_under_the_mask_have_the_named_colour(colour):
    scenes = [sample_scene(i, _single("still", shape, colour=colour)) for i, shape in enumerate(SHAPES)]
    clip = render(scenes, frames=2, height=96, width=96)
    for video, mask in zip(clip.video, clip.mask, strict=True):
        mean = video[mask].float().mean(0) / 255
        # The nearest palette entry in direction (hue and saturation), not in brightness.
        towards = {
            name: torch.cosine_similarity(mean, torch.tensor(value), dim=0) for name, value in PALETTE.items()
        }
        assert max(towards, key=towards.__getitem__) == colour


def test_every_object_is_visible_in_every_frame_and_none_is_cut_off():
    scenes = [scene for scene in sample_scenes(range(60)) if scene.attributes.count > 1][:16]
    clip = render(scenes, **SMALL)
    for scene, index in zip(scenes, clip.index, strict=True):
        for number in range(1, scene.attributes.count + 1):
            assert ((index == number).sum((1, 2)) >= 10).all(), scene.attributes


def test_small_and_large_are_clearly_apart():
    area = {}
    for size in ("small", "large"):
        scenes = [sample_scene(i, _single("still", shape, size)) for i, shape in enumerate(SHAPES)]
        area[size] = render(scenes, frames=1).mask.float().sum((1, 2, 3))
        across = render(scenes, frames=1).mask.any(3).float().sum((1, 2))  # their height
        assert across.min() >= 14
    assert (area["large"] / area["small"]).min() > 2.5


@pytest.mark.parametrize("shape", ["sphere", "torus"])
@pytest.mark.parametrize("motion", MOTIONS)
def test_motions_are_what_they_are_called(motion, shape):
    clip = render([sample_scene(5, _single(motion, shape))], frames=17, height=64, width=64)
    x, y, area = _track(clip)
    span_x, span_y = x.max() - x.min(), y.max() - y.min()
    if motion in ("slide_left", "slide_right"):
        sign = -1 if motion == "slide_left" else 1
        assert (sign * x.diff() > 0).all()
        assert span_x > 13
        assert span_y < 3
    elif motion == "bounce":
        assert span_y > 8
        assert span_x < 2
        assert y[4] < y[0] - 5
        assert y[8] > y[4] + 5
    elif motion == "circle":
        assert span_x > 10
        assert abs(x[0] - x[-1]) < 1
        assert area.max() > 1.15 * area.min()
    elif motion == "approach":
        assert area[-1] > 1.8 * area[0]
        assert y[-1] > y[0] + 5
    elif motion == "recede":
        assert area[0] > 1.8 * area[-1]
    else:
        assert span_x < 3
        assert span_y < 2


@pytest.mark.parametrize("shape", SHAPES)
def test_spinning_is_visible_on_every_shape_and_stillness_is_still(shape):
    spinning = render([sample_scene(3, _single("spin", shape))], frames=9, height=64, width=64)
    resting = render([sample_scene(3, _single("still", shape))], frames=9, height=64, width=64)
    change = (spinning.video[0, 1:].int() - spinning.video[0, :-1].int()).abs().float()
    both = spinning.mask[0, 1:] & spinning.mask[0, :-1]
    assert change[both].mean() > 8
    assert torch.equal(resting.video[0, 0], resting.video[0, -1])


def test_cameras_move_the_picture_as_they_are_called():
    def hills(camera: str):
        scene = sample_scene(11, _single("still", camera=camera))
        return render([scene], frames=9, height=64, width=64)

    start = {camera: _track(hills(camera)) for camera in CAMERAS}
    assert (start["pan_left"][0].diff() > 0).all()  # the camera turns left, the picture moves right
    assert (start["pan_right"][0].diff() < 0).all()
    assert start["zoom_in"][2][-1] > 1.8 * start["zoom_in"][2][0]
    assert start["zoom_out"][2][0] > 1.8 * start["zoom_out"][2][-1]
    assert start["static"][0].max() - start["static"][0].min() == 0
    first, last = (hills("orbit").video[0, i, :14].float() for i in (0, -1))
    assert (first - last).abs().mean() > 4  # the horizon wanders


def test_floors_differ():
    still = _single("still")
    scenes = [sample_scene(2, dataclasses.replace(still, floor=floor)) for floor in FLOORS]
    pictures = render(scenes, frames=1, height=64, width=64).video[:, 0, 40:].float()
    for i in range(len(FLOORS)):
        for j in range(i):
            assert (pictures[i] - pictures[j]).abs().mean() > 8


def test_wanted_attributes_are_kept_and_the_rest_is_sampled():
    wanted = Attributes((ObjectSpec("torus", "cyan"), ObjectSpec(colour="red")), motion="spin")
    scenes = sample_scenes(range(30), [wanted] * 30)
    for scene in scenes:
        assert scene.attributes.complete
        assert scene.attributes.objects[0].shape == "torus"
        assert [spec.colour for spec in scene.attributes.objects] == ["cyan", "red"]
        assert scene.attributes.objects[1].shape != "torus"
        assert scene.attributes.motion == "spin"
    assert {scene.attributes.floor for scene in scenes} == set(FLOORS)


def test_what_the_world_cannot_hold_is_refused_in_one_sentence():
    ball = ObjectSpec("sphere", "red")
    with pytest.raises(ConfigError, match="share the shape 'sphere'"):
        sample_scene(0, Attributes((ball, ObjectSpec("sphere", "blue"))))
    with pytest.raises(ConfigError, match="share the colour 'red'"):
        sample_scene(0, Attributes((ball, ObjectSpec("cube", "red"))))
    with pytest.raises(ConfigError, match="at most 3 objects"):
        sample_scene(0, Attributes(tuple(ObjectSpec(shape) for shape in SHAPES)))
    with pytest.raises(ConfigError, match="one for each seed"):
        sample_scenes([1, 2], [None])


def test_counts_follow_their_shares():
    counts = [scene.attributes.count for scene in sample_scenes(range(1500))]
    for count, share in ((1, 0.60), (2, 0.28), (3, 0.12)):
        assert abs(counts.count(count) / 1500 - share) < 0.05

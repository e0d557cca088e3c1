"""Captions and back: everything a caption says is read again, and no word falls outside the vocabulary."""

from __future__ import annotations

import pytest

from vivace.core.errors import ConfigError, UnknownNameError
from vivace.world import (
    Attributes,
    ObjectSpec,
    caption,
    parse_prompt,
    sample_scenes,
    unknown_words,
    vocabulary,
)
from vivace.world.captions import MAX_WORDS


@pytest.fixture(scope="module")
def pairs():
    scenes = sample_scenes(range(1500))
    return [(s.attributes, caption(s.attributes, seed)) for s in scenes for seed in (s.seed, s.seed + 10**6)]


def test_what_a_caption_says_is_read_back(pairs):
    for truth, text in pairs:
        read = parse_prompt(text)
        assert read.motion == truth.motion, text
        assert read.camera in (None, truth.camera), text
        assert read.floor in (None, truth.floor), text
        assert read.objects[0].shape == truth.objects[0].shape, text
        known = {spec.shape: spec for spec in truth.objects}
        assert {spec.shape for spec in read.objects} == set(known), text
        for spec in read.objects:
            said = known[spec.shape]
            assert spec.colour == said.colour, text
            assert spec.size in (None, said.size), text
            assert spec.material in (None, said.material), text


def test_full_captions_leave_out_only_a_static_camera_and_a_material(pairs):
    full = 0
    for truth, text in pairs:
        read = parse_prompt(text)
        sizes = [spec.size for spec in read.objects]
        full += None not in sizes and read.floor is not None and (read.camera or "static") == truth.camera
    assert 0.72 < full / len(pairs) < 0.85
    assert any(len(text.split()) <= 5 for _, text in pairs)


def test_captions_are_lower_case_short_and_varied(pairs):
    assert all(text == text.lower() and len(text.split()) <= MAX_WORDS for _, text in pairs)
    truth = pairs[0][0]
    assert caption(truth, 4) == caption(truth, 4)
    assert len({caption(truth, seed) for seed in range(50)}) > 20


def test_the_vocabulary_is_closed_and_used(pairs):
    words = vocabulary()
    assert list(words) == sorted(set(words))
    assert all(not unknown_words(text) for _, text in pairs)
    used = {word.strip(",") for _, text in pairs for word in text.split()}
    assert used == set(words)
    assert unknown_words("A red dragon, a RED dragon flies left!") == ["dragon", "flies"]


@pytest.mark.parametrize(
    ("text", "shape", "colour", "motion", "camera", "floor"),
    [
        ("a red sphere rolls left", "sphere", "red", "slide_left", None, None),
        ("A shiny violet ball, bouncing on the beach.", "sphere", "purple", "bounce", None, "sand"),
        ("zoom out from a spinning cyan donut", "torus", "cyan", "spin", "zoom_out", None),
        ("the camera pans right as a cone slides to the left", "cone", None, "slide_left", "pan_right", None),
        ("a white cube rolls towards the camera, static shot", "cube", "white", "approach", "static", None),
        ("a blue box moves away from the camera over stripes", "cube", "blue", "recede", None, "striped"),
        (
            "a green cylinder goes from left to right on a lawn",
            "cylinder",
            "green",
            "slide_right",
            None,
            "grass",
        ),
        (
            "a green cylinder does not move while the camera orbits",
            "cylinder",
            "green",
            "still",
            "orbit",
            None,
        ),
        ("a ring moves around in a circle on a grey floor", "torus", None, "circle", None, "plain"),
        ("a chequered floor", None, None, None, None, "checkered"),
        ("next to a red cube, a blue cone jumps", "cone", "blue", "bounce", None, None),
        ("", None, None, None, None, None),
    ],
)
def test_prompts_of_people_are_understood(text, shape, colour, motion, camera, floor):
    read = parse_prompt(text)
    assert (read.motion, read.camera, read.floor) == (motion, camera, floor)
    assert (read.objects[0].shape if read.objects else None) == shape
    assert (read.objects[0].colour if read.objects else None) == colour


def test_a_second_mention_is_not_a_second_object():
    read = parse_prompt(
        "a small red ball and a blue cube; the ball spins, the camera zooms in on the red ball"
    )
    assert read.objects == (ObjectSpec("sphere", "red", "small"), ObjectSpec("cube", "blue"))
    assert (read.motion, read.camera) == ("spin", "zoom_in")


def test_attributes_survive_json_and_refuse_what_is_not_in_the_world(pairs):
    for truth, _ in pairs[:50]:
        assert Attributes.from_json(truth.to_json()) == truth
    with pytest.raises(UnknownNameError, match="did you mean red"):
        ObjectSpec("cube", "redd")
    with pytest.raises(UnknownNameError, match="no motion"):
        Attributes(motion="explode")
    with pytest.raises(ConfigError, match="unknown attribute"):
        Attributes.from_json({"weather": "rain"})
    with pytest.raises(ConfigError, match="complete attributes"):
        caption(Attributes((ObjectSpec("cube", "red"),), "spin"), 0)

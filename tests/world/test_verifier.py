"""The verifier and its training: shapes, matching, loading, learning and going on after a kill."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from vivace.core.errors import ConfigError, ShapeError, WeightsError
from vivace.world import Attributes, ObjectSpec, contact_sheet, render, sample_scenes, write_png
from vivace.world.degrade import degrade
from vivace.world.splits import TEST, TRAIN, VALIDATION, train_seeds
from vivace.world.train_verifier import VerifierTraining, measure, train
from vivace.world.verifier import ATTRIBUTES, Prediction, Verifier, loss, resample, targets, to_places

SEEN = Prediction({"sphere": ("red", "small"), "cube": ("blue", "large")}, "spin", 2, "sand", "orbit")


def test_splits_are_disjoint():
    ranges = sorted((TRAIN, VALIDATION, TEST), key=lambda part: part.start)
    assert all(a.stop <= b.start for a, b in pairwise(ranges))
    assert all(seed in TRAIN for seed in train_seeds(TRAIN.stop - 3, 8, stream=5))


def test_only_what_is_wanted_is_compared():
    assert SEEN.matches(Attributes()) == {}
    assert SEEN.matches(Attributes(motion="spin", camera="static")) == {"motion": True, "camera": False}
    both = (ObjectSpec("cube", "blue", "large"), ObjectSpec("sphere", "red", "large"))
    assert SEEN.matches(Attributes(both)) == {"object": True, "colour": True, "size": False, "count": True}
    swapped = Attributes((ObjectSpec("cube", "red"), ObjectSpec("sphere", "blue")))
    assert SEEN.matches(swapped) == {"object": True, "colour": False, "count": True}
    assert SEEN.matches(Attributes((ObjectSpec("cone"),))) == {"object": False, "count": False}


def test_the_verifier_is_small_and_reads_any_clip_of_nine_frames_or_more():
    model = Verifier().eval()
    assert sum(p.numel() for p in model.parameters()) <= 1_300_000
    for frames, side in ((9, 64), (17, 128)):
        video = render(sample_scenes([3, 4]), frames=frames, height=side, width=side, with_mask=False).video
        seen = model.verify(video)
        assert len(seen) == 2
        assert set(seen[0].matches(sample_scenes([3])[0].attributes)) == set(ATTRIBUTES)
        assert model.features(video).shape == (2, 192)
        assert torch.allclose(model.features(video), model.features(video.float() / 255), atol=1e-5)
    with pytest.raises(ShapeError, match="at least 9 frames"):
        model.verify(video[:, :8])
    with pytest.raises(ShapeError, match="square clips"):
        model.verify(video[:, :, :64])


def test_weights_round_trip_and_damage_is_named(tmp_path):
    model = Verifier(12, 48).eval()
    path = model.save(tmp_path / "verifier.safetensors")
    again = Verifier.load(path)
    assert (again.frames, again.side) == (12, 48)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.bfloat16().float())
    with pytest.raises(WeightsError, match=r"nowhere\.safetensors are missing"):
        Verifier.load(tmp_path / "nowhere.safetensors")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"verifier\.safetensors are damaged"):
        Verifier.load(path)


def test_targets_name_the_right_classes():
    truth = Attributes((ObjectSpec("cube", "blue", "large", "matte"),), "spin", "orbit", "sand")
    wanted = targets([truth], torch.tensor([[[[0, 1]]]]))
    assert wanted["places"].tolist() == [[[[0, 1 + 8 + 2]]]]
    assert wanted["colour"].tolist() == [[8, 2, 8, 8, 8]]
    assert wanted["size"].tolist() == [[-100, 1, -100, -100, -100]]
    assert [wanted[name].item() for name in ("motion", "count", "floor", "camera")] == [3, 0, 3, 5]


def test_damage_is_seeded_bounded_and_mild():
    clip = render(sample_scenes(range(8)), frames=12, height=48, width=48)
    x = resample(clip.video, 12, 48)
    damaged, index = degrade(x, clip.index, seed=3)
    assert torch.equal(damaged, degrade(x, clip.index, seed=3)[0])
    assert not torch.equal(damaged, degrade(x, clip.index, seed=4)[0])
    assert index.dtype == torch.uint8
    assert (index != clip.index).float().mean() < 0.1
    assert abs((index > 0).sum() / clip.mask.sum() - 1) < 0.2
    assert damaged.shape == x.shape
    assert damaged.abs().max() <= 1
    assert 0 < (damaged - x).abs().mean() < 0.25


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    scenes = sample_scenes(range(8))
    clip = render(scenes, frames=12, height=48, width=48)
    x, model = resample(clip.video, 12, 48), Verifier(12, 48)
    places = to_places(clip.index, model(x)["places"])
    wanted = targets([scene.attributes for scene in scenes], places)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for _ in range(14):
        total, parts = loss(model(x), wanted)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append((float(total.detach()), parts))
    assert values[-1][0] < 0.75 * values[0][0]
    assert all(
        values[-1][1][head] < values[0][1][head] for head in ("colour", "motion", "floor", "camera", "places")
    )


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    config = VerifierTraining.tiny(steps=6, batch=4, held_out=4, reuse=2)
    whole = train(config, device="cpu", minutes=1, out=tmp_path / "whole")
    train(config, device="cpu", minutes=1, out=tmp_path / "parts", stop_after=3)
    assert not (tmp_path / "parts" / "verifier.json").exists()
    parts = train(config, device="cpu", minutes=1, out=tmp_path / "parts")
    weights = [tmp_path / name / "verifier.safetensors" for name in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert whole["steps"] == parts["steps"] == 6
    record = json.loads((tmp_path / "parts" / "verifier.json").read_text())
    assert set(record["held_out"]["test"]) == {*ATTRIBUTES, "mean"}
    assert measure(Verifier.load(weights[0]), TEST[:4], 12, 48) == record["held_out"]["test"]
    with pytest.raises(ConfigError, match="another config"):
        train(VerifierTraining.tiny(steps=7), device="cpu", minutes=1, out=tmp_path / "parts")


def test_contact_sheets_are_pictures(tmp_path):
    from PIL import Image

    video = render(sample_scenes([1, 2]), frames=5, height=32, width=48).video
    sheet = contact_sheet(video, columns=3, gap=1)
    assert sheet.shape == (2 * 33, 3 * 49, 3)
    with Image.open(write_png(sheet, tmp_path / "sheet.png")) as picture:
        assert picture.size == (3 * 49, 2 * 33)
        assert picture.getpixel((5, 5)) == tuple(sheet[5, 5].tolist())
    with pytest.raises(ShapeError, match="uint8 clips"):
        contact_sheet(video.float())

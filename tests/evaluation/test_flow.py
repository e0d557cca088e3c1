"""Optical flow against known displacements, and the warp that follows it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch

from vivace.core.errors import UnavailableError
from vivace.evaluation import flow as module
from vivace.evaluation.flow import luma, optical_flow, warp
from vivace.evaluation.frames import FrameError


def moving(dx: int, dy: int, frames: int = 3, side: int = 64, seed: int = 0) -> np.ndarray:
    """A smooth random texture that shifts by (dx, dy) pixels a frame, uint8 (1, T, H, W, 3)."""
    rng = np.random.default_rng(seed)
    wide = cv2.GaussianBlur(rng.random((side * 2, side * 2, 3)), (0, 0), 2.0)
    wide = (wide - wide.min()) / (wide.max() - wide.min()) * 255.0
    start = side // 2
    views = [wide[start - t * dy :, start - t * dx :][:side, :side] for t in range(frames)]
    return np.stack(views).round().astype(np.uint8)[None]


@pytest.mark.parametrize(("dx", "dy"), [(3, 0), (0, -2), (2, 4), (0, 0)])
def test_a_known_shift_is_found_with_its_sign(dx: int, dy: int) -> None:
    found = optical_flow(moving(dx, dy))
    assert found.shape == (1, 2, 64, 64, 2)
    assert found.dtype == np.float32
    inner = found[0, :, 12:-12, 12:-12]
    assert np.abs(inner - (dx, dy)).mean() < 0.1


def test_warping_the_next_frame_along_the_flow_gives_the_frame() -> None:
    clip = moving(3, 1)
    frames = torch.from_numpy(clip[0]).double() / 255.0
    back, inside = warp(frames[1:], torch.from_numpy(optical_flow(clip)[0]).double())
    assert 0.85 < float(inside.double().mean()) < 1.0
    moved = (frames[1:] - frames[:-1]).abs()[inside].mean()
    assert (back - frames[:-1]).abs()[inside].mean() < 0.05 * moved


def test_warp_of_whole_pixels_is_a_shift() -> None:
    frame = torch.arange(20.0).reshape(1, 4, 5, 1)
    out, inside = warp(frame, torch.tensor([1.0, 0.0]).expand(1, 4, 5, 2))
    assert torch.equal(out[0, :, :-1], frame[0, :, 1:])
    assert inside[0].tolist() == [[True, True, True, True, False]] * 4


def test_a_clip_alone_and_in_a_batch_with_any_number_of_workers() -> None:
    clips = np.concatenate([moving(1, 0, seed=1), moving(-2, 3, seed=2)])
    module._cache.clear()
    both = optical_flow(clips, workers=1)
    module._cache.clear()
    assert np.array_equal(optical_flow(clips[1:], workers=3), both[1:])
    module._cache.clear()
    with ThreadPoolExecutor(4) as pool:
        many = list(pool.map(optical_flow, [clips[i % 2 : i % 2 + 1] for i in range(8)]))
    assert all(np.array_equal(value[0], both[i % 2]) for i, value in enumerate(many))


def test_a_flow_does_not_depend_on_smaller_clips_before_it() -> None:
    clip, small = (
        moving(-2, 3, seed=2),
        np.random.default_rng(0).integers(0, 256, (1, 2, 16, 16, 3), np.uint8),
    )
    module._cache.clear()
    first = optical_flow(clip, workers=1)
    module._cache.clear()
    optical_flow(small, workers=1)
    assert np.array_equal(optical_flow(clip, workers=1), first)


def test_uint8_and_float_give_the_same_bytes() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (1, 2, 32, 32, 3), dtype=np.uint8)
    as_float = torch.from_numpy(clip).float() / 255.0
    assert np.array_equal(luma(clip), luma(as_float))
    assert np.array_equal(optical_flow(clip), optical_flow(as_float))


def test_luma_of_the_primaries() -> None:
    clip = np.zeros((1, 4, 1, 1, 3), np.uint8)
    clip[0, 0, ..., 0] = clip[0, 1, ..., 1] = clip[0, 2, ..., 2] = 255
    clip[0, 3] = 255
    assert luma(clip).ravel().tolist() == [76, 150, 29, 255]


def test_the_cache_answers_and_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = moving(1, 1)
    module._cache.clear()
    first = optical_flow(clip)
    monkeypatch.setattr(module, "_pair", None)  # a second search would fail
    assert np.array_equal(optical_flow(clip), first)
    monkeypatch.undo()
    monkeypatch.setattr(module, "CACHE_BYTES", first.nbytes)
    optical_flow(moving(2, 1))
    assert len(module._cache) == 1


def test_one_frame_has_no_flow_and_small_frames_are_refused() -> None:
    assert optical_flow(np.zeros((1, 1, 32, 32, 3), np.uint8)).shape == (1, 0, 32, 32, 2)
    with pytest.raises(FrameError, match="at least 16x16"):
        optical_flow(np.zeros((1, 2, 15, 32, 3), np.uint8))


def test_without_opencv_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="pip install"):
        optical_flow(moving(1, 0))

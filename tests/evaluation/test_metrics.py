"""Frame metrics against values worked out by hand and against a slow, separate SSIM."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vivace.core.errors import WeightsError
from vivace.evaluation.frames import FrameError, FrameMetric, unit_frames
from vivace.evaluation.metrics import lpips, psnr, ssim


def pair(frames: int = 4, height: int = 24, width: int = 28) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    exact = rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    noise = rng.normal(0, 12, exact.shape) * (1 + np.arange(frames))[:, None, None, None]
    return exact, (exact + noise).round().clip(0, 255).astype(np.uint8)


def slow_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Window by window, from the definition with centred moments; x and y are `(H, W, 3)` in [0, 1]."""
    grid = np.mgrid[-5:6, -5:6]
    weights = np.exp(-(grid**2).sum(axis=0) / (2 * 1.5**2))
    weights /= weights.sum()
    scores = []
    for channel in range(3):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                a = x[top : top + 11, left : left + 11, channel]
                b = y[top : top + 11, left : left + 11, channel]
                mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                var_a = (weights * (a - mean_a) ** 2).sum()
                var_b = (weights * (b - mean_b) ** 2).sum()
                cov = (weights * (a - mean_a) * (b - mean_b)).sum()
                top_term = (2 * mean_a * mean_b + 1e-4) * (2 * cov + 9e-4)
                scores.append(top_term / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    return float(np.mean(scores))


def test_psnr_of_known_offsets() -> None:
    black = np.zeros((2, 4, 4, 3), np.float32)
    other = black.copy()
    other[0] += 0.1  # MSE 0.01: 20 dB
    result = psnr(black, other)
    assert result.per_frame == pytest.approx((20.0, math.inf))
    assert result.pooled == pytest.approx(-10 * math.log10(0.005))
    assert (result.worst, result.unit, result.higher_is_better) == (0, "dB", True)


def test_psnr_of_uint8_does_not_wrap_around() -> None:
    low, high = np.full((1, 4, 4, 3), 10, np.uint8), np.full((1, 4, 4, 3), 250, np.uint8)
    assert psnr(low, high).pooled == pytest.approx(20 * math.log10(255 / 240))
    assert psnr(low, high).pooled == psnr(high, low).pooled


def test_psnr_is_pooled_by_error_not_by_decibel() -> None:
    exact, fast = pair()
    result = psnr(exact, fast)
    assert result.pooled is not None
    assert result.pooled < np.mean(result.per_frame) - 0.5
    assert result.worst == 3


def test_ssim_equals_the_definition() -> None:
    exact, fast = pair(2)
    result = ssim(exact, fast)
    wanted = [slow_ssim(a / 255.0, b / 255.0) for a, b in zip(exact, fast, strict=True)]
    assert result.per_frame == pytest.approx(wanted, abs=1e-10)
    assert result.pooled == pytest.approx(np.mean(wanted))
    assert result.worst == int(np.argmin(wanted))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_best_score_symmetry_and_monotony(metric) -> None:
    exact, fast = pair()
    best = metric(exact, exact)
    assert best.pooled == (math.inf if metric is psnr else pytest.approx(1.0))
    assert metric(exact, fast).pooled == pytest.approx(metric(fast, exact).pooled)
    assert list(metric(exact, fast).per_frame) == sorted(metric(exact, fast).per_frame, reverse=True)
    assert metric(exact, fast).version.startswith(f"{metric.__name__}@")


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_uint8_and_float_and_tensors_agree(metric) -> None:
    exact, fast = pair()
    whole = metric(exact, fast).per_frame
    assert metric(exact / 255.0, fast / 255.0).per_frame == pytest.approx(whole, abs=1e-12)
    assert metric((exact / 255.0).astype(np.float32), fast).per_frame == pytest.approx(whole, rel=1e-5)
    assert metric(torch.from_numpy(exact), torch.from_numpy(fast)).per_frame == whole


@pytest.mark.parametrize("metric", [psnr, ssim, lpips])
def test_wrong_ranges_shapes_and_types_are_refused(metric) -> None:
    exact, fast = pair()
    unit = exact / 255.0
    for bad, sentence in [
        (unit * 2 - 1, r"wanted \[0, 1\]"),
        (exact.astype(np.float32), r"wanted \[0, 1\]"),
        (exact.astype(np.int64), "uint8 or floating point"),
        (np.where(unit > 0.5, np.nan, unit), "NaN"),
        (exact[0], r"\(T, H, W, 3\)"),
        (exact.transpose(0, 3, 1, 2), r"\(T, H, W, 3\)"),
        (exact[:0], "nothing empty"),
        (exact[:, :20], "differ in shape"),
    ]:
        with pytest.raises(FrameError, match=sentence) as caught:
            metric(bad, fast)
        assert "\n" not in str(caught.value)


def test_rounding_dust_is_clipped_not_refused() -> None:
    values = unit_frames(np.array([-1e-6, 0.5, 1 + 1e-6]).reshape(1, 1, 1, 3))
    assert values.ravel().tolist() == [0.0, 0.5, 1.0]


def test_ssim_needs_a_whole_window() -> None:
    exact, fast = pair(1, 10, 40)
    with pytest.raises(FrameError, match="11x11"):
        ssim(exact, fast)


@pytest.fixture
def nothing_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIVACE_CACHE", str(tmp_path / "cache"))


def random_state() -> dict[str, torch.Tensor]:
    """An AlexNet-shaped backbone and heads with random numbers."""
    generator = torch.Generator().manual_seed(0)
    state, before = {}, 3
    for layer, width, kernel in ((0, 64, 11), (3, 192, 5), (6, 384, 3), (8, 256, 3), (10, 256, 3)):
        scale = (2 / (before * kernel**2)) ** 0.5
        shape = (width, before, kernel, kernel)
        state[f"features.{layer}.weight"] = scale * torch.randn(shape, generator=generator)
        state[f"features.{layer}.bias"] = torch.zeros(width)
        before = width
    for k, width in enumerate((64, 192, 384, 256, 256)):
        state[f"heads.{k}"] = torch.rand(width, generator=generator)
    return state


@pytest.mark.usefixtures("nothing_fetched")
def test_lpips_without_weights_is_a_reasoned_skip() -> None:
    result = lpips(*pair())
    assert result.skipped is not None
    assert result.skipped.startswith(
        "no backbone weights were given, and the weights lpips_alex are not here; run"
    )
    assert (result.per_frame, result.pooled, result.worst) == ((), None, None)
    assert result.higher_is_better is False


def test_lpips_with_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        lpips(*pair(), weights=tmp_path / "alexnet.pth")


@pytest.mark.usefixtures("nothing_fetched")
def test_lpips_without_heads_is_a_reasoned_skip(tmp_path: Path) -> None:
    state = {k: v for k, v in random_state().items() if k.startswith("features")}
    torch.save(state, tmp_path / "alexnet.pth")
    assert "no linear heads" in (lpips(*pair(), weights=tmp_path / "alexnet.pth").skipped or "")


@pytest.mark.usefixtures("nothing_fetched")
def test_lpips_with_a_file_runs_and_names_a_wrong_one(tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "alexnet.pth")
    exact, fast = pair(3, 64, 64)
    result = lpips(exact, fast, weights=tmp_path / "alexnet.pth", batch=2)
    assert lpips(exact, exact, weights=tmp_path / "alexnet.pth").pooled == pytest.approx(0, abs=1e-6)
    assert list(result.per_frame) == sorted(result.per_frame)
    assert len(result.per_frame) == 3
    whole = lpips(exact, fast, weights=tmp_path / "alexnet.pth", batch=8)
    assert whole.per_frame == pytest.approx(result.per_frame, rel=1e-5)
    torch.save({"heads.0": torch.zeros(64), "layer.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"has no features\.0\.weight"):
        lpips(exact, fast, weights=tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="of another network"):
        lpips(exact, fast, weights=tmp_path / "alexnet.pth", net="vgg")
    (tmp_path / "broken.pth").write_bytes(b"broken")
    with pytest.raises(WeightsError, match="cannot be read"):
        lpips(exact, fast, weights=tmp_path / "broken.pth")
    with pytest.raises(FrameError, match="31x31"):
        lpips(exact[:, :24], fast[:, :24], weights=tmp_path / "alexnet.pth")


def test_a_metric_has_values_or_a_reason() -> None:
    common = {"name": "m", "version": "m@1", "unit": "", "higher_is_better": True}
    with pytest.raises(ValueError, match="neither values nor a reason"):
        FrameMetric(**common)
    with pytest.raises(ValueError, match="must not carry values"):
        FrameMetric(**common, per_frame=(0.0,), pooled=0.0, worst=0, skipped="no package")

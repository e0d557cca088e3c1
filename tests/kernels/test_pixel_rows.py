"""Passes between a decoder's convolutions: against numpy by hand, and Triton against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.testing.interpreter import interpret

WHY = interpret()

from vivace.kernels.api import candidates  # noqa: E402
from vivace.kernels.pixel_rows.op import PixelRows  # noqa: E402
from vivace.kernels.pixel_rows.spec import OP  # noqa: E402

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(bool(WHY), reason=WHY or "runs"))]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, seed: int = 0, last: bool = True, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last_3d) if last and x.ndim == 5 else x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [3, 24, 96])
@pytest.mark.parametrize("frames", [0, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_norm_silu_by_hand(backend, channels, frames, biased) -> None:
    x, gain = draw(2, channels, 3, 5, 4, seed=1), draw(channels, seed=2)
    bias = draw(channels, seed=3) if biased else None
    past = draw(2, channels, frames, 5, 4, seed=4) if frames and biased else None
    x[0, :, 1, 2, 3] = 0.0
    got = PixelRows(backend).norm_silu(x, gain, bias, past, frames)
    y = x.double().cpu().numpy()
    if bias is not None:
        y = y + bias.double().cpu().numpy()[None, :, None, None, None]
    y = y / np.maximum(np.sqrt((y**2).sum(1, keepdims=True)), 1e-12)
    y = y * gain.double().cpu().numpy()[None, :, None, None, None]
    y = y / (1.0 + np.exp(-y))
    front = np.zeros((2, channels, frames, 5, 4)) if past is None else past.double().cpu().numpy()
    want = np.concatenate((front, y), 2)
    assert got.shape == want.shape
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    assert np.abs(got.double().cpu().numpy() - want).max() < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_are_added_in_place(backend, last, biased) -> None:
    y, beside = draw(1, 24, 2, 7, 3, seed=1), draw(1, 24, 2, 7, 3, seed=2, last=last)
    bias = draw(24, seed=3) if biased else None
    want = y.double() + beside.double() + (0.0 if bias is None else bias.double()[:, None, None, None])
    got = PixelRows(backend).add_rows(y, beside, bias)
    assert got.data_ptr() == y.data_ptr()
    assert (got.double() - want).abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_are_doubled_as_torch_does(backend) -> None:
    x = draw(2, 12, 3, 4, 5)
    want = torch.nn.functional.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest-exact")
    assert torch.equal(PixelRows(backend).double_pixels(x), want)


@pytest.mark.skipif(bool(WHY), reason=WHY or "runs")
@pytest.mark.parametrize("channels", [96, 200])
def test_triton_rounds_as_the_reference(channels) -> None:
    x, gain = draw(1, channels, 2, 6, 6, dtype=torch.bfloat16), draw(channels, seed=5, dtype=torch.bfloat16)
    a, b = (PixelRows(name).norm_silu(x, gain, None, None, 2) for name in ("reference", "triton"))
    assert ((a - b).abs() <= 2.0**-7 * a.abs()).all()
    assert (a != b).float().mean() < 0.01


def test_what_does_not_fit_is_refused() -> None:
    rows, x = PixelRows("reference"), draw(1, 8, 2, 3, 3)
    with pytest.raises(ValueError, match=r"gain must have the shape \(8,\)"):
        rows.norm_silu(x, torch.ones(7))
    with pytest.raises(ValueError, match="past must be"):
        rows.norm_silu(x, torch.ones(8), None, x, 1)
    with pytest.raises(ValueError, match="beside must be"):
        rows.add_rows(x, x[:, :, :1])
    with pytest.raises(ValueError, match=r"must be \(B, C, T, H, W\)"):
        rows.double_pixels(x[0])
    with pytest.raises(RuntimeError, match="no gradients"):
        rows.double_pixels(x.requires_grad_())


def test_fakes_have_the_shapes() -> None:
    x, gain = draw(1, 8, 2, 4, 4), torch.ones(8, device=DEVICE)
    torch.library.opcheck(torch.ops.vivace.norm_silu.default, (x, gain, None, None, 2, "reference"))
    torch.library.opcheck(torch.ops.vivace.add_rows.default, (x, x.clone(), gain, "reference"))
    torch.library.opcheck(torch.ops.vivace.double_pixels.default, (x, "reference"))


def test_the_interpreter_is_never_chosen_by_itself(monkeypatch) -> None:
    triton = next(c for c in candidates(OP) if c.name == "triton")
    assert triton.avoid({"device": "cpu", "channels": 8})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if not WHY:
        assert "5000 channels do not fit" in str(triton.refuse({"device": "cpu", "channels": 5000}))

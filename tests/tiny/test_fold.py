"""Folding changes the latents, not what they decode to."""

from __future__ import annotations

import pytest
import torch

from vivace.tiny.build import TinyConfig, build_vae
from vivace.tiny.train.fold import fold_latents
from vivace.tiny.whole_clip import decode_latents, encode_moments


@pytest.fixture
def vae():
    torch.manual_seed(0)
    vae = build_vae(TinyConfig(vae_dim=8, latent_channels=6)).eval()
    with torch.no_grad():  # one strong direction, one dead one, as training leaves them
        vae.quant_conv.weight[0] *= 40.0
        vae.quant_conv.weight[5] *= 1e-4
        vae.quant_conv.bias.add_(0.7)
    return vae


def clips(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 3, 9, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def test_reconstruction_is_unchanged(vae):
    video = clips(2, 1)
    before = vae.decode(vae.encode(video).latent_dist.mode()).sample
    fold_latents(vae, encode_moments(vae, clips(8, 2)))
    after = vae.decode(vae.encode(video).latent_dist.mode()).sample
    assert torch.allclose(before, after, atol=1e-4)


@torch.no_grad()
def test_latents_become_centred_uncorrelated_and_of_unit_power(vae):
    data = clips(8, 2)
    record = fold_latents(vae, encode_moments(vae, data), power=0.5, floor=1e-6)
    folded = encode_moments(vae, data)[:, :6].transpose(0, 1).flatten(1).double()
    assert folded.mean(dim=1).abs().max() < 1e-3
    covariance = torch.cov(folded, correction=0)
    assert covariance.trace().item() == pytest.approx(6.0, rel=1e-3)
    assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-2
    assert vae.config.latents_mean == [0.0] * 6
    assert vae.config.latents_std == [1.0] * 6
    assert record["variance_before"] == sorted(record["variance_before"], reverse=True)


@torch.no_grad()
def test_dead_directions_are_not_blown_up(vae):
    record = fold_latents(vae, encode_moments(vae, clips(8, 2)), power=0.5, floor=1e-3)
    assert record["deviation_after"][-1] < 0.05 * record["deviation_after"][0]


@torch.no_grad()
def test_posterior_noise_keeps_its_effect(vae):
    """The average error that posterior noise causes in pixels is about the same before and after."""

    def noise_error() -> float:
        mean, logvar = encode_moments(vae, clips(4, 3)).chunk(2, dim=1)
        noisy = mean + (0.5 * logvar).exp() * torch.randn(
            mean.shape, generator=torch.Generator().manual_seed(5)
        )
        return float((decode_latents(vae, noisy) - decode_latents(vae, mean)).square().mean())

    before = noise_error()
    fold_latents(vae, encode_moments(vae, clips(8, 2)))
    assert noise_error() == pytest.approx(before, rel=0.35)

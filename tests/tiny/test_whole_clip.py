"""The whole-clip passes equal the chunked passes of diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan

from vivace.core.errors import ShapeError
from vivace.tiny.build import TinyConfig, build_vae
from vivace.tiny.whole_clip import decode_latents, encode_moments


def wan21_vae() -> AutoencoderKLWan:
    """The other kind: no shortcuts around the levels, no pixel patches, one level that keeps the frame rate."""
    return AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def make_vae(kind: str) -> AutoencoderKLWan:
    torch.manual_seed(3)
    vae = wan21_vae() if kind == "wan2.1" else build_vae(TinyConfig(vae_dim=8, latent_channels=12))
    for name, parameter in vae.named_parameters():
        if "gamma" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return vae.eval().double()


@pytest.mark.parametrize("conv", ["direct", "stack"])
@pytest.mark.parametrize("frames", [1, 5, 9, 17, 29])
@pytest.mark.parametrize("kind", ["wan2.1", "wan2.2"])
def test_equals_the_chunked_path(kind, frames, conv):
    vae = make_vae(kind)
    video = torch.rand(2, 3, frames, 16, 24, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        chunked = vae.encode(video).latent_dist
        mean, logvar = encode_moments(vae, video, conv).chunk(2, dim=1)
        assert torch.allclose(mean, chunked.mean, atol=1e-10)
        assert torch.allclose(logvar.clamp(-30, 20), chunked.logvar, atol=1e-10)
        latents = torch.randn_like(mean)
        expected = vae.decode(latents).sample
        assert expected.shape == video.shape
        # 1e-6, not 1e-10: the class upsamples in fp32 whatever its dtype
        assert torch.allclose(decode_latents(vae, latents, conv), expected, atol=1e-6)


def test_both_convolutions_have_the_same_gradient():
    vae = make_vae("wan2.2")
    video = torch.rand(1, 3, 9, 16, 16, dtype=torch.float64) * 2 - 1
    gradients = []
    for conv in ("direct", "stack"):
        vae.zero_grad()
        mean = encode_moments(vae, video, conv)[:, :12]
        (decode_latents(vae, mean, conv, clamp=False) - video).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in vae.parameters()]))
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, atol=1e-10)


def test_the_modules_are_left_alone():
    vae = make_vae("wan2.2")
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in vae.named_modules()}
    with torch.no_grad():
        decode_latents(vae, encode_moments(vae, torch.zeros(1, 3, 5, 16, 16, dtype=torch.float64))[:, :12])
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in vae.named_modules()}


def test_frames_that_the_class_would_drop_are_refused():
    with pytest.raises(ShapeError, match="6 frames"):
        encode_moments(make_vae("wan2.2"), torch.zeros(1, 3, 6, 16, 16, dtype=torch.float64))

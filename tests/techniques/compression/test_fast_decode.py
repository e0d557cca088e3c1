"""Fast decoding gives the frames of the plain run on every VAE, says what it did, and leaves nothing behind."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from vivace.core.errors import PlanError
from vivace.models.vae_decode import DecodeOptions, VaeDecoder
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.compression.fast_decode import FastDecode
from vivace.techniques.compression.whole_clip_decode import WholeClipDecode
from vivace.testing.models import call, pipeline

OTHERS = ["cogvideox", "ltx", "hunyuan"]


def frames(name: str, plan: Plan, pipe=None, **changes):
    pipe = pipe or pipeline(name)
    with accelerate(pipe, plan) as fast:
        return fast("a red sphere", seed=3, **call(name) | changes)


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_same_frames_as_the_plain_run(name):
    want, got = frames(name, Plan()), frames(name, Plan([FastDecode(chunk=1, tile=2)]))
    assert np.abs(got.raw.frames - want.raw.frames).max() < 1e-5
    assert got.receipt.techniques[0].effects == {"clips": 1}
    (kernel,) = got.receipt.kernels
    assert kernel.choice == "fast+tiled"
    assert "1 latent frames, tiles of 2x2" in kernel.why


@pytest.mark.parametrize("name", OTHERS)
def test_other_vaes_get_what_is_generic(name):
    pipe = pipeline(name)
    got = frames(name, Plan([FastDecode(dtype="bfloat16")]), pipe, num_inference_steps=1)
    assert got.receipt.techniques[0].effects == {"clips": 1}
    assert got.receipt.kernels[0].choice == "fast+bfloat16"
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(2, pipe.vae.config.latent_channels, 2, 2, 2, generator=draw)
    low = copy.deepcopy(pipe.vae).to(torch.bfloat16)
    with torch.no_grad():
        want = pipe.vae.decode(z, return_dict=False)[0]
        lower = low.decode(z.bfloat16(), return_dict=False)[0]
    assert (VaeDecoder(pipe.vae, DecodeOptions(channels_last="on"))(z) - want).abs().max() < 1e-4
    assert (VaeDecoder(pipe.vae, DecodeOptions(slicing=True))(z) - want).abs().max() < 1e-4
    assert torch.equal(VaeDecoder(pipe.vae, DecodeOptions(dtype="bfloat16"))(z), lower.float())


@pytest.mark.parametrize("name", [pytest.param("cogvideox", marks=pytest.mark.slow), "ltx", "hunyuan"])
def test_other_vaes_have_compiled_blocks(name):
    vae = pipeline(name).vae
    channels = vae.config.latent_channels
    z = torch.randn(1, channels, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    decoder = VaeDecoder(vae, DecodeOptions(compile="default", backend="eager"))
    classes = {type(m) for m in vae.decoder.modules()}
    with torch.no_grad():
        want = vae.decode(z, return_dict=False)[0]
        assert (decoder(z) - want).abs().max() < 1e-5
        with torch.compiler.set_stance("fail_on_recompile"):
            decoder(z)
    compiled = [m for m in decoder._twin().decoder.modules() if m._compiled_call_impl is not None]
    assert len(compiled) > 1
    assert len({type(m) for m in compiled}) == 1
    assert {type(m) for m in vae.decoder.modules()} == classes
    assert all(m._compiled_call_impl is None for m in vae.decoder.modules())


@pytest.mark.parametrize("name", OTHERS)
def test_other_vaes_refuse_pieces_and_nothing_at_all(name):
    with pytest.raises(PlanError, match="only AutoencoderKLWan can be decoded in exact pieces"):
        frames(name, Plan([FastDecode(chunk=2)]))
    with pytest.raises(PlanError, match="nothing is left to change"):
        frames(name, Plan([FastDecode(channels_last="off")]))


def test_two_decoders_are_a_conflict():
    with pytest.raises(PlanError, match="decode"):
        frames("wan2.1", Plan([FastDecode(), WholeClipDecode()]))


def test_own_tiling_and_training_mode_stay_in_force():
    pipe = pipeline("wan2.1")
    pipe.vae.enable_tiling()
    out = frames("wan2.1", Plan([FastDecode()]), pipe)
    assert out.receipt.techniques[0].effects == {"plain_clips": 1}
    assert "tiling" in out.receipt.kernels[0].why
    pipe.vae.disable_tiling()
    pipe.vae.train()
    assert "training" in frames("wan2.1", Plan([FastDecode()]), pipe).receipt.kernels[0].why


def test_float16_that_overflows_is_decoded_as_usual():
    pipe = pipeline("wan2.1")
    with torch.no_grad():
        pipe.vae.decoder.conv_in.bias.fill_(1e5)
    want = frames("wan2.1", Plan(), pipe)
    got = frames("wan2.1", Plan([FastDecode(dtype="float16")]), pipe)
    assert np.array_equal(got.raw.frames, want.raw.frames)
    assert "use bfloat16" in got.receipt.kernels[0].why


def test_gradients_pass_through_the_plain_decoder():
    pipe = pipeline("wan2.1")
    z = torch.randn(1, 16, 1, 2, 2, requires_grad=True)
    with accelerate(pipe, Plan([FastDecode()])):
        pipe.vae.decode(z).sample.sum().backward()
    assert z.grad is not None


def test_return_dict_and_undo():
    pipe, z = pipeline("wan2.1"), torch.randn(1, 16, 2, 2, 2)
    with torch.no_grad():
        want = pipe.vae.decode(z).sample
        with accelerate(pipe, Plan([FastDecode(dtype="bfloat16")])):
            got = pipe.vae.decode(z).sample
            assert got.dtype == want.dtype
            assert 0.0 < (got - want).abs().max() < 0.05
            assert torch.equal(pipe.vae.decode(z, return_dict=False)[0], got)
            assert torch.equal(pipe.vae.decode(z, False)[0], got)
        assert torch.equal(pipe.vae.decode(z).sample, want)
    assert "decode" not in vars(pipe.vae)
    assert pipe.vae.dtype == torch.float32

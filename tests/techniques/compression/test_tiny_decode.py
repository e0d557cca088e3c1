"""The tiny decoder in a plan: it decodes, the receipt says so, and a file of another VAE is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.core.errors import PlanError
from vivace.models import tiny_decoder
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.compression.tiny_decode import TinyDecode
from vivace.testing.models import call, pipeline


@pytest.fixture
def file(tmp_path):
    vae = pipeline("wan2.1").vae
    torch.manual_seed(0)
    net = tiny_decoder.build("AutoencoderKLWan", vae.config, width=8, depth=1)
    return tiny_decoder.save(tmp_path / "tiny.safetensors", net, "AutoencoderKLWan", vae.config)


def test_frames_are_the_tiny_decoders(file):
    pipe = pipeline("wan2.1")
    z = torch.randn(1, 16, 2, 2, 2)
    with torch.no_grad():
        own = pipe.vae.decode(z).sample
        with accelerate(pipe, Plan([TinyDecode(path=str(file), chunk=1)])) as fast:
            assert torch.allclose(pipe.vae.decode(z).sample, tiny_decoder.load(file).decode(z), atol=1e-6)
            out = fast("a red sphere", seed=3, **call("wan2.1") | {"num_inference_steps": 1})
        assert torch.equal(pipe.vae.decode(z).sample, own)
    assert out.receipt.techniques[0].effects == {"clips": 1}
    assert [k.choice for k in out.receipt.kernels] == ["tiny"]
    assert np.isfinite(out.raw.frames).all()


def test_files_of_other_vaes_are_refused(file, tmp_path):
    def refused(name: str, path: str, match: str) -> None:
        with pytest.raises(PlanError, match=match):
            accelerate(pipeline(name), Plan([TinyDecode(path=path)]))

    refused(
        "cogvideox", str(file), "distilled from AutoencoderKLWan, and this model has AutoencoderKLCogVideoX"
    )
    refused("wan2.1", "", "give the tiny decoder's file")
    refused("wan2.1", "embedded-of-nobody", "none is packaged|packaged:")
    vae = pipeline("wan2.1").vae
    other = {**vae.config, "latents_std": [2.0] * 16}
    net = tiny_decoder.build("AutoencoderKLWan", other, width=8, depth=1)
    wrong = tiny_decoder.save(tmp_path / "wrong.safetensors", net, "AutoencoderKLWan", other)
    refused("wan2.1", str(wrong), "other latent statistics")


def test_an_encoding_vae_in_training_decodes_itself(file):
    pipe = pipeline("wan2.1")
    pipe.vae.train()
    z = torch.randn(1, 16, 1, 2, 2)
    with torch.no_grad():
        want = pipe.vae.decode(z).sample
        with accelerate(pipe, Plan([TinyDecode(path=str(file))])):
            assert torch.equal(pipe.vae.decode(z).sample, want)


def test_the_packaged_decoder_is_nearly_as_good_as_the_full_one():
    from vivace.tiny.load import load_tiny
    from vivace.tiny.train.clips import ClipShape, to_model
    from vivace.tiny.train.seeds import held_out
    from vivace.tiny.whole_clip import encode_moments
    from vivace.world import sample_scenes

    video, _ = ClipShape(frames=9, height=64, width=64).draw(
        sample_scenes(held_out("dev", 3)), torch.device("cpu")
    )
    clips, vae = to_model(video), load_tiny(torch.float32).vae
    small = tiny_decoder.load(tiny_decoder.find("embedded")).float()

    def psnr(shown: torch.Tensor) -> float:
        return float((10 * torch.log10(4.0 / (shown - clips).square().flatten(1).mean(1))).mean())

    with torch.no_grad():
        latents = encode_moments(vae, clips).chunk(2, dim=1)[0]
        assert psnr(small(latents)) > psnr(vae.decode(latents).sample) - 1.5

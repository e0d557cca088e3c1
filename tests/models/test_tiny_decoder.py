"""The tiny decoder: sizes from a VAE's configuration, causal, streams, and files that say what they belong to."""

from __future__ import annotations

import json

import pytest
import torch

from vivace.core.errors import ConfigError, WeightsError
from vivace.models import tiny_decoder
from vivace.models.known import KNOWN
from vivace.models.tiny_decoder import TinyDecoderConfig
from vivace.models.vae_decode import COMPILE, DecodeOptions, compiler
from vivace.testing.models import pipeline


def made(name: str = "wan2.1", **sizes: int):
    vae = pipeline(name).vae
    torch.manual_seed(0)
    net = tiny_decoder.build(type(vae).__name__, vae.config, **({"width": 8, "depth": 2} | sizes))
    for value in net.parameters():
        torch.nn.init.normal_(value, std=0.2)
    return net.eval(), vae


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox", "ltx", "hunyuan"])
def test_clips_have_the_shape_of_the_vaes_own(name):
    net, vae = made(name)
    z = torch.randn(2, net.config.latent_channels, 3, 2, 3)
    with torch.no_grad():
        want = vae.decode(z, return_dict=False)[0]
    got = net.decode(z)
    assert got.shape == want.shape
    assert got.abs().max() <= 1.0


def test_pieces_equal_the_whole_and_later_latents_do_not_matter():
    net, _ = made()
    z = torch.randn(1, 16, 4, 3, 3)
    whole = net.decode(z)
    for chunk in (1, 3):
        assert (net.decode(z, chunk) - whole).abs().max() < 1e-4
    changed = torch.cat((z[:, :, :2], torch.randn(1, 16, 2, 3, 3)), dim=2)
    got = net.decode(changed)
    assert (got[:, :, :5] - whole[:, :, :5]).abs().max() < 1e-4
    assert (got[:, :, 5:] - whole[:, :, 5:]).abs().max() > 0.01
    first = torch.cat((torch.randn(1, 16, 1, 3, 3), z[:, :, 1:]), dim=2)
    assert (net.decode(first)[:, :, 1:5] - whole[:, :, 1:5]).abs().max() > 0.01, "frames do not remember"


def test_compiled_blocks_give_the_same():
    net, _ = made()
    z = torch.randn(1, 16, 2, 2, 2)
    want = net.decode(z)
    assert COMPILE[0] == "off"
    compile = compiler(DecodeOptions(compile="default", backend="eager"))
    assert compile is not None
    net.compile_blocks(compile)
    assert (net.decode(z) - want).abs().max() < 1e-6
    with torch.compiler.set_stance("fail_on_recompile"):
        net.decode(z)


def test_sizes_of_published_vaes():
    model = KNOWN["wan2.1-1.3b"]
    config = TinyDecoderConfig.of(model.vae_class, model.vae, width=32)
    assert (config.latent_channels, config.temporal, config.spatial, config.patch) == (16, 4, 8, 4)
    assert [config.channels(s) for s in range(config.stages)] == [96, 64, 32]
    with pytest.raises(ConfigError, match="at most"):
        TinyDecoderConfig.of(model.vae_class, model.vae, patch=16)
    with pytest.raises(ConfigError, match="power of two"):
        TinyDecoderConfig.of(model.vae_class, model.vae, patch=3)
    with pytest.raises(ConfigError, match="no tiny decoder for Other"):
        TinyDecoderConfig.of("Other", {})


def test_latents_are_brought_to_unit_scale():
    net, vae = made()
    assert net.std.flatten().tolist() == pytest.approx(vae.config.latents_std)
    assert made("hunyuan")[0].std.unique().item() == pytest.approx(1 / 0.476986)


def test_a_file_comes_back_and_tells_whose_it_is(tmp_path):
    net, vae = made()
    file = tiny_decoder.save(tmp_path / "a.safetensors", net, "AutoencoderKLWan", vae.config)
    state = torch.get_rng_state()
    again = tiny_decoder.load(file)
    assert torch.equal(torch.get_rng_state(), state)
    z = torch.randn(1, 16, 2, 2, 2)
    assert torch.equal(again.decode(z), net.decode(z))
    said = tiny_decoder.header(file)
    assert said.config == net.config
    # A configuration as its file has it: lists, names, and without what the class sets by default.
    short = json.loads(json.dumps({**vae.config, "_name_or_path": "x"}, default=list))
    del short["patch_size"]
    assert said.vae == tiny_decoder.fingerprint("AutoencoderKLWan", short)
    assert said.vae != tiny_decoder.fingerprint("AutoencoderKLWan", {**vae.config, "base_dim": 5})
    assert said.vae != tiny_decoder.fingerprint(
        "AutoencoderKLWan", {**vae.config, "latents_mean": [0.0] * 16}
    )


def test_bad_files_are_named(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(WeightsError, match="give the tiny decoder's file"):
        tiny_decoder.find("")
    with pytest.raises(WeightsError, match="nowhere"):
        tiny_decoder.find("nowhere")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no")
    with pytest.raises(WeightsError, match=r"broken\.safetensors"):
        tiny_decoder.header(broken)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(WeightsError, match="no tiny decoder"):
        tiny_decoder.header(foreign)

"""Decoding in pieces gives the frames that diffusers' own decoding gives; streams, tiles and their halos."""

from __future__ import annotations

import functools

import pytest
import torch

from vivace.core.errors import ConfigError
from vivace.models import wan_decode
from vivace.models.vae_decode import DecodeOptions, VaeDecoder, decode_stream
from vivace.models.wan_decode import Memory, WanDecode, latent_chunks, spans

LEVEL = 2.0 / 255.0
"""One step of 8 bits in the range from -1 to 1."""


@functools.cache
def vae(kind: str):
    """`wan2.1`: the published configuration's layout with few channels; `embedded`: the trained VAE."""
    from diffusers import AutoencoderKLWan

    if kind == "embedded":
        from vivace.tiny.load import load_tiny

        return load_tiny(torch.float32).vae
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKLWan(
            base_dim=8, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
        ).eval()


@functools.cache
def clip(kind: str, rows: int = 1, frames: int = 3, side: int = 4):
    """Latents, and the frames of diffusers' own decoding."""
    net = vae(kind)
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(rows, net.config.z_dim, frames, side, side + 1, generator=draw)
    with torch.no_grad():
        return z, net.decode(z).sample


@pytest.mark.parametrize("kind", ["wan2.1", "embedded"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"chunk": 1},
        {"chunk": 2, "channels_last": "on"},
        {"tile": 3},
        {"chunk": 2, "tile": 2},
        {"fused": "on"},
        {"fused": "on", "chunk": 1},
        {"fused": "on", "chunk": 2, "tile": 2},
    ],
    ids=str,
)
def test_pieces_equal_the_whole(kind, settings):
    z, want = clip(kind)
    decoder = VaeDecoder(vae(kind), DecodeOptions(**settings))
    assert (decoder(z) - want).abs().max() < 2e-5
    cut = decoder.pieces(z)
    assert (cut.chunk, cut.tile) == (settings.get("chunk", 3), settings.get("tile", 0))


def test_sixteen_bits_are_within_two_levels_of_float32_on_trained_weights():
    _, want = clip("embedded", frames=2)
    with torch.no_grad():
        plain = vae("embedded").encode(want).latent_dist.mode()
        truth = vae("embedded").decode(plain).sample
    got = VaeDecoder(vae("embedded"), DecodeOptions(dtype="bfloat16"))(plain)
    assert got.dtype == torch.float32
    off = (got - truth).abs()
    assert off.max() > 0.0
    assert off.max() <= 2 * LEVEL, off.max() / LEVEL


def test_bfloat16_weights_give_what_diffusers_gives_in_bfloat16():
    import copy

    low = copy.deepcopy(vae("embedded")).to(torch.bfloat16)
    z = 0.3 * clip("embedded", frames=2)[0].bfloat16()
    with torch.no_grad():
        want = low.decode(z).sample.float()
    got = VaeDecoder(low, DecodeOptions(chunk=1, tile=2))(z).float()
    assert (got - want).abs().max() <= 2 * LEVEL


@pytest.mark.parametrize("kind", ["wan2.1", "embedded"])
def test_the_halo_is_as_far_as_a_bad_number_spreads(kind):
    net = WanDecode(vae(kind))
    reach = net.halo
    assert reach == {"wan2.1": 13, "embedded": 8}[kind]
    side = 2 * reach + 3
    x = torch.zeros(1, net.stages[0].residuals[0].convs[0].weight.shape[1], 1, side, 1)
    x[:, :, :, reach + 1] = float("nan")
    out = net._finish(wan_decode._Step(net, Memory(), keep=False), x, (0, 0, 0, 0))
    rows = out.isnan().any(dim=4)[0, 0, 0].unflatten(0, (side, -1)).any(dim=1).nonzero().flatten()
    # A tile that begins behind the bad position is clean only when it is further away than the halo.
    assert rows.tolist() == list(range(1, side - 1))


def test_a_tile_with_a_smaller_halo_is_wrong(monkeypatch):
    z, want = clip("embedded", frames=1, side=6)
    net = WanDecode(vae("embedded"))
    assert (net.piece(z, Memory(), last=True, tile=2) - want).abs().max() < 2e-5
    monkeypatch.setitem(net.__dict__, "needs", tuple(n // 2 for n in net.needs))
    assert (net.piece(z, Memory(), last=True, tile=2) - want).abs().max() > 1e-3


def test_a_batch_is_parted_where_memory_is_short_or_where_asked_for():
    z, want = clip("wan2.1", rows=2, frames=2, side=4)
    net = vae("wan2.1")
    for options in (DecodeOptions(slicing=True), DecodeOptions(max_gib=0.001)):
        decoder = VaeDecoder(net, options)
        assert decoder.pieces(z).rows == 1
        assert (decoder(z) - want).abs().max() < 2e-5
    assert VaeDecoder(net).pieces(z).rows == 2


def test_pieces_fit_into_memory_and_are_as_large_as_may_be():
    net, z = vae("wan2.1"), torch.empty(1, 16, 21, 60, 104)
    whole = VaeDecoder(net, DecodeOptions(max_gib=1e3)).pieces(z)
    assert (whole.rows, whole.chunk, whole.tile) == (1, 21, 0)
    some = VaeDecoder(net, DecodeOptions(max_gib=whole.gib / 5)).pieces(z)
    assert some.chunk == 4
    assert some.gib <= whole.gib / 5
    tiled = VaeDecoder(net, DecodeOptions(max_gib=whole.gib / 60)).pieces(z)
    assert tiled.chunk == 1
    assert 0 < tiled.tile < 60
    assert tiled.gib <= whole.gib / 60


@pytest.mark.parametrize("kind", ["wan2.1", "embedded"])
def test_a_stream_equals_the_whole_and_its_memory_does_not_grow(kind, monkeypatch):
    z, want = clip(kind)
    seen = []
    monkeypatch.setattr(wan_decode, "Memory", lambda: seen.append(Memory()) or seen[-1])
    sizes, parts = [], []
    for part in decode_stream(vae(kind), (z[:, :, i : i + 1] for i in range(3))):
        parts.append(part)
        sizes.append(seen[0].bytes())
    assert [p.shape[2] for p in parts] == [1, 4, 4]
    assert (torch.cat(parts, dim=2) - want).abs().max() < 2e-5
    assert sizes[1] == sizes[2] > 0
    assert torch.is_grad_enabled()


def test_a_stream_is_cut_further_where_memory_is_short():
    z, want = clip("wan2.1")
    parts = list(decode_stream(vae("wan2.1"), [z[:, :, :1], z[:, :, 1:]], DecodeOptions(chunk=1)))
    assert [p.shape[2] for p in parts] == [1, 4, 4]
    assert (torch.cat(parts, dim=2) - want).abs().max() < 2e-5


def test_a_stream_cannot_change_its_size():
    z, _ = clip("wan2.1")
    with pytest.raises(ConfigError, match="begin a new one"):
        list(decode_stream(vae("wan2.1"), [z[:, :, :1], z[:, :, 1:2, :3]]))


def test_compiled_parts_are_not_compiled_again_for_a_second_clip():
    from torch._dynamo.utils import counters

    z, want = clip("embedded")
    torch._dynamo.reset()
    decoder = VaeDecoder(vae("embedded"), DecodeOptions(compile="default", backend="eager", chunk=2))
    limit = torch._dynamo.config.recompile_limit
    assert (decoder(z) - want).abs().max() < 2e-5
    made = counters["stats"]["unique_graphs"]
    assert made > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        assert (decoder(z) - want).abs().max() < 2e-5
        # A decoder of a later session has its parts compiled already.
        VaeDecoder(vae("embedded"), decoder.options)(z)
    assert counters["stats"]["unique_graphs"] == made
    assert torch._dynamo.config.recompile_limit == limit


def test_changed_weights_are_taken_over():
    import copy

    net = copy.deepcopy(vae("embedded"))
    z, _ = clip("embedded", frames=1, side=4)
    decoder = VaeDecoder(net, DecodeOptions(dtype="bfloat16"))
    before = decoder(z)
    with torch.no_grad():
        net.decoder.conv_out.weight.mul_(0.5)
    assert (decoder(z) - before).abs().max() > 0.01


def test_float16_that_overflows_is_told():
    import copy

    net = copy.deepcopy(vae("embedded"))
    with torch.no_grad():
        net.decoder.conv_in.bias.fill_(1e5)
    with pytest.raises(FloatingPointError, match="bfloat16"):
        VaeDecoder(net, DecodeOptions(dtype="float16"))(clip("embedded", frames=1, side=4)[0])


@pytest.mark.parametrize(("length", "most"), [(7, 3), (7, 7), (1, 4), (104, 13)])
def test_spans_cover_a_length_once(length, most):
    found = spans(length, most)
    assert [i for a, b in found for i in range(a, b)] == list(range(length))
    assert max(b - a for a, b in found) <= most


def test_chunks_of_a_clip():
    assert latent_chunks(5, 0) == [(0, 5)]
    assert latent_chunks(5, 2) == [(0, 2), (2, 4), (4, 5)]

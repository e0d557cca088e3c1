"""Tensors in few bits: errors within the promised bounds, exact where exact is possible, bytes as told."""

from __future__ import annotations

import pytest
import torch

from vivace.kernels.api import select
from vivace.kernels.cache_codec.pairs import pack_keys, pack_pair, pack_values, unpack_pair
from vivace.kernels.cache_codec.reference import pack, unpack
from vivace.kernels.cache_codec.spec import FORMS, LEVELS, LOW, OP, bytes_of, width_of

SHAPES = [(7,), (1, 1), (5, 33), (3, 64), (2, 3, 130), (2, 19, 3, 10)]


def drawn(shape, dtype=torch.float32, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (3.0 * x + 0.5).to(dtype)


def spread(packed, width):
    """Stored scales laid out over the tensor they belong to."""
    rows = packed.scale.double().repeat_interleave(width, -1)[..., : packed.shape[packed.axis]]
    return rows.movedim(-1, packed.axis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [0, 4, 32, 64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_within_half_a_step(shape, form, group, dtype):
    for axis in {-1, -len(shape)}:
        x = drawn(shape, dtype)
        packed = pack(x, form, group, axis)
        back = unpack(packed)
        assert (back.shape, back.dtype) == (x.shape, x.dtype)
        step = spread(packed, width_of(shape[axis], form, group))
        size = x.double().abs()
        bound = torch.maximum(size / 16.0, step / 1024.0) if form == "fp8" else step / 2.0
        # Float32 arithmetic, and the rounding of what comes back to its type.
        slack = 2.0**-20 * size.max() + torch.finfo(dtype).eps * (size + bound)
        assert ((back.double() - x.double()).abs() <= bound * (1 + 1e-6) + slack).all()
        scale_bytes = 4 if dtype is torch.float32 else 2
        assert packed.nbytes == bytes_of(shape, form, group, axis, scale_bytes)


@pytest.mark.parametrize("form", FORMS)
def test_scales_are_those_of_the_extremes(form):
    """In float64, from the definition; stored for 16-bit numbers never smaller, and larger by a bf16 step at most."""
    x = drawn((6, 64))
    groups = x.double().unflatten(-1, (2, 32))
    width = groups.amax(-1) - groups.amin(-1) if form in LOW else groups.abs().amax(-1)
    want = width / LEVELS[form]
    assert torch.allclose(pack(x, form, 32).scale.double(), want, rtol=1e-6)
    half = x.bfloat16()
    groups = half.double().unflatten(-1, (2, 32))
    width = groups.amax(-1) - groups.amin(-1) if form in LOW else groups.abs().amax(-1)
    want, packed = width / LEVELS[form], pack(half, form, 32)
    assert packed.scale.dtype is torch.bfloat16
    assert (packed.scale.double() >= want * (1 - 1e-6)).all()
    assert (packed.scale.double() <= want * (1 + 2.0**-6)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["int8", "int4", "int2"])
def test_what_can_be_represented_comes_back_exactly(form, dtype):
    top = int(LEVELS[form])
    make = torch.Generator().manual_seed(2)
    codes = torch.randint(0 if form in LOW else -top, top + 1, (9, 32), generator=make)
    codes[:, 0], codes[:, 1] = top, 0 if form in LOW else -top
    low = -2.0 if form in LOW else 0.0
    x = (codes * 0.25 + low).to(dtype)
    assert unpack(pack(x, form, 32)).equal(x)


def test_e4m3_numbers_come_back_exactly():
    x = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = x[x.isfinite()].view(2, 127)
    for scale in (1.0, 0.125):
        back = unpack(pack(x * scale, "fp8", 0))
        assert back.equal(x * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_groups_of_equal_numbers(form, dtype):
    zero = torch.zeros(3, 40, dtype=dtype)
    assert unpack(pack(zero, form, 32)).equal(zero)
    for value in (1.5, -0.75, 3.0e-5):
        x = torch.full((2, 40), value, dtype=dtype)
        back = unpack(pack(x, form, 32))
        assert torch.isfinite(back).all()
        # A scale that is rounded up moves the ends by a bf16 step at most.
        assert torch.allclose(back.float(), x.float(), rtol=2.0**-7, atol=0.0)
    exact = torch.full((2, 40), 1.5, dtype=dtype)
    if form in LOW:
        assert unpack(pack(exact, form, 32)).equal(exact)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_sizes_stay_finite(form):
    for size in (1e-42, 1e-30, 1e30):
        x = drawn((4, 64)) * size
        assert torch.isfinite(unpack(pack(x, form, 32))).all()
    half = torch.tensor([[65504.0, -65504.0, 1.0, 0.0]], dtype=torch.float16)
    back = unpack(pack(half, form, 4))
    assert torch.isfinite(back[:, 2:]).all()


@pytest.mark.parametrize("form", FORMS)
def test_groups_know_nothing_of_each_other(form):
    x = drawn((4, 96))
    before = unpack(pack(x, form, 32))
    x[1, 40] = 1000.0
    after = unpack(pack(x, form, 32))
    same = torch.ones_like(x, dtype=torch.bool)
    same[1, 32:64] = False
    assert after[same].equal(before[same])
    assert not after[~same].equal(before[~same])


def test_bytes_are_those_of_the_bits():
    x = drawn((10, 128), torch.bfloat16)
    sizes = {form: pack(x, form, 64).nbytes for form in FORMS}
    # 1280 numbers in 20 groups: a 2-byte scale each, and a 2-byte minimum below 8 bits.
    assert sizes == {"int8": 1320, "fp8": 1320, "int4": 640 + 80, "int2": 320 + 80}


def test_keys_are_grouped_along_tokens_and_values_along_channels():
    b, s, h, d = 2, 64, 3, 16
    k = drawn((b, s, h, d))
    k[..., 5] *= 100.0  # the outlier channel that KIVI describes
    by_channel, by_token = pack_keys(k, "int2", 32), pack_values(k, "int2", 16)
    assert by_channel.scale.shape == (b, h, d, s // 32)
    assert by_token.scale.shape == (b, s, h, 1)
    others = [i for i in range(d) if i != 5]

    def error(packed):
        return float((unpack(packed) - k)[..., others].norm() / k[..., others].norm())

    # 32 normal numbers span 4.1 deviations: three steps of 1.37, so an error of 1.37 / sqrt(12).
    assert error(by_channel) == pytest.approx(0.395, rel=0.05)
    assert error(by_token) > 0.9


@pytest.mark.parametrize(("tokens", "residual", "kept"), [(70, 0, 6), (70, 7, 38), (20, 0, 20), (64, 0, 0)])
def test_the_newest_tokens_stay_as_they_are(tokens, residual, kept):
    k, v = drawn((1, tokens, 2, 8), seed=1), drawn((1, tokens, 2, 24), seed=2)
    pair = pack_pair(k, v, "int4", 32, residual)
    assert pair.tokens == tokens
    assert pair.new_keys.shape[1] == kept
    back = unpack_pair(pair)
    for x, y in zip((k, v), back, strict=True):
        assert y.shape == x.shape
        assert y[:, tokens - kept :].equal(x[:, tokens - kept :])
        if kept < tokens:
            assert 0.0 < float((y - x)[:, : tokens - kept].norm() / x.norm()) < 0.2
    if kept < tokens:
        assert pair.nbytes < k.nbytes + v.nbytes


def test_bad_input_is_refused():
    x = drawn((2, 8))
    pairs = x.view(1, 2, 2, 4)
    wrong = {
        "form is one of": lambda: pack(x, "int3"),
        "multiple of 4": lambda: pack(x, "int2", 6),
        "multiple of 2 numbers, not -2": lambda: pack(x, "int4", -2),
        "floats along axis 2": lambda: pack(x, "int8", 0, 2),
        "floats along axis -1": lambda: pack(x.long(), "int8"),
        "nothing along": lambda: pack(x[:, :0], "int8"),
        "keys and values are": lambda: pack_pair(x, x),
        "one token at least": lambda: pack_pair(pairs, pairs, "int8", 0),
    }
    for sentence, call in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            call()
    with pytest.raises(RuntimeError, match="no gradients"):
        pack(x.requires_grad_(), "int8")


def test_it_is_registered():
    choice = select(OP, device="cpu")
    assert choice.name == "reference"
    assert choice.run is pack

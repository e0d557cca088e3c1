"""The low-frequency cache against the rule written in numpy around the tiny networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.caching.low_frequency_cache import LowFrequencyCache
from vivace.techniques.caching.spectrum import seen_through, wiener
from vivace.testing.models import CALL, call, pipeline


def generate(settings, name="wan2.1", prompt="a red ball", seed=3, **changes):
    with accelerate(pipeline(name), Plan([settings])) as fast:
        out = fast(prompt, seed=seed, output_type="latent", **{**call(name), **changes})
    raw = out.raw.frames
    return (raw[0] if isinstance(raw, tuple) else raw), out.receipt


def filtered(x, sigma, exponent):
    """(..., H, W) through the filter, by whole complex transforms in float64."""
    h, w = x.shape[-2:]
    ky, kx = np.fft.fftfreq(h) * h, np.fft.fftfreq(w) * w
    power = np.maximum(np.hypot(ky[:, None], kx[None]), 1.0) ** -exponent
    power /= power.mean()
    gain = (1 - sigma) ** 2 * power / ((1 - sigma) ** 2 * power + sigma**2) if sigma < 0.999 else power
    return np.fft.ifft2(np.fft.fft2(x.astype(np.float64)) * gain).real


@torch.no_grad()
def by_hand(pipe, settings, steps, scale=5.0):
    """The rule on Wan as one loop: (latents, skipped steps)."""
    text, negative = pipe.encode_prompt("a red ball", "", max_sequence_length=CALL["max_sequence_length"])
    latents = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    pipe.scheduler.set_timesteps(steps)
    before, total, run, v, skipped = None, 0.0, 0, {}, []
    for i, t in enumerate(pipe.scheduler.timesteps):
        x, sigma = latents[0].numpy(), float(pipe.scheduler.sigmas[i])
        skip = False
        if max(1, settings.warmup) <= i < steps - settings.tail:
            a, b = (filtered(y, sigma, settings.exponent) for y in (x, before))
            total += np.abs(a - b).mean() / np.abs(b).mean()
            skip = total < settings.threshold and run < settings.max_consecutive
        before = x.copy()
        run = run + 1 if skip else 0
        if not skip:
            total = 0.0
            for b, e in (("cond", text), ("uncond", negative)):
                v[b] = pipe.transformer(latents, t.expand(1), e, return_dict=False)[0]
        skipped.append(skip)
        guided = v["uncond"] + scale * (v["cond"] - v["uncond"])
        latents = pipe.scheduler.step(guided, t, latents, return_dict=False)[0]
    return latents, skipped


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (LowFrequencyCache(threshold=0.3), 10),
        (LowFrequencyCache(threshold=0.5, exponent=1.0, tail=0, max_consecutive=3), 12),
        (LowFrequencyCache(threshold=0.25, exponent=0.0, warmup=3), 16),
    ],
)
def test_equals_the_loop_written_by_hand(settings, steps):
    expected, skipped = by_hand(pipeline("wan2.1"), settings, steps)
    latents, receipt = generate(settings, num_inference_steps=steps)
    assert 0 < sum(skipped) < steps - 2
    for branch in (0, 1):
        assert [s.branches[branch].action == "skipped" for s in receipt.steps] == skipped
    assert torch.allclose(latents, expected, atol=1e-4)


def test_the_filter_keeps_low_frequencies_at_first_and_everything_at_the_end():
    y, x = np.mgrid[:16, :16]
    wide, fine = (torch.tensor(np.cos(2 * np.pi * k * (x + y) / 16)) for k in (1, 6))

    def kept(picture, sigma):
        return float(seen_through(picture, sigma, 3.0).norm() / picture.norm())

    assert kept(fine, 0.9) < 0.02 * kept(wide, 0.9)
    assert kept(wide, 0.01) > 0.99
    assert kept(fine, 0.01) > 0.9
    assert [kept(fine, s) for s in (0.9, 0.5, 0.1)] == sorted(kept(fine, s) for s in (0.9, 0.5, 0.1))
    flat = wiener(8, 6, 0.4, 0.0, torch.device("cpu"))
    assert torch.allclose(flat, torch.full_like(flat, 0.36 / 0.52))


@pytest.mark.parametrize("name", ["wan2.1-i2v", "wan2.2", "wan2.2-ti2v", "cogvideox-i2v", "ltx", "hunyuan"])
def test_acts_on_every_family(name):
    latents, receipt = generate(LowFrequencyCache(threshold=1.0), name)
    assert torch.isfinite(latents).all()
    assert receipt.nfe == receipt.nfe_requested - receipt.cache_hits < receipt.nfe_requested


def test_every_sample_decides_for_itself():
    settings, pairs = LowFrequencyCache(threshold=0.3), (("a red ball", 3), ("zzz 99 !!", 11))
    prompts, seeds = (list(part) for part in zip(*pairs, strict=True))
    together, receipt = generate(settings, prompt=prompts, seed=seeds)
    alone = [generate(settings, prompt=p, seed=s) for p, s in pairs]
    for i, (single, _) in enumerate(alone):
        assert torch.allclose(together[i], single[0], atol=1e-4)
    assert receipt.blocks_run == pytest.approx(sum(r.blocks_run for _, r in alone) / 2)

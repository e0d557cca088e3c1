"""EasyCache against the published rule, in numpy, around the tiny networks themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.caching.easycache import EasyCache
from vivace.testing.models import CALL, call, pipeline


def generate(pipe, settings, prompt="a red ball", seed=3, **changes):
    plan = Plan([settings] if settings else [])
    with accelerate(pipe, plan) as fast:
        out = fast(prompt, seed=seed, output_type="latent", **{**CALL, **changes})
    raw = out.raw.frames
    return (raw[0] if isinstance(raw, tuple) else raw), out.receipt


@torch.no_grad()
def by_hand(pipe, settings, steps, seed=3, scale=5.0):
    """The rule on Wan as one loop, its figures in numpy: (latents, skipped steps)."""
    text, negative = pipe.encode_prompt("a red ball", "", max_sequence_length=CALL["max_sequence_length"])
    latents = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    pipe.scheduler.set_timesteps(steps)
    size = lambda a: float(np.abs(a).mean(dtype=np.float64))  # noqa: E731
    previous = inputs = outputs = rate = None
    total, cached, skipped = 0.0, {}, []
    for i, t in enumerate(pipe.scheduler.timesteps):
        x = latents.numpy()
        skip = False
        if settings.warmup <= i < steps - settings.tail and rate is not None:
            total += rate * size(x - previous) / size(outputs)
            skip = total < settings.threshold
        previous = x.copy()
        if skip:
            v = {b: latents + cached[b] for b in ("cond", "uncond")}
        else:
            total = 0.0
            v = {
                b: pipe.transformer(latents, t.expand(1), e, return_dict=False)[0]
                for b, e in (("cond", text), ("uncond", negative))
            }
            cached = {b: v[b] - latents for b in v}
            c = v["cond"].numpy()
            if outputs is not None:
                rate = size(c - outputs) / size(x - inputs)
            inputs, outputs = x.copy(), c.copy()
        skipped.append(skip)
        guided = v["uncond"] + scale * (v["cond"] - v["uncond"])
        latents = pipe.scheduler.step(guided, t, latents, return_dict=False)[0]
    return latents, skipped


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (EasyCache(threshold=0.7, warmup=2), 12),
        (EasyCache(threshold=0.4, warmup=0, tail=0), 16),
        (EasyCache(threshold=0.3), 24),
    ],
)
def test_equals_the_loop_written_by_hand(settings, steps):
    expected, skipped = by_hand(pipeline("wan2.1"), settings, steps)
    latents, receipt = generate(pipeline("wan2.1"), settings, num_inference_steps=steps)
    assert 0 < sum(skipped) < steps - 3
    for branch in (0, 1):
        assert [s.branches[branch].action == "skipped" for s in receipt.steps] == skipped
    assert receipt.nfe == 2 * (steps - sum(skipped))
    assert torch.allclose(latents, expected, atol=5e-5)


@pytest.mark.parametrize(
    "name",
    ["wan2.1-i2v", "wan2.2", "wan2.2-ti2v", "cogvideox-i2v", "ltx", "hunyuan-i2v"],
)
def test_acts_on_every_family(name):
    arguments = call(name) | {"num_inference_steps": 14}
    latents, receipt = generate(pipeline(name), EasyCache(threshold=1.0, warmup=2), **arguments)
    assert torch.isfinite(latents).all()
    assert receipt.nfe < receipt.nfe_requested
    assert receipt.cache_hits == receipt.nfe_requested - receipt.nfe


def test_every_sample_decides_for_itself():
    settings, pairs = EasyCache(threshold=0.5, warmup=1), (("a red ball", 3), ("zzz 99 !!", 11))
    prompts, seeds = (list(part) for part in zip(*pairs, strict=True))
    together, receipt = generate(pipeline("wan2.1"), settings, prompts, seeds)
    alone = [generate(pipeline("wan2.1"), settings, *pair) for pair in pairs]
    for i, (single, _) in enumerate(alone):
        assert torch.allclose(together[i], single[0], atol=1e-4)
    assert receipt.blocks_run == pytest.approx(sum(r.blocks_run for _, r in alone) / 2)


def test_threshold_zero_is_the_exact_run():
    exact, _ = generate(pipeline("wan2.1"), None)
    same, receipt = generate(pipeline("wan2.1"), EasyCache(threshold=0.0))
    assert torch.equal(exact, same)
    assert receipt.nfe == 16

"""AdaCache against the codebook walked by hand, in numpy, on a sampler written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.caching.adacache import AdaCache
from vivace.testing.models import call, pipeline

FAST = {0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.40: 2, 1.0: 1}
SLOW = {0.03: 12, 0.05: 10, 0.07: 8, 0.09: 6, 0.11: 4, 1.0: 3}
FRAMES = 3


def generate(settings, name="wan2.1", prompt="a red ball", seed=3, **changes):
    with accelerate(pipeline(name), Plan([settings] if settings else [])) as fast:
        out = fast(prompt, seed=seed, output_type="latent", **{**call(name), **changes})
    return out.raw.frames, out.receipt


def score(r):
    frames = r.reshape(FRAMES, -1, r.shape[-1])
    return np.abs(np.diff(frames, axis=0)).mean() / np.abs(frames[1:]).mean()


@pytest.mark.parametrize(
    ("settings", "book", "steps"),
    [
        (AdaCache(lenience=0.08), FAST, 16),
        (AdaCache(lenience=0.2, motion=0.0, tail=0), FAST, 16),
        (AdaCache(lenience=0.4, motion=0.5, book="slow", warmup=1, max_consecutive=3), SLOW, 16),
        (AdaCache(max_consecutive=1), FAST, 8),
    ],
)
def test_equals_the_loop_written_by_hand(settings, book, steps, sampler_by_hand):
    residual, known, skipped = {}, [], []

    def gap():
        """Distance from the last computed step to the next, by the last two residuals."""
        if len(known) < 2:
            return 1
        (q, old), (r, new) = known[-2:]
        rate = np.abs(new - old).mean() / np.abs(old).mean() / (r - q)
        motion = max(score(new) + (score(new) - score(old)) / (r - q), 0.0)
        rate *= 1 - settings.motion + settings.motion * motion
        return next((g for b, g in book.items() if rate < b * settings.lenience), 1)

    def stack(step, branch, h, blocks):
        if branch == "cond":
            free = max(1, settings.warmup) <= step < steps - settings.tail
            last = known[-1][0] if known else step
            wait = min(gap(), settings.max_consecutive + 1)
            skipped.append(bool(free and known and step - last < wait))
        if skipped[step]:
            return h + residual[branch]
        out = h
        for block in blocks:
            out = block(out)
        residual[branch] = out - h
        if branch == "cond":
            known.append((step, (out - h)[0].detach().numpy().astype(np.float64)))
        return out

    expected = sampler_by_hand(stack, steps=steps)
    latents, receipt = generate(settings, num_inference_steps=steps)
    assert 0 < sum(skipped) < steps - 2
    for branch in (0, 1):
        assert [s.branches[branch].action == "reused" for s in receipt.steps] == skipped
    assert torch.allclose(latents, expected, atol=1e-4)


def test_motion_counts():
    def blocks(lenience, motion):
        return generate(AdaCache(lenience=lenience, motion=motion), num_inference_steps=16)[1].blocks_run

    assert any(blocks(x, 0.0) != blocks(x, 1.0) for x in (0.2, 0.12))


@pytest.mark.parametrize("name", ["wan2.2", "wan2.2-ti2v", "cogvideox", "ltx", "hunyuan"])
def test_acts_on_every_family(name):
    latents, receipt = generate(AdaCache(lenience=8.0), name)
    assert torch.isfinite(latents).all()
    assert receipt.blocks_run < receipt.blocks_total


def test_every_sample_decides_for_itself():
    settings, pairs = AdaCache(lenience=0.15, warmup=1), (("a red ball", 3), ("zzz 99 !!", 11))
    prompts, seeds = (list(part) for part in zip(*pairs, strict=True))
    together, receipt = generate(settings, prompt=prompts, seed=seeds)
    alone = [generate(settings, prompt=p, seed=s) for p, s in pairs]
    for i, (single, _) in enumerate(alone):
        assert torch.allclose(together[i], single[0], atol=1e-4)
    assert receipt.blocks_run == pytest.approx(sum(r.blocks_run for _, r in alone) / 2)

"""DBCache against a sampler written out by hand, with probe, middle and mending blocks."""

from __future__ import annotations

import pytest
import torch

from vivace.core.errors import PlanError
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.caching.dbcache import DualBlockCache
from vivace.techniques.caching.first_block_cache import FirstBlockCache
from vivace.testing.models import call, pipeline


def generate(settings, name="wan2.1", **changes):
    with accelerate(pipeline(name), Plan([settings])) as fast:
        out = fast("a red ball", seed=3, output_type="latent", **{**call(name), **changes})
    return out.raw.frames, out.receipt


@pytest.mark.parametrize(
    "settings",
    [
        DualBlockCache(threshold=0.3, first_blocks=1, last_blocks=1, warmup=1),
        DualBlockCache(threshold=0.3, first_blocks=2, last_blocks=0, warmup=1, tail=1),
        DualBlockCache(threshold=1.0, first_blocks=2, last_blocks=1, warmup=0, max_consecutive=2),
        DualBlockCache(threshold=1.0, first_blocks=1, last_blocks=2, warmup=3),
    ],
)
def test_equals_the_loop_written_by_hand(settings, sampler_by_hand):
    steps, memory, skips, ran = 8, {}, {}, []

    def stack(step, branch, h, blocks):
        n, m = settings.first_blocks, len(blocks) - settings.last_blocks
        start = h
        for block in blocks[:n]:
            h = block(h)
        probe, old = h - start, memory.get(branch)
        if branch == "cond":
            skips[step] = False
            if old and settings.warmup <= step < steps - settings.tail:
                change = (probe - old["probe"]).abs().mean() / old["probe"].abs().mean()
                run = sum(skips.get(step - k, False) for k in range(1, settings.max_consecutive + 1))
                skips[step] = bool(change < settings.threshold and run < settings.max_consecutive)
        if skips[step]:
            h = h + old["middle"]
        else:
            before = h
            for block in blocks[n:m]:
                h = block(h)
            memory[branch] = {"probe": probe, "middle": h - before}
        for block in blocks[m:]:
            h = block(h)
        ran.append(n + settings.last_blocks if skips[step] else len(blocks))
        return h

    expected = sampler_by_hand(stack, steps=steps)
    latents, receipt = generate(settings)
    assert receipt.blocks_run == sum(ran) < 64
    assert torch.allclose(latents, expected, atol=5e-5)


def test_one_first_block_and_no_last_is_the_first_block_cache():
    one = generate(DualBlockCache(threshold=0.3, first_blocks=1, warmup=1))
    other = generate(FirstBlockCache(threshold=0.3, warmup=1, tail=0, max_consecutive=50))
    assert torch.equal(one[0], other[0])
    assert one[1].blocks_run == other[1].blocks_run < 64


@pytest.mark.parametrize("name", ["wan2.2", "cogvideox", "ltx", "hunyuan"])
def test_acts_on_every_family(name):
    settings = DualBlockCache(threshold=1.0, first_blocks=1, last_blocks=1, warmup=1)
    latents, receipt = generate(settings, name)
    assert torch.isfinite(latents).all()
    assert receipt.blocks_run == receipt.blocks_total - 2 * receipt.cache_hits < receipt.blocks_total


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(PlanError, match="at least 9 transformer blocks"):
        accelerate(pipeline("wan2.1"), Plan([DualBlockCache()]))

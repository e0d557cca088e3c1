"""DiCache against a sampler written out by hand."""

from __future__ import annotations

import pytest
import torch

from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.caching.dicache import DiCache
from vivace.testing.models import CALL, call, pipeline


def generate(settings, name="wan2.1", prompt="a red ball", seed=3, **changes):
    with accelerate(pipeline(name), Plan([settings])) as fast:
        out = fast(prompt, seed=seed, output_type="latent", **{**call(name), **changes})
    return out.raw.frames, out.receipt


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (DiCache(threshold=0.6), 12),
        (DiCache(threshold=0.5, probe_blocks=2, retention=0.0), 10),
        (DiCache(threshold=1.0, retention=0.1, tail=0, max_consecutive=2), 14),
    ],
)
def test_equals_the_loop_written_by_hand(settings, steps, sampler_by_hand):
    state = {b: {"probes": [], "rests": []} for b in ("cond", "uncond")}
    total, before, skipped, ratios = [0.0], [None], [], []

    def size(t):
        return t.abs().double().mean().item()

    def stack(step, branch, h, blocks):
        start, mine = h, state[branch]
        for block in blocks[: settings.probe_blocks]:
            h = block(h)
        if branch == "cond":
            skip = False
            if int(settings.retention * steps) < step < steps - settings.tail:
                total[0] += size(h - before[0]) / size(before[0])
                run = 0
                while run < len(skipped) and skipped[-1 - run]:
                    run += 1
                skip = total[0] < settings.threshold and run < settings.max_consecutive
            if not skip:
                total[0] = 0.0
            before[0] = h
            skipped.append(skip)
        probe = h - start
        if skipped[step]:
            if len(mine["rests"]) < 2:
                return h + mine["rests"][-1]
            (p2, p1), (s2, s1) = mine["probes"][-2:], mine["rests"][-2:]
            ratio = size(probe - p2) / size(p1 - p2)
            ratios.append(ratio)
            return h + s2 + min(max(ratio, 1.0), 1.5) * (s1 - s2)
        out = h
        for block in blocks[settings.probe_blocks :]:
            out = block(out)
        mine["probes"].append(probe)
        mine["rests"].append(out - h)
        return out

    expected = sampler_by_hand(stack, steps=steps)
    latents, receipt = generate(settings, num_inference_steps=steps)
    assert 0 < sum(skipped) < steps - 2
    assert any(r > 1.0 for r in ratios)
    for branch in (0, 1):
        assert [s.branches[branch].action == "reused" for s in receipt.steps] == skipped
    assert torch.allclose(latents, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["wan2.2", "wan2.2-ti2v", "cogvideox", "ltx", "hunyuan"])
def test_acts_on_every_family(name):
    latents, receipt = generate(DiCache(threshold=1.0), name)
    assert torch.isfinite(latents).all()
    assert receipt.blocks_run == receipt.blocks_total - 3 * receipt.cache_hits < receipt.blocks_total


def test_every_sample_decides_and_blends_for_itself():
    settings, pairs = DiCache(threshold=0.6, retention=0.0), (("a red ball", 3), ("zzz 99 !!", 11))
    prompts, seeds = (list(part) for part in zip(*pairs, strict=True))
    together, receipt = generate(settings, prompt=prompts, seed=seeds)
    alone = [generate(settings, prompt=p, seed=s) for p, s in pairs]
    for i, (single, _) in enumerate(alone):
        assert torch.allclose(together[i], single[0], atol=1e-4)
    assert receipt.blocks_run == pytest.approx(sum(r.blocks_run for _, r in alone) / 2)
    assert receipt.blocks_run < 4 * 2 * CALL["num_inference_steps"]

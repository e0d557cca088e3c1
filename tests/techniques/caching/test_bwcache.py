"""BWCache against a sampler loop that measures all blocks, written out by hand."""

from __future__ import annotations

import pytest
import torch

from vivace.techniques.caching.bwcache import BWCache
from vivace.testing.subjects import PROMPT, Subject


def measuring_by_hand(sampler, settings, steps=8):
    """(latents, steps computed, changes measured): the method as one loop."""
    length = max(1, round(settings.run_share * steps))
    outputs, change, run, computed, changes = {}, float("inf"), 0, [], []

    def stack(step, branch, h, blocks):
        nonlocal change, run
        if branch == "cond":
            free = settings.warmup <= step < steps - settings.tail
            reuse = free and change < settings.threshold and run < min(length, settings.max_consecutive)
            run = run + 1 if reuse else 0
            if not reuse:
                computed.append(step)
        if step not in computed:
            return outputs[branch][-1]
        before, now = outputs.get(branch), []
        for block in blocks:
            h = block(h)
            now.append(h)
        if branch == "cond" and before:
            apart = [(a - b).abs().mean() / b.abs().mean() for a, b in zip(now, before, strict=True)]
            change = float(sum(apart) / len(apart))
            changes.append(change)
        outputs[branch] = now
        return h

    latents = sampler(stack, prompt=PROMPT, seed=7, steps=steps)
    return latents, computed, changes


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (BWCache(threshold=1.0), 8),
        (BWCache(threshold=1.0, run_share=0.4, warmup=0, tail=2), 8),
        (BWCache(threshold=1.0, run_share=0.5, warmup=3, tail=0, max_consecutive=2), 8),
        (BWCache(threshold=0.12, run_share=0.1, warmup=2), 20),
        (BWCache(threshold=0.1, run_share=0.1, warmup=0), 20),
    ],
)
def test_equals_the_loop_written_by_hand(settings, steps, sampler_by_hand):
    expected, computed, changes = measuring_by_hand(sampler_by_hand, settings, steps)
    run = Subject("wan2.1").run(settings, num_inference_steps=steps)
    assert [s.index for s in run.receipt.steps if s.branches[0].blocks_run] == computed
    assert 2 < len(computed) < steps
    assert run.receipt.blocks_run == 8 * len(computed)
    assert torch.allclose(run.latents, expected, atol=2e-4)
    if settings.threshold < 1.0:
        # The measurement matters: some steps lie above the threshold and some below.
        assert min(changes) < settings.threshold < max(changes)


def test_all_blocks_are_remembered_once():
    subject = Subject("wan2.1")
    run = subject.run(BWCache(threshold=1.0))
    config = subject.pipeline.transformer.config
    tensor = 3 * 2 * 2 * config["num_attention_heads"] * config["attention_head_dim"] * 4
    # Four blocks of the conditional branch, each branch's last output, and the measured change.
    assert 4 * tensor + tensor <= run.receipt.cache_bytes <= 6 * tensor + 64


def test_every_sample_decides_for_itself():
    subject, settings = Subject("wan2.1"), BWCache(threshold=0.11, run_share=0.1)
    prompts, seeds = [PROMPT, "zzz 99 !!", "two blue cones"], [7, 11, 5]
    batch = subject.run(
        settings, prompt=prompts, seed=seeds, negative_prompt=[""] * 3, num_inference_steps=14
    )
    alone = [
        subject.run(settings, prompt=p, seed=s, negative_prompt="", num_inference_steps=14)
        for p, s in zip(prompts, seeds, strict=True)
    ]
    for i, one in enumerate(alone):
        assert torch.allclose(batch.latents[i], one.latents[0], atol=2e-4)
    assert batch.receipt.blocks_run == pytest.approx(sum(r.receipt.blocks_run for r in alone) / 3)
    assert len({r.receipt.blocks_run for r in alone}) > 1

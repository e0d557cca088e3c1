"""First-block cache against a sampler loop written out by hand, on tiny real pipelines."""

from __future__ import annotations

import pytest
import torch

from vivace.core.errors import PlanError
from vivace.models.describe import describe_pipeline
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.base import Estimate
from vivace.techniques.caching.first_block_cache import FirstBlockCache
from vivace.techniques.trajectory.guidance_interval import GuidanceInterval
from vivace.testing.models import CALL, call, pipeline

FAMILIES = ["wan2.1", "wan2.2", "wan2.2-ti2v", "cogvideox", "ltx", "hunyuan"]


def generate(pipe, *techniques, prompt="a red ball", seed=3, **changes):
    """(latents, receipt) of a run under a plan."""
    with accelerate(pipe, Plan(techniques)) as fast:
        out = fast(prompt, seed=seed, output_type="latent", **{**CALL, **changes})
    return out.raw.frames, out.receipt


@torch.no_grad()
def by_hand(pipe, settings: FirstBlockCache, prompt="a red ball", seed=3, steps=8, scale=5.0):
    """The method on Wan as one plain loop: (latents, blocks run)."""
    net, memory, ran = pipe.transformer, {}, 0
    text, negative = pipe.encode_prompt(prompt, "", max_sequence_length=CALL["max_sequence_length"])
    x = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    pipe.scheduler.set_timesteps(steps)
    for i, t in enumerate(pipe.scheduler.timesteps):
        prediction = {}
        for branch, embedded in (("cond", text), ("uncond", negative)):
            h = net.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()
            temb, mod, embedded, _ = net.condition_embedder(t.expand(1), embedded, None)
            rest = (embedded, mod.unflatten(1, (6, -1)), net.rope(x))
            after = net.blocks[0](h, *rest)
            first, old = after - h, memory.get(branch)
            if branch == "cond":  # one vote for both branches
                near = (
                    old
                    and (first - old["first"]).abs().mean() / old["first"].abs().mean() < settings.threshold
                )
                free = settings.warmup <= i < steps - settings.tail
                reuse = near and free and old["skips"] < settings.max_consecutive
            if reuse and old:
                h, old["skips"], ran = after + old["rest"], old["skips"] + 1, ran + 1
            else:
                h = after
                for block in net.blocks[1:]:
                    h = block(h, *rest)
                memory[branch], ran = {"first": first, "rest": h - after, "skips": 0}, ran + len(net.blocks)
            shift, gain = (net.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
            h = net.proj_out(net.norm_out(h) * (1 + gain) + shift).reshape(1, 3, 2, 2, 1, 2, 2, 16)
            prediction[branch] = h.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        u, c = prediction["uncond"], prediction["cond"]
        x = pipe.scheduler.step(u + scale * (c - u), t, x, return_dict=False)[0]
    return x, ran


@pytest.mark.parametrize(
    "settings",
    [
        FirstBlockCache(),
        FirstBlockCache(threshold=0.15, warmup=1, tail=0),
        FirstBlockCache(threshold=1.0, warmup=0, tail=2, max_consecutive=2),
        FirstBlockCache(threshold=1.0, warmup=3, max_consecutive=50),
    ],
)
def test_equals_the_loop_written_by_hand(settings):
    expected, blocks = by_hand(pipeline("wan2.1"), settings)
    latents, receipt = generate(pipeline("wan2.1"), settings)
    assert receipt.blocks_run == blocks < 64
    assert torch.allclose(latents, expected, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_acts_on_every_family_within_its_estimate(name):
    settings = FirstBlockCache(threshold=1.0, warmup=1)
    _, exact = generate(pipeline(name), **call(name))
    latents, receipt = generate(pipeline(name), settings, **call(name))
    assert torch.isfinite(latents).all()
    assert receipt.cache_hits > 0
    assert receipt.blocks_run == exact.blocks_run - 3 * receipt.cache_hits
    assert receipt.nfe == exact.nfe
    assert receipt.flops < exact.flops
    assert receipt.flops_dense == pytest.approx(exact.flops)
    model = describe_pipeline(pipeline(name))
    base = Estimate.exact(exact.nfe, exact.blocks_run, exact.attention_pairs, exact.flops)
    workload = model.workload(frames=9, height=32, width=32, steps=8)
    assert settings.estimate(model, workload, base).problems(receipt.counts) == []


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox", "ltx", "hunyuan"])
def test_every_sample_decides_for_itself(name):
    settings = FirstBlockCache(threshold=0.5 if name != "cogvideox" else 0.95, warmup=1)
    prompts, seeds = ["a red ball", "zzz 99 !!"], [3, 11]
    arguments = call(name)
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * 2
    latents, receipt = generate(pipeline(name), settings, prompt=prompts, seed=seeds, **arguments)
    alone = [
        generate(pipeline(name), settings, prompt=p, seed=s, **call(name))
        for p, s in zip(prompts, seeds, strict=True)
    ]
    for i, (single, _) in enumerate(alone):
        assert torch.allclose(latents[i], single[0], atol=1e-4), i
    assert receipt.blocks_run == pytest.approx(sum(r.blocks_run for _, r in alone) / 2)


def test_samples_of_one_batch_really_differ_in_their_decisions():
    _, a = generate(pipeline("wan2.1"), FirstBlockCache(threshold=0.1, warmup=1))
    pipe = pipeline("wan2.1")
    mixed, whole = 0, len(pipe.transformer.blocks)
    for threshold in (0.05, 0.08, 0.1, 0.12, 0.15, 0.2):
        settings = FirstBlockCache(threshold=threshold, warmup=1)
        _, receipt = generate(pipe, settings, prompt=["a red ball", "zzz 99 !!"], seed=[3, 11])
        calls = [b.blocks_run for s in receipt.steps for b in s.branches]
        mixed += sum(1 < c < whole for c in calls)
    assert mixed > 0
    assert a.blocks_run <= 64


def test_fused_guidance_decides_as_separate_guidance_would():
    settings = FirstBlockCache(threshold=1.0, warmup=1, max_consecutive=2)
    _, fused = generate(pipeline("ltx"), settings, **call("ltx"))
    _, separate = generate(pipeline("wan2.1"), settings)
    assert [sum(b.blocks_run for b in s.branches) for s in fused.steps] == [
        sum(b.blocks_run for b in s.branches) for s in separate.steps
    ]
    assert fused.cache_hits == separate.cache_hits


@pytest.mark.parametrize("name", ["wan2.1", "ltx"])
def test_rows_stay_themselves_when_guidance_ends(name):
    """The conditional half goes on with its own memory when the pair is no longer evaluated together."""
    settings = FirstBlockCache(threshold=1.0, warmup=1, tail=0, max_consecutive=50)
    _, receipt = generate(pipeline(name), settings, GuidanceInterval(high=0.5), **call(name))
    assert receipt.nfe == 12
    assert receipt.blocks_run == 2 * 4 + (12 - 2)


def test_threshold_zero_is_the_exact_run_and_larger_ones_run_less():
    exact, receipt = generate(pipeline("wan2.1"))
    same, off = generate(pipeline("wan2.1"), FirstBlockCache(threshold=0.0))
    assert torch.equal(exact, same)
    assert off.blocks_run == receipt.blocks_run
    runs = [
        generate(pipeline("wan2.1"), FirstBlockCache(threshold=t))[1].blocks_run
        for t in (0.02, 0.1, 0.2, 1.0)
    ]
    assert runs == sorted(runs, reverse=True)
    assert runs[-1] < runs[0]


def test_memory_goes_with_the_generation_and_inputs_stay_as_they_were():
    pipe, settings = pipeline("wan2.1"), FirstBlockCache(threshold=1.0, warmup=1)
    with accelerate(pipe, Plan([settings])) as fast:
        one = fast("a red ball", seed=3, output_type="latent", **CALL)
        assert len(fast.store) == 0
        assert one.receipt.cache_bytes > 0
        other = fast("a red ball", seed=3, output_type="latent", **{**CALL, "height": 48})
        two = fast("a red ball", seed=3, output_type="latent", **CALL)
    assert other.receipt.cache_hits > 0
    assert torch.equal(one.raw.frames, two.raw.frames)


def test_one_block_cannot_be_cached():
    with pytest.raises(PlanError, match="at least 2 transformer blocks"):
        accelerate(pipeline("wan2.1", layers=1), Plan([FirstBlockCache()]))
    latents, receipt = generate(pipeline("wan2.1", layers=2), FirstBlockCache(threshold=1.0, warmup=1))
    assert torch.isfinite(latents).all()
    assert receipt.blocks_run < receipt.blocks_total

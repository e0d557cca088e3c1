"""Dynamic latent frame rate: against a sampling loop written by hand, and beside sparse attention and caches."""

from __future__ import annotations

import itertools

import pytest
import torch

from vivace import Plan, accelerate
from vivace.core.errors import PlanError
from vivace.core.shapes import TokenGrid
from vivace.models.describe import describe_pipeline
from vivace.techniques.attention.sliding_tile import SlidingTile
from vivace.techniques.caching.first_block_cache import FirstBlockCache
from vivace.techniques.compression.latent_frame_rate import Groups, LatentFrameRate, least_motion
from vivace.techniques.compression.token_merging import TokenMerging
from vivace.testing import models

CALL = {"num_frames": 17, "height": 64, "width": 64, "num_inference_steps": 5}


def generate(pipe, techniques, family="wan2.1", **call):
    call = models.call(family) | {"output_type": "latent"} | CALL | call
    with accelerate(pipe, Plan(techniques)) as fast:
        return fast(call.pop("prompt", "a red sphere"), seed=3, **call)


def latents(out) -> torch.Tensor:
    return torch.as_tensor(out.raw.frames)


@pytest.mark.parametrize(
    ("frames", "count", "longest"), [(5, 2, 2), (7, 3, 2), (7, 4, 3), (6, 3, 4), (4, 0, 2)]
)
def test_the_stillest_groups_are_found(frames, count, longest) -> None:
    changes = torch.rand(frames - 1, generator=torch.Generator().manual_seed(frames)).tolist()
    best = None
    for joints in itertools.combinations(range(1, frames - 1), count):
        sizes = [1]
        for i in range(frames - 1):
            if i in joints:
                sizes[-1] += 1
            else:
                sizes.append(1)
        if max(sizes) <= longest:
            cost = sum(changes[i] for i in joints)
            best = min(best or (9.0, ()), (cost, tuple(sizes)))
    assert best is not None
    assert least_motion(changes, count, longest) == best[1]


def test_too_many_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be merged in groups of at most 2"):
        least_motion([0.1, 0.2, 0.3], 2, 2)


def test_merged_latents_have_the_mean_and_the_noise_of_one_frame() -> None:
    generator, sigma = torch.Generator().manual_seed(1), 0.7
    clean, noise = (torch.randn(2, 3, 5, 2, 2, generator=generator) for _ in range(2))
    groups = Groups([(1, 2, 2), (2, 1, 2)], "cpu")
    got = groups.merged((1 - sigma) * clean + sigma * noise, clean, sigma)
    for row, sizes in enumerate([(1, 2, 2), (2, 1, 2)]):
        start = 0
        for g, size in enumerate(sizes):
            part = slice(start, start + size)
            want = (1 - sigma) * clean[row, :, part].mean(1) + sigma * noise[row, :, part].sum(1) / size**0.5
            torch.testing.assert_close(got[row, :, g], want)
            start += size


def test_interpolation_is_exact_on_a_straight_line() -> None:
    """Frames that change evenly come back as they were between the outermost middles."""
    groups = Groups([(1, 2, 3, 1)], "cpu")
    line = torch.arange(7.0).view(1, 1, 7, 1, 1)
    means = groups.sums(line) / groups.axis(groups.sizes)
    torch.testing.assert_close(groups.interpolated(means), line)


@pytest.mark.parametrize("restore", ["residual", "repeat"])
def test_it_is_the_loop_by_hand(restore) -> None:
    """Without guidance: two full steps, two merged ones, one full; positions of the middle frames."""
    pipe, share = models.pipeline("wan2.1"), 0.4
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 16, 5, 8, 8, generator=generator)
    noise[:, :, 3] = noise[:, :, 2] * 0.99
    words = torch.randn(1, 16, pipe.transformer.config.text_dim, generator=generator)
    technique = LatentFrameRate(share=share, probe=2, full_last=1, restore=restore)
    given = {"prompt": None, "prompt_embeds": words, "latents": noise, "guidance_scale": 1.0}
    got = latents(generate(models.pipeline("wan2.1"), [technique], **given))

    scheduler, network, rope = pipe.scheduler, pipe.transformer, pipe.transformer.rope.forward
    scheduler.set_timesteps(5)
    z, clean, sizes = noise, None, None
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            sigma = float(scheduler.sigmas[i])
            if 2 <= i < 4:
                if sizes is None:
                    change = (clean[0, :, 1:] - clean[0, :, :-1]).square().mean((0, 2, 3)).tolist()
                    sizes = least_motion(change, 2, 2)
                ends = list(itertools.accumulate(sizes))
                parts = [slice(e - s, e) for e, s in zip(ends, sizes, strict=True)]
                n = (z - (1 - sigma) * clean) / sigma
                means = torch.stack([clean[:, :, p].mean(2) for p in parts], 2)
                wild = torch.stack([n[:, :, p].sum(2) / (p.stop - p.start) ** 0.5 for p in parts], 2)
                small = (1 - sigma) * means + sigma * wild
                middles = [p.start + (p.stop - p.start - 1) // 2 for p in parts]
                whole = rope(z)
                picked = tuple(f.view(1, 5, 16, 1, -1)[:, middles].flatten(1, 2) for f in whole)
                network.rope.forward = lambda x, picked=picked: picked
                out = network(small, t.expand(1), words, return_dict=False)[0]
                network.rope.forward = rope
                x0 = small - sigma * out
                of = [g for g, s in enumerate(sizes) for _ in range(s)]
                rest = clean - means[:, :, of] if restore == "residual" else 0.0
                v = (z - x0[:, :, of] - rest) / sigma
            else:
                v = network(z, t.expand(1), words, return_dict=False)[0]
            clean = z - sigma * v
            z = scheduler.step(v, t, z, return_dict=False)[0]
    assert max(sizes) == 2
    torch.testing.assert_close(got, z, rtol=1e-3, atol=1e-4)


def test_sparse_attention_lays_its_blocks_over_the_smaller_grid() -> None:
    technique, sparse = (
        LatentFrameRate(share=0.4, probe=2, full_last=1),
        SlidingTile(window=0.25, block=64),
    )
    call = {"height": 128, "width": 128}
    pipe = models.pipeline("wan2.1")
    alone = generate(models.pipeline("wan2.1"), [sparse], **call).receipt
    both = generate(pipe, [technique, sparse], **call).receipt
    one, two = (sparse.block_map(TokenGrid(frames, 8, 8)).pairs(1, 1) for frames in (5, 3))
    text = models.call("wan2.1")["max_sequence_length"]
    # Two branches and two merged steps of four layers with two heads; text is seen by every token.
    lost = 2 * 2 * 4 * 2 * (one - two + (5 - 3) * 64 * text)
    assert alone.attention_pairs - both.attention_pairs == pytest.approx(lost)
    assert next(t for t in both.techniques if t.name == sparse.card.name).effects["sparse_evaluations"] == 10


def test_caches_begin_anew_where_the_number_of_frames_changes() -> None:
    plan = [
        LatentFrameRate(share=0.4, probe=3, full_last=2),
        FirstBlockCache(threshold=1.0, warmup=1, tail=0),
    ]
    out = generate(models.pipeline("wan2.1"), plan, num_inference_steps=9)
    actions = [step.branches[0].action for step in out.receipt.steps]
    assert [actions[i] for i in (0, 3, 7)] == ["computed"] * 3
    assert "reused" in actions[4:7]
    assert torch.isfinite(latents(out)).all()


def test_samples_that_a_cache_skips_apart_keep_their_own_positions() -> None:
    """A cache that runs blocks for some samples only must hand them the positions of those samples."""
    prompts, seeds = ["a red sphere", "two blue cubes roll left", "a green cone"], [1, 2, 3]
    plan = Plan(
        [
            LatentFrameRate(share=0.4, probe=3, full_last=1),
            FirstBlockCache(threshold=0.15, warmup=1, tail=0),
        ]
    )
    call = models.call("wan2.1") | CALL | {"output_type": "latent", "num_inference_steps": 12}
    call.pop("prompt", None)
    pipe = models.pipeline("wan2.1")
    with accelerate(pipe, plan) as fast:
        both = fast(prompts, seed=seeds, **call)
        alone = [fast(p, seed=s, **call) for p, s in zip(prompts, seeds, strict=True)]
    actions = [[step.branches[0].action for step in one.receipt.steps] for one in alone]
    assert any(len({row[i] for row in actions}) > 1 for i in range(4, 11)), actions
    torch.testing.assert_close(
        latents(both), torch.cat([latents(one) for one in alone]), rtol=1e-3, atol=1e-3
    )


def test_receipt_prices_all_frames() -> None:
    exact = generate(models.pipeline("wan2.1"), []).receipt
    fast = generate(models.pipeline("wan2.1"), [LatentFrameRate(share=0.4, probe=2, full_last=1)]).receipt
    assert fast.flops < exact.flops
    assert fast.flops_dense == pytest.approx(exact.flops, rel=1e-9)
    assert fast.attention_pairs_dense == pytest.approx(exact.attention_pairs, rel=1e-9)


def test_pictures_packed_latents_and_rivals_are_refused() -> None:
    technique = LatentFrameRate(probe=1, full_last=0)
    for family in ("wan2.1-i2v", "ltx"):
        model = describe_pipeline(models.pipeline(family), defaults=models.call(family))
        with pytest.raises(PlanError, match=r"cannot merge frames|needs"):
            Plan([technique]).check(model)
    model = describe_pipeline(models.pipeline("wan2.1"), defaults=models.call("wan2.1"))
    for order in ([technique, TokenMerging()], [TokenMerging(), technique]):
        with pytest.raises(PlanError, match=r"both own tokens\.set"):
            Plan(order).check(model)

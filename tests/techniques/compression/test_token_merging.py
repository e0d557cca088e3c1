"""Token merging on live pipelines: against modules patched by hand, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from vivace import Plan, accelerate
from vivace.core.errors import PlanError
from vivace.models.describe import describe_pipeline
from vivace.techniques.attention.radial import Radial
from vivace.techniques.attention.sage_attention import SageAttention
from vivace.techniques.attention.sparge import SpargeAttention
from vivace.techniques.caching.first_block_cache import FirstBlockCache
from vivace.techniques.compression.token_merging import TokenMerging
from vivace.techniques.trajectory.progressive_resolution import ProgressiveResolution
from vivace.testing import models

SMALL = {"window_frames": 3, "window_height": 4, "window_width": 4}


def generate(pipe, techniques, family="wan2.1", **call):
    call = models.call(family) | {"num_inference_steps": 2, "output_type": "latent"} | call
    with accelerate(pipe, Plan(techniques)) as fast:
        return fast("a red sphere", seed=3, **call)


def latents(out) -> torch.Tensor:
    return torch.as_tensor(out.raw.frames)


def oracle(x: torch.Tensor, grid: tuple[int, int, int], ratio: float) -> list[list[list[int]]]:
    """Groups of tokens of every row: one window over the whole grid, destinations at even places, cosine."""
    frames, height, width = grid
    places = [(t, y, u) for t in range(frames) for y in range(height) for u in range(width)]
    fixed = [i for i, p in enumerate(places) if not any(c % 2 for c in p)]
    others = [i for i in range(len(places)) if i not in fixed]
    rows = []
    for row in x.double():
        unit = row / row.norm(dim=1, keepdim=True)
        alike = unit[others] @ unit[fixed].T
        best, which = alike.max(1)
        gone = best.argsort(descending=True)[: int(ratio * len(places) + 0.5)].tolist()
        groups = {i: [i] for i in range(len(places)) if i not in {others[g] for g in gone}}
        for g in gone:
            groups[fixed[int(which[g])]].append(others[g])
        rows.append([groups[i] for i in sorted(groups)])
    return rows


def patch(pipe, grid, ratio, parts):
    """Merge by hand around the modules of every block of a Wan transformer."""
    for block in pipe.transformer.blocks:
        state = {}

        def entry(module, args, kwargs, state=state):
            hidden = args[0] if args else kwargs["hidden_states"]
            state["groups"] = oracle(hidden, grid, ratio)

        block.register_forward_pre_hook(entry, with_kwargs=True)
        for name, kind in (("attn1", "attention"), ("attn2", "cross"), ("ffn", "ffn")):
            if kind not in parts:
                continue
            module = getattr(block, name)

            def forward(x, *args, old=module.forward, state=state, turned=kind == "attention", **kwargs):
                outs = []
                for row, groups in zip(x, state["groups"], strict=True):
                    short = torch.stack([row[g].mean(0) for g in groups])[None]
                    rest = list(args)
                    if turned:
                        first = [min(g) if len(g) == 1 else g[0] for g in groups]
                        rest[2] = tuple(f[:, first] for f in args[2])
                    out = old(short, *rest, **kwargs)[0]
                    back = torch.empty_like(row)
                    for number, group in enumerate(groups):
                        back[group] = out[number]
                    outs.append(back)
                return torch.stack(outs)

            module.forward = forward


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("attention", ("attention",)),
        ("attention+ffn", ("attention", "ffn")),
        ("all", ("attention", "cross", "ffn")),
    ],
)
def test_it_is_merging_by_hand(setting, parts) -> None:
    call = {"num_frames": 9, "height": 64, "width": 64}
    got = generate(models.pipeline("wan2.1"), [TokenMerging(ratio=0.4, parts=setting)], **call)
    pipe = models.pipeline("wan2.1")
    patch(pipe, (3, 4, 4), 0.4, parts)
    torch.testing.assert_close(latents(got), latents(generate(pipe, [], **call)), rtol=1e-3, atol=1e-4)


def test_tokens_that_are_alike_lose_nothing() -> None:
    """A clip without any detail: all tokens of a window are one token, so with their weights nothing changes."""
    pipe = models.pipeline("wan2.1")
    pipe.transformer.rope.freqs_cos.fill_(1.0)
    pipe.transformer.rope.freqs_sin.fill_(0.0)
    still = torch.randn(1, 16, 1, 1, 1, generator=torch.Generator().manual_seed(0)).expand(1, 16, 3, 8, 8)
    call = {"num_frames": 9, "height": 64, "width": 64, "latents": still.contiguous()}
    exact = latents(generate(pipe, [], **call))
    technique = TokenMerging(ratio=0.5, parts="all", proportional=True)
    torch.testing.assert_close(latents(generate(pipe, [technique], **call)), exact, rtol=1e-4, atol=1e-5)


def test_keys_carry_the_weight_of_what_they_stand_for() -> None:
    """Attention over keys given n times each is attention over them once with log n added."""
    from vivace.techniques.compression.reduction import key_weights, weighted
    from vivace.techniques.compression.token_matching import Match

    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 2, n, 8, generator=generator) for n in (5, 4, 4))
    times = torch.tensor([1, 3, 2, 1])
    index = torch.zeros(1, 0, dtype=torch.int64)
    found = Match(index, index, index, times[None, :3].float())
    mask = torch.tensor([True, True, True, False]).view(1, 1, 1, 4)
    for given, text in ((None, 1), (mask, 1)):
        bias = weighted(given, key_weights(found, text, False), q.dtype)
        got = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        some = times if given is None else times * mask.flatten()
        want = torch.nn.functional.scaled_dot_product_attention(
            q, *(x.repeat_interleave(some, dim=2) for x in (k, v))
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", ["wan2.1", "cogvideox", "hunyuan", "ltx"])
def test_no_merging_through_every_seam_is_the_exact_run(family) -> None:
    """All seams in use and tokens only reordered into themselves: a ratio of one token changes little, none nothing."""
    exact = latents(generate(models.pipeline(family), [], family))
    tiny = TokenMerging(ratio=1e-6, parts="all", proportional=True)
    assert torch.equal(latents(generate(models.pipeline(family), [tiny], family)), exact)


@pytest.mark.parametrize("family", ["cogvideox", "hunyuan", "ltx", "wan2.2"])
def test_receipt_prices_the_dense_model(family) -> None:
    """What the dense model would cost is the exact run's cost, though no evaluation ran with all tokens."""
    exact = generate(models.pipeline(family), [], family).receipt
    fast = generate(models.pipeline(family), [TokenMerging(ratio=0.3, parts="all", **SMALL)], family).receipt
    assert fast.flops < exact.flops
    assert fast.attention_pairs < exact.attention_pairs
    assert fast.flops_dense == pytest.approx(exact.flops, rel=1e-9)
    assert fast.attention_pairs_dense == pytest.approx(exact.attention_pairs, rel=1e-9)


def test_one_matching_serves_a_step_and_is_kept() -> None:
    counts = {}
    for name, settings in {
        "block": {},
        "step": {"scope": "step"},
        "kept": {"scope": "step", "every": 2},
    }.items():
        technique = TokenMerging(ratio=0.3, **SMALL, **settings)
        counts[name] = generate(models.pipeline("wan2.1"), [technique]).receipt.flops
    assert counts["block"] > counts["step"] > counts["kept"]
    # Two branches, two steps, four blocks: what one matching costs follows from the first difference.
    one = (counts["block"] - counts["step"]) / (2 * 2 * 3)
    assert counts["step"] - counts["kept"] == pytest.approx(2 * one)


@pytest.mark.parametrize("other", [SpargeAttention, Radial, SageAttention, ProgressiveResolution])
def test_who_lays_blocks_over_the_grid_is_refused(other) -> None:
    model = describe_pipeline(models.pipeline("wan2.1"), defaults=models.call("wan2.1"))
    for order in ([TokenMerging(), other()], [other(), TokenMerging()]):
        with pytest.raises(PlanError, match="keep one of them"):
            Plan(order).check(model)


def test_it_lies_inside_a_cache() -> None:
    """A block that a cache skips is not matched; the cache remembers whole sequences."""
    caches = [FirstBlockCache(threshold=0.5, warmup=1, tail=1)]
    call = {"num_inference_steps": 6}
    alone = generate(models.pipeline("wan2.1"), caches, **call).receipt
    both = generate(models.pipeline("wan2.1"), [TokenMerging(ratio=0.3, **SMALL), *caches], **call).receipt
    assert alone.blocks_run < alone.blocks_total
    assert both.flops < alone.flops
    merging = next(t for t in both.techniques if t.name == "token_merging")
    # 0.3 of 3 x 2 x 2 tokens, in every block that ran.
    assert merging.effects["tokens_merged"] == 4 * both.blocks_run


def test_too_high_a_ratio_and_memory_beside_a_block_cache_are_told() -> None:
    model = describe_pipeline(models.pipeline("wan2.1"), defaults=models.call("wan2.1"))
    found = TokenMerging(ratio=0.8, stride="1x2x2").check(model)
    assert any("at most 0." in p.message for p in found)
    plan = Plan([TokenMerging(every=2), FirstBlockCache()])
    with pytest.raises(PlanError, match=r"block\.skip"):
        plan.check(model)

"""Asymmetric reduction on live pipelines: against attention written out by hand, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from vivace import Plan, accelerate
from vivace.core.errors import PlanError
from vivace.models.describe import describe_pipeline
from vivace.models.families import for_module
from vivace.techniques.attention.sparge import SpargeAttention
from vivace.techniques.compression.asymmetric_reduction import AsymmetricReduction
from vivace.techniques.compression.token_merging import TokenMerging
from vivace.testing import models

CALL = {"num_frames": 9, "height": 64, "width": 64}


def generate(pipe, techniques, family="wan2.1", **call):
    call = models.call(family) | {"num_inference_steps": 2, "output_type": "latent"} | call
    with accelerate(pipe, Plan(techniques)) as fast:
        return fast("a red sphere", seed=3, **call)


def latents(out) -> torch.Tensor:
    return torch.as_tensor(out.raw.frames)


def stand_ins(x: torch.Tensor, grid: tuple[int, int, int], ratio: float) -> list[int]:
    """Who stands for each token of one sample (S, C): itself, or its nearest token at even places."""
    places = [(t, y, u) for t in range(grid[0]) for y in range(grid[1]) for u in range(grid[2])]
    fixed = [i for i, p in enumerate(places) if not any(c % 2 for c in p)]
    others = [i for i in range(len(places)) if i not in fixed]
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    best, which = (unit[others] @ unit[fixed].T).max(1)
    out = list(range(len(places)))
    for n in best.argsort(descending=True)[: int(ratio * len(places) + 0.5)].tolist():
        out[others[n]] = fixed[int(which[n])]
    return out


def by_hand(grid, query_ratio, key_ratio, text, text_first, weighted):
    """A kernel that writes attention out over the tokens that stay."""

    def kernel(q, k, v, mask=None):
        tokens = grid[0] * grid[1] * grid[2]
        shift = text if text_first else 0
        outs = []
        for b in range(q.shape[0]):
            sides = []
            for x, ratio in ((q, query_ratio), (k, key_ratio)):
                video = x[b, shift : shift + tokens].flatten(1)
                stands = (
                    [shift + i for i in stand_ins(video, grid, ratio)]
                    if ratio
                    else list(range(shift, shift + tokens))
                )
                words = list(range(text)) if text_first else list(range(tokens, tokens + text))
                sides.append((words + stands) if text_first else (stands + words))
            asked, known = sides
            left = sorted(set(known))
            scores = torch.einsum("qhd,khd->hqk", q[b], k[b, left]) / q.shape[-1] ** 0.5
            if mask is not None:
                scores = scores.masked_fill(~mask[min(b, len(mask) - 1), 0, 0, left], float("-inf"))
            if weighted:
                scores = scores + torch.tensor([float(known.count(i)) for i in left]).log()
            every = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[b, left])
            outs.append(every[asked])
        return torch.stack(outs)

    return kernel


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("family", ["wan2.1", "cogvideox", "hunyuan"])
def test_it_is_attention_over_what_stays(family, weighted) -> None:
    technique = AsymmetricReduction(query_ratio=0.3, key_ratio=0.5, proportional=weighted)
    call = CALL if family == "wan2.1" else {}
    pipe = models.pipeline(family)
    model = describe_pipeline(pipe, defaults=models.call(family) | call)
    grid = model.grid(model.workload())
    assert max(grid.frames, 4) == 4
    assert max(grid.height, grid.width) <= 8
    got = latents(generate(models.pipeline(family), [technique], family, **call))
    adapter = for_module(pipe.transformer)
    sides = (grid.frames, grid.height, grid.width)
    for site in adapter.expert("transformer", pipe.transformer).attentions:
        if site.kind != "cross":

            def kernel(q, k, v, mask=None, sides=sides):
                text = q.shape[1] - sides[0] * sides[1] * sides[2]
                return by_hand(sides, 0.3, 0.5, text, grid.text_first, weighted)(q, k, v, mask)

            site.module.processor = adapter.processor(site, kernel)
    torch.testing.assert_close(got, latents(generate(pipe, [], family, **call)), rtol=1e-3, atol=1e-4)


def test_sides_are_counted_apart_and_kept_lists_cost_nothing() -> None:
    """Two branches, two steps, four layers, two heads; 48 tokens, 24 keys left, and what matching costs."""

    def pairs(*techniques):
        return generate(models.pipeline("wan2.1"), techniques, **CALL).receipt.attention_pairs

    exact, sites = pairs(), 2 * 2 * 4 * 2
    saved = exact - pairs(AsymmetricReduction(query_ratio=0.0, key_ratio=0.5))
    # Similarity: 8 destinations by 40 sources in one window, half a pair each.
    matching = 0.5 * 8 * 40
    assert saved == sites * (48 * 48 - 48 * 24 - matching)
    kept = exact - pairs(AsymmetricReduction(query_ratio=0.0, key_ratio=0.5, every=2))
    assert kept - saved == sites / 2 * matching


def test_steps_and_layers_are_left_alone() -> None:
    exact = generate(models.pipeline("wan2.1"), [], **CALL, num_inference_steps=4).receipt.attention_pairs
    settings = {"query_ratio": 0.0, "key_ratio": 0.5, "dense_steps": 1, "tail": 1, "dense_layers": 3}
    out = generate(
        models.pipeline("wan2.1"), [AsymmetricReduction(**settings)], **CALL, num_inference_steps=4
    )
    # Two of four steps, one of four layers.
    assert exact - out.receipt.attention_pairs == 2 * 2 * 1 * 2 * (48 * 48 - 48 * 24 - 0.5 * 8 * 40)
    marked = [any("asymmetric" in b.by for b in s.branches) for s in out.receipt.steps]
    assert marked == [False, True, True, False]


@pytest.mark.parametrize("other", [SpargeAttention, TokenMerging])
def test_who_owns_the_kernel_or_the_tokens_is_refused(other) -> None:
    model = describe_pipeline(models.pipeline("wan2.1"), defaults=models.call("wan2.1"))
    for order in ([AsymmetricReduction(), other()], [other(), AsymmetricReduction()]):
        with pytest.raises(PlanError, match="keep one of them"):
            Plan(order).check(model)

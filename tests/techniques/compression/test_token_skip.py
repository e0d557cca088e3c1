"""Token skipping on live pipelines: against a block stack written by hand, and what the receipt says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vivace import Plan, accelerate
from vivace.core.errors import PlanError
from vivace.models.describe import describe_pipeline
from vivace.techniques.attention.sparge import SpargeAttention
from vivace.techniques.caching.first_block_cache import FirstBlockCache
from vivace.techniques.compression.token_skip import TokenSkip
from vivace.testing import models

CALL = {"num_frames": 9, "height": 64, "width": 64, "num_inference_steps": 6, "output_type": "latent"}


def generate(pipe, techniques, family="wan2.1", **call):
    call = models.call(family) | CALL | call
    with accelerate(pipe, Plan(techniques)) as fast:
        return fast(call.pop("prompt", "a red sphere"), seed=3, **call)


def latents(out) -> torch.Tensor:
    return torch.as_tensor(out.raw.frames)


class Stack(nn.Module):
    """The blocks of a Wan transformer for one sample without guidance, called once a step."""

    def __init__(self, blocks, skipping: set[int], count: int, ageing: float) -> None:
        super().__init__()
        self.inner, self.skipping, self.count, self.ageing, self.step = blocks, skipping, count, ageing, 0
        self.chosen = []

    def through(self, x, text, time, rotary):
        for block in self.inner:
            x = block(x, text, time, rotary)
        return x

    def forward(self, x, text, time, rotary):
        step, self.step = self.step, self.step + 1
        if step not in self.skipping:
            out = self.through(x, text, time, rotary)
            self.seen, self.added, self.age = x.clone(), out - x, torch.zeros(x.shape[1])
            return out
        moved = (x - self.seen)[0].norm(dim=1)
        score = moved / moved.mean() + self.ageing * (self.age + 1)
        keep = sorted(score.argsort(descending=True)[: self.count].tolist())
        self.chosen.append(keep)
        short = self.through(x[:, keep], text, time, tuple(f[:, keep] for f in rotary))
        self.added[:, keep] = short - x[:, keep]
        self.seen[:, keep] = x[:, keep]
        self.age += 1
        self.age[keep] = 0
        return x + self.added


@pytest.mark.parametrize("ageing", [0.0, 0.5])
def test_it_is_the_stack_by_hand(ageing) -> None:
    """Six steps: two full, two skipping, one full, and the last one full."""
    technique = TokenSkip(budget=0.4, interval=3, warmup=2, tail=1, ageing=ageing)
    assert [technique.skips(i, 6) for i in range(6)] == [False, False, True, True, False, False]
    call = {"guidance_scale": 1.0}
    got = generate(models.pipeline("wan2.1"), [technique], **call)
    pipe = models.pipeline("wan2.1")
    stack = Stack(pipe.transformer.blocks, {2, 3}, 19, ageing)  # 0.4 of 48 tokens
    pipe.transformer.blocks = nn.ModuleList([stack])
    noise = torch.Generator().manual_seed(3)
    want = pipe(prompt="a red sphere", generator=noise, **(models.call("wan2.1") | CALL | call)).frames
    torch.testing.assert_close(latents(got), want, rtol=1e-3, atol=1e-4)
    if ageing:
        assert stack.chosen[0] != stack.chosen[1]


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2", "wan2.2-ti2v", "cogvideox", "hunyuan", "ltx"])
def test_work_follows_the_budget_and_the_dense_price_does_not(family) -> None:
    call = {k: v for k, v in models.call(family).items() if k in ("num_frames", "height", "width")}
    exact = generate(models.pipeline(family), [], family, **call).receipt
    fast = generate(models.pipeline(family), [TokenSkip(budget=0.5, warmup=1)], family, **call).receipt
    assert fast.flops < exact.flops
    assert fast.attention_pairs < exact.attention_pairs
    assert fast.flops_dense == pytest.approx(exact.flops, rel=1e-9)
    assert fast.attention_pairs_dense == pytest.approx(exact.attention_pairs, rel=1e-9)


@pytest.mark.parametrize("other", [SpargeAttention, FirstBlockCache])
def test_who_lays_blocks_or_skips_them_is_refused(other) -> None:
    model = describe_pipeline(models.pipeline("wan2.1"), defaults=models.call("wan2.1"))
    for order in ([TokenSkip(), other()], [other(), TokenSkip()]):
        with pytest.raises(PlanError, match="keep one of them"):
            Plan(order).check(model)


def test_pictures_are_refused() -> None:
    model = describe_pipeline(models.pipeline("wan2.1-i2v"), defaults=models.call("wan2.1-i2v"))
    with pytest.raises(PlanError, match="use it for text-to-video"):
        Plan([TokenSkip()]).check(model)

"""Chipmunk against its definition: a softmax over new scores in the strongest columns and old scores elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vivace import Plan, accelerate
from vivace.kernels.api import select
from vivace.kernels.block_attention.layout import Layout
from vivace.kernels.block_attention.spec import OP as ATTEND
from vivace.kernels.column_delta.spec import OP as COLUMNS
from vivace.models.families import for_module
from vivace.techniques.attention.chipmunk import Chipmunk
from vivace.techniques.attention.dynamic import View
from vivace.testing import models
from vivace.testing.subjects import Subject, distance

CLIP = {
    "num_frames": 17,
    "height": 64,
    "width": 64,
    "num_inference_steps": 6,
}  # 5 x 4 x 4 tokens: 5 blocks of 16
VIDEO, TEXT, BLOCK = 40, 10, 16


class Dense:
    """One head's dense step by hand; `block_of` gives the block of each video query, text stands last."""

    def __init__(self, q, k, v, block_of, columns, bias=0.0) -> None:
        self.k, self.v, self.block_of, video = k, v, block_of, len(block_of)
        self.scores = q @ k.T * q.shape[1] ** -0.5 + bias
        p = torch.softmax(self.scores, -1)
        self.out = p @ v
        self.chosen = torch.zeros_like(p, dtype=torch.bool)
        self.chosen[:, video:] = True
        self.chosen[video:] = True
        for block in set(block_of.tolist()):
            rows = torch.nonzero(block_of == block)[:, 0]
            strongest = p[rows].sum(0)[:video].topk(columns).indices
            self.chosen[rows[:, None], strongest] = True

    def later(self, q, k, v, bias=0.0):
        """A step that computes the chosen columns anew."""
        new = q @ k.T * q.shape[1] ** -0.5 + bias
        p = torch.softmax(torch.where(self.chosen, new, self.scores), -1)
        return (p * self.chosen) @ v + (p * ~self.chosen) @ self.v


def layout():
    """40 video tokens in blocks of 16, the last one half full, then 10 of text."""
    slots = np.full((4, BLOCK), -1, dtype=np.int64)
    slots[:3].reshape(-1)[:VIDEO] = np.arange(VIDEO)
    slots[3, :TEXT] = np.arange(VIDEO, VIDEO + TEXT)
    return Layout(slots, 1)


def view(q, k, v, bias):
    here = layout()
    return View(
        *(here.arrange(x) for x in (q, k, v)),
        layout=here,
        scale=q.shape[-1] ** -0.5,
        memory={},
        select=select(COLUMNS, "reference", device="cpu").run,
        attend=select(ATTEND, "reference", device="cpu").run,
        bias=here.key_bias(bias, len(q)),
    )


@pytest.mark.parametrize("with_bias", [False, True])
def test_two_steps_are_the_definition(with_bias) -> None:
    generator = torch.Generator().manual_seed(0)

    def step():
        return [2.0 * torch.randn(2, VIDEO + TEXT, 2, 8, generator=generator) for _ in range(3)]

    bias = torch.zeros(2, 1, 1, VIDEO + TEXT)
    if with_bias:
        bias[1, ..., VIDEO + 6 :] = float("-inf")
    technique, first = Chipmunk(columns=0.2), step()
    second = [x + 0.3 * more for x, more in zip(first, step(), strict=True)]
    view_first, view_second = view(*first, bias), view(*second, bias)
    dense, kept = technique.attention(view_first, None)
    later, kept_after = technique.attention(view_second, kept)
    dense, later = (view_first.layout.restore(x) for x in (dense, later))

    block_of = torch.arange(VIDEO) // BLOCK
    columns = math.ceil(0.2 * VIDEO)
    for b in range(2):
        for h in range(2):
            (q, k, v), (q1, k1, v1) = ([x[b, :, h].double() for x in xs] for xs in (first, second))
            by_hand = Dense(q, k, v, block_of, columns, bias[b, 0, 0].double())
            torch.testing.assert_close(dense[b, :, h].double(), by_hand.out, rtol=1e-4, atol=1e-4)
            want = by_hand.later(q1, k1, v1, bias[b, 0, 0].double())
            torch.testing.assert_close(later[b, :, h].double(), want, rtol=1e-3, atol=1e-4)
    sizes = view_first.layout.counts
    assert kept_after.pairs(sizes, 2, 3) == 6 * (VIDEO * (columns + TEXT) + TEXT * (VIDEO + TEXT))
    assert kept.pairs(sizes, 1, 1) == 50 * 50 + VIDEO * (25 + columns + TEXT)


def test_all_columns_are_plain_attention() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (
        [torch.randn(1, VIDEO + TEXT, 2, 8, generator=generator) for _ in range(3)] for _ in "ab"
    )
    technique, last = Chipmunk(columns=1.0), view(*second, None)
    _, kept = technique.attention(view(*first, None), None)
    got = last.layout.restore(technique.attention(last, kept)[0])
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in second)).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class ByHand:
    """The oracle in one site's processor: keeps the last dense step of every branch."""

    def __init__(self, technique, clock) -> None:
        self.technique, self.clock, self.kept = technique, clock, {}

    def __call__(self, q, k, v, mask=None):
        clock, t = self.clock[0], self.technique
        plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        if clock.step < t.dense_steps:
            return plain
        fresh, out = (clock.step - t.dense_steps) % t.refresh == 0, plain.clone()
        block_of = torch.arange(q.shape[1]) // BLOCK
        columns = math.ceil(t.columns * q.shape[1])
        for b in range(q.shape[0]):
            for h in range(q.shape[2]):
                key, one = (clock.branch, b, h), [x[b, :, h].double() for x in (q, k, v)]
                if fresh:
                    self.kept[key] = Dense(*one, block_of, columns)
                else:
                    out[b, :, h] = self.kept[key].later(*one).to(out)
        return out


@pytest.mark.parametrize(
    "technique", [Chipmunk(refresh=3), Chipmunk(columns=0.3, refresh=4, dense_steps=0, dense_layers=1)]
)
def test_a_generation_equals_the_oracle(technique) -> None:
    pipe, clock = models.pipeline("wan2.1"), []
    adapter = for_module(pipe.transformer)
    for site in adapter.expert("transformer", pipe.transformer).attentions:
        if site.kind == "self" and site.index >= technique.dense_layers:
            site.module.set_processor(adapter.processor(site, ByHand(technique, clock)))
    subject = Subject("wan2.1", CLIP)
    with accelerate(pipe, Plan(), model=subject.model) as session:
        clock.append(session.clock)
        want = subject.generate(session).latents
    run = subject.run(technique)
    assert distance(run.latents, want) < 1e-3
    assert distance(want, subject.exact().latents) > 5e-3
    assert run.receipt.attention_pairs < run.receipt.attention_pairs_dense


def test_estimate_is_what_is_counted() -> None:
    subject = Subject("wan2.1", CLIP)
    for technique in (Chipmunk(), Chipmunk(refresh=2, dense_steps=3), Chipmunk(dense_layers=1)):
        receipt = subject.run(technique).receipt
        estimate = technique.estimate(subject.model, subject.workload(), subject.base_estimate())
        assert estimate.attention_pairs[0] == pytest.approx(receipt.attention_pairs)
        assert estimate.attention_pairs[1] == pytest.approx(receipt.attention_pairs)

"""Delta-DiT against a sampler loop that skips one group of blocks or the other, written out by hand."""

from __future__ import annotations

import pytest
import torch

from vivace.core.errors import PlanError
from vivace.techniques.base import Estimate
from vivace.techniques.caching.delta_dit import DeltaDiT
from vivace.testing.subjects import PROMPT, Subject


def in_two_stages(full, early, count):
    """The blocks of one step: all of them, or all but the last or first `count`."""
    residual = {}

    def stack(step, branch, h, blocks):
        depth = len(blocks)
        skipped = range(0)
        if step not in full:
            skipped = range(depth - count, depth) if step < early else range(count)
        name = "back" if step < early else "front"
        inputs = []
        for i, block in enumerate(blocks):
            inputs.append(h)
            if i not in skipped:
                h = block(h)
            elif i == skipped[0]:
                h = h + residual[branch, name]
        if step in full:
            inputs.append(h)
            residual[branch, "front"] = inputs[count] - inputs[0]
            residual[branch, "back"] = inputs[depth] - inputs[depth - count]
        return h

    return stack


@pytest.mark.parametrize(
    ("settings", "full", "early", "count"),
    [
        (DeltaDiT(), {0, 2, 4, 6}, 4, 3),
        (DeltaDiT(interval=3, blocks=0.5), {0, 3, 6}, 4, 2),
        (DeltaDiT(interval=4, blocks=0.25, switch=0.25, warmup=2, tail=1), {0, 1, 5, 7}, 2, 1),
        (DeltaDiT(interval=4, blocks=1.0, switch=0.7), {0, 4}, 6, 4),
        (DeltaDiT(interval=3, switch=0.0), {0, 3, 6}, 0, 3),
        (DeltaDiT(interval=3, switch=1.0), {0, 3, 6}, 8, 3),
        (DeltaDiT(interval=9, switch=0.9, max_consecutive=1), {0, 2, 4, 6}, 8, 3),
    ],
)
def test_equals_the_loop_written_by_hand(settings, full, early, count, sampler_by_hand):
    expected = sampler_by_hand(in_two_stages(full, early, count), prompt=PROMPT, seed=7)
    run = Subject("wan2.1").run(settings)
    assert [s.branches[0].blocks_run for s in run.receipt.steps] == [
        4 if i in full else 4 - count for i in range(8)
    ]
    assert run.receipt.nfe == 16
    assert torch.allclose(run.latents, expected, atol=5e-5)


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2", "cogvideox", "ltx", "hunyuan"])
def test_the_estimate_is_exact_before_anything_is_loaded(name):
    subject, settings = Subject(name), DeltaDiT(interval=3)
    exact = subject.exact().receipt.counts
    run = subject.run(settings)
    base = Estimate.exact(exact["nfe"], exact["blocks_run"], exact["attention_pairs"], exact["flops"])
    estimate = settings.estimate(subject.model, subject.workload(), base)
    assert estimate.problems(run.receipt.counts) == []
    if len(subject.experts) == 1:
        assert estimate.blocks_run[0] == estimate.blocks_run[1] < exact["blocks_run"]


def test_the_stage_decides_which_blocks_are_skipped():
    """Blocks are told apart by what they add: skipping the front is not skipping the back."""
    front, back = (Subject("wan2.1").run(DeltaDiT(switch=s)) for s in (0.0, 1.0))
    assert front.receipt.blocks_run == back.receipt.blocks_run
    assert not torch.allclose(front.latents, back.latents, atol=1e-3)


def test_a_share_of_no_block_is_refused_with_the_share_of_one():
    with pytest.raises(PlanError, match=r"one block is 0\.25"):
        Subject("wan2.1").run(DeltaDiT(blocks=0.1))

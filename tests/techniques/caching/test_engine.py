"""The cache engine: votes, mixed batches, storage, experts, agreement over ranks, quantised networks."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.multiprocessing as mp
from agreeing_ranks import SEEN, agree

from vivace.core.errors import ConfigError
from vivace.plans.plan import Plan
from vivace.techniques.caching.engine import QUANTISED_GAIN, even_mask
from vivace.techniques.caching.first_block_cache import FirstBlockCache
from vivace.techniques.caching.taylorseer import TaylorSeer
from vivace.techniques.caching.votes import quantised
from vivace.techniques.compression.int8_linear import Int8Linear
from vivace.testing.subjects import Subject, distance

EAGER = FirstBlockCache(threshold=1.0, warmup=1, tail=0, max_consecutive=50)


def by_branch(receipt, branch):
    """Blocks run of a branch, step by step."""
    return [b.blocks_run for s in receipt.steps for b in s.branches if b.branch == branch]


def rows_of(session):
    """The cache's memory by (branch, sample); there is one site in these tests."""
    (memory,) = (v for k, v in session.store._data.items() if k[0] == "first_block_cache")
    return memory.rows


def test_even_mask_by_hand():
    assert even_mask(8, 3, 2, 1) == (True, True, False, False, True, False, False, True)
    assert even_mask(4, 9, 0, 0) == (True, False, False, False)
    assert even_mask(3, 1, 0, 0) == (True, True, True)


def test_the_unconditional_branch_follows_the_conditional_and_keeps_its_own_residual():
    subject, seen = Subject("wan2.1"), {}

    def look(clock, record):
        if clock.step == 5:
            seen.update({n: r.history.entries[0] for n, r in rows_of(session).items()})

    with subject.open(FirstBlockCache(threshold=0.12, warmup=1), on_step=look) as session:
        run = subject.generate(session)
    cond, uncond = by_branch(run.receipt, "cond"), by_branch(run.receipt, "uncond")
    assert cond == uncond
    assert {1, 4} == set(cond)
    assert set(seen) == {("cond", 0), ("uncond", 0)}
    a, b = (seen[name, 0].values[0].get() for name in ("cond", "uncond"))
    assert a.shape == b.shape
    assert not torch.equal(a, b)
    assert seen["cond", 0].at == seen["uncond", 0].at


def test_a_batch_of_samples_that_disagree_equals_the_samples_alone():
    subject = Subject("wan2.1")
    prompts, seeds = ["a red ball", "zzz 99 !!", "two blue cones"], [3, 11, 5]
    for threshold in (0.08, 0.1, 0.12, 0.15):
        settings = FirstBlockCache(threshold=threshold, warmup=1)
        batch = subject.run(settings, prompt=prompts, seed=seeds, negative_prompt=[""] * 3)
        mixed = any(1 < n < 4 for n in by_branch(batch.receipt, "cond"))
        if mixed:
            break
    assert mixed
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = subject.run(settings, prompt=prompt, seed=seed, negative_prompt="")
        assert torch.allclose(batch.latents[i], alone.latents[0], atol=1e-4)


@pytest.mark.parametrize(
    ("storage", "share", "error"), [("bf16", 0.5, 0.01), ("fp8", 0.25, 0.1)], ids=["bf16", "fp8"]
)
def test_storage_takes_fewer_bytes_and_changes_little(storage, share, error):
    subject = Subject("wan2.1")
    whole = subject.run(TaylorSeer(interval=2))
    small = subject.run(TaylorSeer(interval=2, storage=storage))
    assert whole.receipt.cache_bytes > 0
    # fp8 adds one float32 scale for each tensor: two orders of two branches.
    extra = 4 * 4 if storage == "fp8" else 0
    assert small.receipt.cache_bytes == whole.receipt.cache_bytes * share + extra
    assert 0 < distance(small.latents, whole.latents) < error


def test_offloading_changes_nothing_where_the_host_is_the_device():
    subject = Subject("wan2.1")
    whole, away = (subject.run(TaylorSeer(interval=2, offload=o)) for o in (False, True))
    assert torch.equal(whole.latents, away.latents)
    assert away.receipt.cache_bytes == whole.receipt.cache_bytes


def test_unknown_storage_is_refused():
    with pytest.raises(ConfigError, match="storage must be one of same, bf16, fp8"):
        TaylorSeer(storage="int4")


def test_the_second_expert_starts_with_nothing():
    subject = Subject("wan2.2")
    run = subject.run(EAGER)
    by_step = [(s.branches[0].expert, s.branches[0].blocks_run) for s in run.receipt.steps]
    names = [name for name, _ in by_step]
    assert len(set(names)) == 2
    boundary = names.index(names[-1])
    full = [i for i, (_, blocks) in enumerate(by_step) if blocks == 4]
    assert full == sorted({0, boundary})


def test_a_plan_of_few_steps_is_told_that_nothing_can_be_gained():
    model = Subject("wan2.1", {"num_inference_steps": 4}).model

    def said(**settings):
        problems = Plan([FirstBlockCache(**settings)]).problems(model)
        return [p for p in problems if "nothing can be gained" in str(p)]

    (warning,) = said(warmup=3, tail=1)
    assert warning.severity == "warning"
    assert not said(warmup=2, tail=1)
    assert not said(warmup=3, tail=1, threshold=0.0)


def test_ranks_agree_on_the_mean_of_what_they_see(tmp_path):
    mp.spawn(agree, args=(str(tmp_path),), nprocs=2)
    (one, mine), (two, others) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == two == [pytest.approx(0.2), math.inf]
    assert (mine, others) == (pytest.approx(SEEN[0]), pytest.approx(SEEN[1]))


def test_quantised_linears_are_seen_and_hold_the_forecast_back():
    subject = Subject("wan2.1")
    assert not any(map(quantised, subject.experts))
    with subject.open(Int8Linear()):
        assert all(map(quantised, subject.experts))
    assert not any(map(quantised, subject.experts))
    # One forecast, at step 4 of 8 from steps 0 to 3. Weights of order 1 are 2 and -1, of order 2 are 2.5, -2 and 0.5.
    orders = [TaylorSeer(order=n, interval=2, warmup=4, tail=3) for n in (1, 2)]
    assert 2 + 1 <= QUANTISED_GAIN < 2.5 + 2 + 0.5
    held = [subject.run(Int8Linear(), t).latents for t in orders]
    free = [subject.run(t).latents for t in orders]
    assert torch.equal(*held)
    assert not torch.equal(*free)

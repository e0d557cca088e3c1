"""Sliding-tile and radial attention on live pipelines, against dense attention under the same token mask."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from vivace import Plan, accelerate
from vivace.core.errors import PlanError
from vivace.models.describe import describe_pipeline
from vivace.models.families import for_module
from vivace.plans.costs import baseline
from vivace.techniques.attention.radial import Radial
from vivace.techniques.attention.sliding_tile import SlidingTile
from vivace.testing import models

FAMILIES = ("wan2.1", "wan2.2", "cogvideox", "ltx", "hunyuan")
CASES = (
    SlidingTile(window=0.05),
    SlidingTile(window=0.05, dense_steps=2),
    Radial(near=0, decay=2.0),
    Radial(near=0, sink=0, dense_layers=1),
)


def generate(pipe, techniques, family, **options):
    call = models.call(family) | {"num_inference_steps": 4, "output_type": "latent"} | options.pop("call", {})
    with accelerate(pipe, Plan(techniques), **options) as fast:
        return fast("a red sphere", seed=3, **call)


def latents(out) -> torch.Tensor:
    return torch.as_tensor(out.raw.frames)


class MaskedDense:
    """The oracle: dense attention under the technique's token mask, which counts the pairs it visits."""

    def __init__(self, technique) -> None:
        self.technique, self.clock, self.visited = technique, None, 0

    def __call__(self, q, k, v, mask=None):
        allowed = torch.ones(1, 1, q.shape[1], k.shape[1], dtype=torch.bool)
        if self.clock.step >= self.technique.dense_steps:
            block_map = self.technique.block_map(self.clock.evaluation.grid)
            allowed = torch.from_numpy(block_map.token_mask())[None]
        self.visited += int(allowed.sum()) * q.shape[0] * q.shape[2]
        if mask is not None:
            allowed = allowed & mask
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)


def by_hand(family, technique) -> tuple[torch.Tensor, int]:
    """Latents and visited pairs of a run with the oracle put into the processors by hand."""
    pipe, oracle = models.pipeline(family), MaskedDense(technique)
    for name in ("transformer", "transformer_2"):
        if (module := getattr(pipe, name, None)) is None:
            continue
        adapter = for_module(module)
        expert = adapter.expert(name, module)
        last = len(expert.blocks) - technique.dense_layers
        for site in expert.attentions:
            if site.kind != "cross" and technique.dense_layers <= site.index < last:
                site.module.set_processor(adapter.processor(site, oracle))
    with accelerate(pipe, Plan()) as session:
        oracle.clock = session.clock
        call = models.call(family) | {"num_inference_steps": 4, "output_type": "latent"}
        out = session("a red sphere", seed=3, **call)
    return latents(out), oracle.visited


@functools.cache
def exact(family):
    return generate(models.pipeline(family), (), family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("technique", CASES, ids=lambda t: f"{t.card.name}-{t.dense_steps}-{t.dense_layers}")
def test_equals_masked_dense_attention_and_counts_it(family, technique) -> None:
    pipe = models.pipeline(family)
    want, _ = by_hand(family, technique)
    out = generate(pipe, [technique], family)
    torch.testing.assert_close(latents(out), want, rtol=2e-3, atol=2e-4)
    assert not torch.equal(latents(out), latents(exact(family)))
    assert out.receipt.attention_pairs < out.receipt.attention_pairs_dense

    model = describe_pipeline(pipe)
    call = models.call(family)
    workload = model.workload(
        frames=call["num_frames"],
        height=call["height"],
        width=call["width"],
        steps=4,
        text=call["max_sequence_length"],
        guidance=call.get("true_cfg_scale"),
    )
    estimate = technique.estimate(model, workload, baseline(model, workload))
    counts = {n: getattr(out.receipt, n) for n in ("nfe", "blocks_run", "attention_pairs", "flops")}
    assert estimate.problems(counts) == []


def test_visited_pairs_are_the_oracles() -> None:
    technique = SlidingTile(window=0.05, dense_steps=1)
    _, visited = by_hand("wan2.1", technique)
    receipt = generate(models.pipeline("wan2.1"), [technique], "wan2.1").receipt
    skipped = receipt.attention_pairs_dense - receipt.attention_pairs
    grid_tokens = 12  # 3 latent frames of 2 x 2 tokens
    everything = grid_tokens**2 * 2 * receipt.blocks_run
    assert visited == everything - skipped


@pytest.mark.parametrize("technique", [SlidingTile(window=1.0), Radial(decay=0.0)])
def test_identity_is_left_out(technique) -> None:
    out = generate(models.pipeline("wan2.1"), [technique], "wan2.1")
    assert torch.equal(latents(out), latents(exact("wan2.1")))
    assert out.receipt.techniques == []


@pytest.mark.parametrize("family", ["wan2.1", "hunyuan"])
def test_dense_steps_come_first(family) -> None:
    technique = SlidingTile(window=0.05, dense_steps=3)
    seen = []

    def watch(clock, record) -> None:
        seen.append(bool(record.branches and any(technique.card.name in b.by for b in record.branches)))

    generate(models.pipeline(family), [technique], family, on_step=watch)
    assert seen == [False, False, False, True]


def test_a_pattern_that_keeps_everything_runs_the_models_own_attention() -> None:
    """One latent frame has no distance in time."""
    one_frame = {"num_frames": 1}
    pipe = models.pipeline("wan2.1")
    want = generate(pipe, (), "wan2.1", call=one_frame)
    out = generate(pipe, [Radial()], "wan2.1", call=one_frame)
    assert torch.equal(latents(out), latents(want))
    assert out.receipt.attention_pairs == out.receipt.attention_pairs_dense
    assert out.receipt.kernels == []


def test_masks_are_built_once_for_each_shape(monkeypatch) -> None:
    built = []
    original = SlidingTile.block_map
    monkeypatch.setattr(
        SlidingTile, "block_map", lambda self, grid: built.append(grid) or original(self, grid)
    )
    pipe = models.pipeline("wan2.1")
    call = models.call("wan2.1") | {"num_inference_steps": 3, "output_type": "latent"}
    with accelerate(pipe, Plan([SlidingTile(window=0.05)])) as fast:
        built.clear()
        for height in (32, 48, 32):
            fast("a red sphere", seed=1, **call | {"height": height})
    assert [str(g) for g in built] == ["3x2x2", "3x3x2"]


def test_compiled_blocks_compile_twice_and_never_again() -> None:
    from torch._dynamo.utils import counters

    technique = SlidingTile(window=0.05, dense_steps=2)
    pipe = models.pipeline("wan2.1")
    eager = generate(pipe, [technique], "wan2.1")
    torch._dynamo.reset()
    counters.clear()
    call = models.call("wan2.1") | {"num_inference_steps": 4, "output_type": "latent"}
    with accelerate(pipe, Plan([technique]), compile_backend="eager") as fast:
        first = fast("a red sphere", seed=3, **call)
        graphs = counters["stats"]["unique_graphs"]
        again = fast("a red sphere", seed=3, **call)
    assert graphs == 2
    assert counters["stats"]["unique_graphs"] == graphs
    for out in (first, again):
        torch.testing.assert_close(latents(out), latents(eager), rtol=1e-5, atol=1e-5)
        assert out.receipt.flops == eager.receipt.flops
        assert out.receipt.attention_pairs == eager.receipt.attention_pairs


def test_receipt_names_the_kernel_and_the_reason() -> None:
    out = generate(models.pipeline("wan2.2"), [SlidingTile(window=0.05)], "wan2.2")
    (kernel,) = out.receipt.kernels
    assert (kernel.op, kernel.choice) == ("block_sparse_attention", "gather")
    assert "flex" in kernel.why
    assert out.receipt.techniques[0].effects == {"sites": 8, "sparse_evaluations": 8}


def test_claims_are_the_sparse_layers_alone() -> None:
    model = describe_pipeline(models.pipeline("wan2.1"))
    (claim,) = SlidingTile(dense_layers=1).claims(model)
    assert claim.sites == {"transformer.blocks.1.attn1", "transformer.blocks.2.attn1"}
    problems = Plan([SlidingTile(), Radial()]).problems(model)
    assert any(p.kind == "conflict" and "attention.kernel" in p.message for p in problems)


def test_problems_are_told_before_anything_is_loaded() -> None:
    model = describe_pipeline(models.pipeline("wan2.1"))
    with pytest.raises(PlanError, match="keeps all 4 layers dense"):
        Plan([SlidingTile(dense_layers=2)]).check(model)
    with pytest.raises(
        PlanError, match="backend must be one of auto, hopper, triton, flex, gather, reference"
    ):
        Plan([Radial(backend="magic")]).check(model)
    warnings = Plan([SlidingTile(window=0.95)]).check(model)
    assert any("no gain at this shape" in str(w) for w in warnings)

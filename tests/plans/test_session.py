"""A session announces, counts and gives the pipeline back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

import vivace
from vivace.core.errors import ConfigError, NoEffectError, PlanError, SessionError, ShapeError
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, Technique, exclusive, knob
from vivace.testing.models import CALL, pipeline


def make_card(name: str, stage: Stage = Stage.CACHE, **changes) -> Card:
    facts = {
        "paradigm": Paradigm.CACHING,
        "summary": "For the test.",
        "objective": "latency",
        "claims": (exclusive("block.output"),),
        "cite": Cite("none"),
        "needs": (Need.ORDERED_BLOCKS,),
    }
    return Card(name=name, stage=stage, **facts | changes)


@dataclass(frozen=True, kw_only=True)
class Scale(Technique):
    """Multiplies the last block's output; records what the clock said."""

    card: ClassVar[Card] = make_card("scale")
    factor: float = knob(1.01, low=0.5, high=2.0, identity=1.0)
    seen: ClassVar[list] = []

    def apply(self, target):
        clock = target.clock

        def handler(call, run):
            hidden, text = run(call)
            e = clock.evaluation
            self.seen.append((clock.step, clock.branch, clock.expert, round(clock.sigma, 3), str(e.grid)))
            target.report("scale", "scaled", 1)
            return hidden * self.factor, text

        for expert in target.experts:
            target.around_block(expert.blocks[-1], handler)


@dataclass(frozen=True, kw_only=True)
class Nothing(Technique):
    card: ClassVar[Card] = make_card("nothing", claims=(exclusive("step.skip"),))

    def apply(self, target):
        pass


@dataclass(frozen=True, kw_only=True)
class Breaks(Technique):
    card: ClassVar[Card] = make_card("breaks", Stage.TRAJECTORY, claims=(exclusive("vae.decode"),))

    def apply(self, target):
        target.edit.wrap(target.pipeline.vae, lambda old: old, "decode")
        raise MemoryError("half way")


@pytest.fixture(scope="module")
def wan():
    return pipeline("wan2.1")


def plain(pipe, prompt="a red sphere", **changes) -> np.ndarray:
    return pipe(prompt, generator=torch.Generator().manual_seed(3), **CALL | changes).frames


def structure(pipe) -> list:
    parts = [pipe.transformer, pipe.vae, pipe.text_encoder]
    inside = [(n, id(m), sorted(vars(m))) for part in parts for n, m in part.named_modules()]
    return [sorted(vars(pipe)), sorted(vars(pipe.scheduler)), id(pipe.scheduler), inside]


def test_empty_plan_is_bit_identical_and_leaves_no_trace(wan):
    want = plain(wan)
    before = structure(wan)
    with accelerate(wan, "exact") as fast:
        out = fast("a red sphere", seed=3, **CALL)
        direct = plain(wan)
        direct_counts = fast.receipt().counts
    assert np.array_equal(out.raw.frames, want)
    assert np.array_equal(direct, want)
    assert structure(wan) == before
    assert out.receipt.counts == direct_counts, "a pipeline driven directly gives the same receipt"
    assert np.array_equal(plain(wan), want)
    assert out.frames.shape == (9, 32, 32, 3)
    assert out.frames.dtype == np.uint8


def test_receipt_of_the_exact_run(wan):
    with accelerate(wan, "exact") as fast:
        r = fast("a red sphere", seed=3, **CALL).receipt
    assert (r.nfe, r.nfe_requested, r.blocks_run, r.blocks_total, r.samples) == (16, 16, 64, 64, 1)
    assert r.flops == r.flops_dense > 0
    tokens, text, heads = 3 * 2 * 2, 16, 2
    assert r.attention_pairs == r.attention_pairs_dense == 64 * heads * tokens * (tokens + text)
    assert [s.index for s in r.steps] == list(range(8))
    assert all(s.seconds > 0 for s in r.steps)
    assert {b.action for s in r.steps for b in s.branches} == {"computed"}
    assert r.completed
    assert not r.warnings
    parts = [r.stages[k] for k in ("text", "denoise", "vae", "other")]
    assert sum(parts) == pytest.approx(r.stages["total"], rel=1e-6)
    assert all(p > 0 for p in parts[:3])
    tensors = [*wan.transformer.parameters(), *wan.transformer.buffers()]
    assert r.weight_bytes == sum(t.numel() * t.element_size() for t in tensors)


def test_batch_counts_rows_once(wan):
    with accelerate(wan, "exact") as fast:
        one = fast("a", seed=3, **CALL)
        two = fast(["a", "b"], seed=[3, 9], **CALL)
    assert two.receipt.nfe == one.receipt.nfe == 16
    assert two.receipt.flops == 2 * one.receipt.flops
    assert two.receipt.samples == 2
    assert len(two.videos) == 2
    assert np.abs(two.videos[0].astype(int) - one.frames.astype(int)).max() <= 1


def test_the_clock_tells_step_branch_expert_and_grid():
    pipe = pipeline("wan2.2")
    Scale.seen.clear()
    with accelerate(pipe, Plan([Scale()])) as fast:
        r = fast("a", seed=3, **CALL).receipt
    assert [s[0] for s in Scale.seen] == [i for i in range(8) for _ in range(2)]
    assert [s[1] for s in Scale.seen] == ["cond", "uncond"] * 8
    experts = [s[2] for s in Scale.seen]
    assert experts == sorted(experts), "the high-noise expert comes first"
    assert set(experts) == {"transformer", "transformer_2"}
    sigmas = [s[3] for s in Scale.seen[::2]]
    assert sigmas == sorted(sigmas, reverse=True)
    assert {s[4] for s in Scale.seen} == {"3x2x2"}
    assert r.techniques[0].effects == {"scaled": 16}
    assert r.techniques[0].edits == 2


def test_aborted_generation_leaves_nothing(wan):
    want = plain(wan)

    def stop(pipe, step, timestep, kwargs):
        if step == 2:
            raise RuntimeError("user pressed stop")
        return kwargs

    with accelerate(wan, Plan([Scale(factor=1.0001)])) as fast:
        with pytest.raises(RuntimeError, match="pressed stop"):
            fast("a", seed=3, callback_on_step_end=stop, **CALL)
        assert not fast.clock.running
        assert len(fast.store) == 0
        assert not fast.receipt().completed
    assert np.array_equal(plain(wan), want)


def test_failed_apply_leaves_the_pipeline_untouched(wan):
    before, want = structure(wan), plain(wan)
    with pytest.raises(MemoryError, match="half way"):
        accelerate(wan, Plan([Scale(), Breaks()]))
    assert structure(wan) == before
    assert np.array_equal(plain(wan), want)


def test_a_technique_that_finds_nothing_is_an_error(wan):
    with pytest.raises(NoEffectError, match="nothing found nothing to change"):
        accelerate(wan, Plan([Nothing()]))


def test_one_session_at_a_time_and_none_after_close(wan):
    fast = accelerate(wan, "exact")
    with pytest.raises(SessionError, match="another session"):
        accelerate(wan, "exact")
    fast.close()
    fast.close()
    with pytest.raises(SessionError, match="closed"):
        fast("a", **CALL)


def test_bad_arguments_are_refused_before_anything_runs(wan):
    with accelerate(wan, "exact") as fast:
        with pytest.raises(ShapeError, match="nearest to 10: 9 or 13"):
            fast("a", **CALL | {"num_frames": 10})
        with pytest.raises(ConfigError, match="no argument called colour"):
            fast("a", colour="red", **CALL)
        with pytest.raises(ConfigError, match="2 samples need 2 seeds"):
            fast(["a", "b"], seed=[1], **CALL)


def test_steps_listener_sees_every_step(wan):
    seen = []
    with accelerate(
        wan, "exact", on_step=lambda clock, record: seen.append((record.index, clock.num_steps))
    ) as fast:
        fast("a", **CALL)
    assert seen == [(i, 8) for i in range(8)]


@pytest.mark.parametrize("backend", ["eager"])
def test_compiled_blocks_count_the_same(wan, backend):
    torch._dynamo.reset()
    with accelerate(wan, "exact") as fast:
        want = fast("a", seed=3, **CALL)
    with accelerate(wan, "exact", compile_backend=backend) as fast:
        got = fast("a", seed=3, **CALL)
        again = fast("a", seed=3, **CALL | {"num_inference_steps": 5})
    assert got.receipt.counts == want.receipt.counts
    assert np.abs(got.frames.astype(int) - want.frames.astype(int)).max() <= 1
    assert again.receipt.flops == pytest.approx(want.receipt.flops * 5 / 8)


def test_counters_off_is_the_same_picture(wan):
    want = plain(wan)
    with accelerate(wan, "exact", counters=False) as fast:
        assert np.array_equal(fast("a red sphere", seed=3, **CALL).raw.frames, want)


def test_public_verbs():
    assert vivace.accelerate is accelerate
    assert vivace.Plan is Plan
    assert isinstance(PlanError([]), vivace.VivaceError)


def test_wrapping_helper_is_transparent_outside_a_generation(wan):
    x = torch.zeros(1, 16, 3, 4, 4)
    call: dict[str, object] = {
        "hidden_states": x,
        "timestep": torch.tensor([5.0]),
        "encoder_hidden_states": torch.zeros(1, 16, 32),
    }
    run: Callable[[], torch.Tensor] = lambda: wan.transformer(**call).sample  # noqa: E731
    with torch.no_grad():
        want = run()
        with accelerate(wan, Plan([Scale(factor=2.0)])):
            assert torch.equal(run(), want)


def test_density_is_of_the_blocks_that_ran(wan):
    from vivace.techniques.trajectory.guidance_interval import GuidanceInterval

    with accelerate(wan, Plan([GuidanceInterval(high=0.5)])) as fast:
        r = fast("a red sphere", seed=3, **CALL).receipt
    assert r.attention_pairs < r.attention_pairs_dense
    assert r.density == 1.0, "skipping an evaluation makes no attention sparse"

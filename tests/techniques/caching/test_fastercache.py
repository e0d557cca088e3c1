"""FasterCache against guidance and attention cached by hand, and the bands against a DFT written out."""

from __future__ import annotations

import math

import pytest
import torch
from modules_by_hand import Steps, cache_by_hand, record_runs

from vivace.core.shapes import TokenGrid
from vivace.techniques.caching.fastercache import FasterCache
from vivace.techniques.caching.frequencies import split
from vivace.testing.subjects import Subject, distance

OPEN = FasterCache(warmup=1, below=1000.0, interval=2, guidance_interval=4)
# Of eight steps: the unconditional branch at 0 and 4; attention at 0, 2, 4, 6.


def low_by_hand(plane):
    """Sum of the waves of a plane (H, W) whose frequencies lie in the circle, in double precision."""
    h, w = plane.shape
    radius, out = min(h, w) // 5, torch.zeros(h, w, dtype=torch.complex128)
    rows, columns = torch.arange(h).double()[:, None], torch.arange(w).double()[None, :]
    for u in range(-(h // 2), (h + 1) // 2):
        for v in range(-(w // 2), (w + 1) // 2):
            if u * u + v * v <= radius * radius:
                wave = torch.exp(2j * math.pi * (u * rows / h + v * columns / w))
                out += (plane.double() * wave.conj()).sum() / (h * w) * wave
    return out.real


def test_bands_are_those_of_a_transform_written_out():
    x = torch.randn(2, 3, 2, 10, 15, generator=torch.Generator().manual_seed(0))
    low, high = split(x, None)
    for index in [(0, 0, 0), (1, 2, 1)]:
        assert torch.allclose(low[index].double(), low_by_hand(x[index]), atol=1e-5)
    assert torch.allclose(low + high, x, atol=1e-6)
    packed = x.permute(0, 2, 3, 4, 1).flatten(1, 3)
    again, _ = split(packed, TokenGrid(2, 10, 15))
    assert torch.allclose(again.unflatten(1, (2, 10, 15)).permute(0, 4, 1, 2, 3), low, atol=1e-5)
    whole, nothing = split(packed, TokenGrid(1, 10, 15))
    assert torch.equal(whole, packed)
    assert not nothing.any()


def guidance_by_hand(pipe, ran, alpha, inside):
    """Answer the second call of a step, unless `ran(step)`, with the first one plus the last gap."""
    forward, steps = pipe.transformer.forward, None
    memory = {}

    def call(*args, **kwargs):
        if steps.calls == 1:
            memory["cond"] = forward(*args, **kwargs)[0]
            return (memory["cond"],)
        if ran(steps.step):
            out = forward(*args, **kwargs)[0]
            memory["gap"] = out - memory["cond"]
            return (out,)
        gap, time = memory["gap"], float(pipe.scheduler.timesteps[steps.step])
        low = torch.stack([low_by_hand(p) for p in gap.flatten(0, 2)]).view(gap.shape).float()
        a, b = (alpha if inside(time, *band) else 1.0 for band in ((99, 901), (-1, 301)))
        return (memory["cond"] + a * low + b * (gap - low),)

    pipe.transformer.forward = call
    steps = Steps(pipe)
    return pipe


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_guidance_equals_the_gap_kept_by_hand(alpha):
    settings = OPEN.replace(interval=1, alpha=alpha)
    subject = Subject("wan2.1")
    guidance_by_hand(subject.pipeline, lambda s: s in (0, 4), alpha, lambda t, a, b: a < t < b)
    expected = subject.plain()
    run = Subject("wan2.1").run(settings)
    assert distance(run.latents, expected) < 1e-5
    assert run.receipt.nfe == 8 + 2
    exact = Subject("wan2.1").exact()
    assert run.receipt.flops == pytest.approx(exact.receipt.flops * 10 / 16)
    assert distance(run.latents, exact.latents) > 1e-4


def test_attention_equals_the_extrapolation_by_hand():
    settings = OPEN.replace(guidance_interval=1, momentum=0.8)

    def extrapolate(values, step):
        if len(values) < 2:
            return values[-1][1]
        newest, before = values[-1][1], values[-2][1]
        return newest + 0.8 * step / 8 * (newest - before)

    for name in ("wan2.1", "cogvideox", "hunyuan"):
        subject = Subject(name)
        cache_by_hand(subject.pipeline, lambda kind, step: kind != "self" or step % 2 == 0, extrapolate)
        expected = subject.plain()
        assert distance(Subject(name).run(settings).latents, expected) < 1e-5, name


def test_a_constant_gap_is_rebuilt_without_error():
    """Where the branches differ by a constant, skipped evaluations are what they would have been."""
    shift = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def constant(subject):
        forward, steps, memory = subject.pipeline.transformer.forward, [0], {}

        def call(*args, **kwargs):
            out = forward(*args, **kwargs)[0]
            steps[0] += 1
            if "cond" not in memory or memory["step"] != float(kwargs["timestep"].flatten()[0]):
                memory.update(cond=out, step=float(kwargs["timestep"].flatten()[0]))
                return (out,)
            return (memory["cond"] + shift,)

        subject.pipeline.transformer.forward = call
        return subject

    exact = constant(Subject("wan2.1")).plain()
    run = constant(Subject("wan2.1")).run(OPEN.replace(interval=1, alpha=1.0))
    assert run.receipt.nfe == 10
    assert distance(run.latents, exact) < 1e-6


@pytest.mark.parametrize("name", ["cogvideox", "ltx"])
def test_fused_guidance_evaluates_half_of_the_pair(name):
    run = Subject(name).run(OPEN)
    assert run.receipt.nfe == 10
    assert [s.branches[0].blocks_run for s in run.receipt.steps] == [8, 4, 4, 4, 8, 4, 4, 4]
    assert torch.isfinite(run.latents).all()


def test_steps_at_which_attention_really_runs():
    subject = Subject("wan2.1")
    ran = record_runs(subject.pipeline, subject.pipeline.scheduler)
    subject.run(OPEN.replace(guidance_interval=3))
    # The unconditional branch runs at 0, 3 and 6; at 3 its values are old, so that both compute.
    assert {s for s, kind, _ in ran if kind == "self"} == {0, 2, 3, 5, 6}


def test_above_the_timestep_nothing_is_reused():
    subject = Subject("wan2.1")
    receipt = subject.run(OPEN.replace(below=800.0)).receipt
    skipped = [s.timestep for s in receipt.steps if any(b.action == "skipped" for b in s.branches)]
    assert skipped
    assert max(skipped) < 800.0
    assert Subject("wan2.1").run(OPEN.replace(below=0.0)).latents.equal(subject.exact().latents)

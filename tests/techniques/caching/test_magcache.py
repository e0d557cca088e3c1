"""MagCache against the published recurrence in numpy, and against the sampler written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.calibration.artifact import Calibration, Curves, Key, model_hash
from vivace.core.errors import ConfigError, PlanError
from vivace.models.describe import describe_pipeline
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.base import Estimate
from vivace.techniques.caching.magcache import MagCache
from vivace.testing.models import call, pipeline

CURVE = (1.0, 1.03, 1.01, 0.98, 0.97, 0.99, 0.94, 0.9, 0.85, 0.7)


def generate(settings, name="wan2.1", **changes):
    with accelerate(pipeline(name), Plan([settings])) as fast:
        out = fast("a red ball", seed=3, output_type="latent", **{**call(name), **changes})
    return out.raw.frames, out.receipt


def skipped_steps(curve, steps, threshold, most, retention):
    """The original's loop: (steps,) bool, True where the step is skipped."""
    curve = np.asarray(curve)
    if len(curve) != steps:
        curve = curve[np.round(np.arange(steps) * (len(curve) - 1) / (steps - 1)).astype(int)]
    skipped = np.zeros(steps, dtype=bool)
    ratio, error, count = 1.0, 0.0, 0
    for i in range(max(1, int(steps * retention)), steps):
        ratio *= curve[i]
        count += 1
        error += np.abs(1 - ratio)
        if error < threshold and count <= most:
            skipped[i] = True
        else:
            ratio, error, count = 1.0, 0.0, 0
    return skipped


@pytest.mark.parametrize(
    ("steps", "threshold", "most", "retention"),
    [(10, 0.12, 2, 0.2), (8, 0.06, 3, 0.2), (16, 0.24, 6, 0.1), (5, 0.5, 50, 0.0), (12, 0.04, 1, 0.5)],
)
def test_the_skipped_steps_are_those_of_the_recurrence(steps, threshold, most, retention):
    settings = MagCache(threshold=threshold, max_consecutive=most, retention=retention, ratios=CURVE)
    expected = skipped_steps(CURVE, steps, threshold, most, retention)
    assert expected.any()
    _, receipt = generate(settings, num_inference_steps=steps)
    for branch in (0, 1):
        assert [s.branches[branch].action == "reused" for s in receipt.steps] == expected.tolist()


def test_a_skipped_step_adds_the_last_residual(sampler_by_hand):
    skipped = skipped_steps(CURVE, 8, 0.12, 2, 0.2)
    residual = {}

    def stack(step, branch, h, blocks):
        if skipped[step]:
            return h + residual[branch]
        out = h
        for block in blocks:
            out = block(out)
        residual[branch] = out - h
        return out

    expected = sampler_by_hand(stack, steps=8)
    latents, _ = generate(MagCache(ratios=CURVE))
    assert torch.allclose(latents, expected, atol=2e-5)


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2", "cogvideox", "ltx", "hunyuan"])
def test_the_estimate_is_exact_with_one_expert(name):
    settings = MagCache(ratios=CURVE, tail=1)
    _, exact = generate(MagCache(threshold=0.0), name)
    _, receipt = generate(settings, name)
    model = describe_pipeline(pipeline(name))
    base = Estimate.exact(exact.nfe, exact.blocks_run, exact.attention_pairs, exact.flops)
    estimate = settings.estimate(model, model.workload(frames=9, height=32, width=32, steps=8), base)
    assert estimate.problems(receipt.counts) == []
    assert receipt.blocks_run < exact.blocks_run
    if name != "wan2.2":
        assert estimate.blocks_run[0] == estimate.blocks_run[1]


def test_a_calibration_gives_the_curve(tmp_path):
    steps, zeros = len(CURVE), [0.0] * len(CURVE)
    curves = Curves(
        steps=list(range(steps)),
        residual_ratio=list(CURVE),
        residual_ratio_std=zeros,
        time_change=zeros,
        first_block_change=zeros,
        output_change=zeros,
    )
    pipe = pipeline("wan2.1")
    family = describe_pipeline(pipe).family
    shape = {"frames": 9, "height": 32, "width": 32, "steps": steps, "guidance": 5.0}
    artefact = Calibration(
        key=Key(model_hash=model_hash(pipe), family=family, scheduler="s", solver="s", **shape),
        prompts=1,
        prompts_sha256="00",
        seed=0,
        vivace="0",
        sigmas=[1.0 - i / steps for i in range(steps + 1)],
        timesteps=[1000.0 - i for i in range(steps)],
        gram=np.eye(2 * steps).tolist(),
        curves={"transformer": {"cond": curves}},
    )
    path = str(artefact.save(tmp_path / "a.json"))
    by_file, by_hand = generate(MagCache(calibration=path)), generate(MagCache(ratios=CURVE))
    assert torch.equal(by_file[0], by_hand[0])
    assert by_file[1].blocks_run < by_file[1].blocks_total


def test_without_a_curve_it_is_refused_with_the_way_out():
    with pytest.raises(PlanError, match="measure one with `vivace calibrate`"):
        accelerate(pipeline("wan2.1"), Plan([MagCache()]))
    with pytest.raises(PlanError, match="there is no calibration"):
        accelerate(pipeline("wan2.1"), Plan([MagCache(calibration="nowhere.json")]))
    with pytest.raises(ConfigError, match="not both"):
        MagCache(ratios=CURVE, calibration="a.json")

"""TeaCache against a pattern of skips computed beforehand, in numpy, from the timesteps alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.calibration.artifact import Calibration, Curves, Key, model_hash
from vivace.core.errors import ConfigError, PlanError
from vivace.models.describe import describe_pipeline
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.caching.teacache import TeaCache, horner, published
from vivace.testing.models import CALL, call, pipeline


def generate(pipe, settings, prompt="a red ball", seed=3, **changes):
    with accelerate(pipe, Plan([settings])) as fast:
        out = fast(prompt, seed=seed, output_type="latent", **{**CALL, **changes})
    return out.raw.frames, out.receipt


def with_shift(shift):
    pipe = pipeline("wan2.1")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=shift)
    return pipe


def embeddings(pipe, steps):
    """The time projection at every step, by the embedder's weights alone: (steps, 6 C) float64."""
    embedder = pipe.transformer.condition_embedder
    pipe.scheduler.set_timesteps(steps)
    t = pipe.scheduler.timesteps.numpy().astype(np.float64)

    def linear(layer, x):
        weight, bias = (p.detach().numpy().astype(np.float64) for p in (layer.weight, layer.bias))
        return x @ weight.T + bias

    def silu(x):
        return x / (1 + np.exp(-x))

    half = embedder.time_embedder.linear_1.in_features // 2
    angles = t[:, None] * np.exp(-np.log(10000.0) * np.arange(half) / half)
    wave = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    e = linear(embedder.time_embedder.linear_2, silu(linear(embedder.time_embedder.linear_1, wave)))
    return linear(embedder.time_proj, silu(e))


def pattern(e, threshold, polynomial, warmup, tail):
    """True where a step is skipped."""
    total, out = 0.0, []
    for i in range(len(e)):
        if i < max(1, warmup) or i >= len(e) - tail:
            total = 0.0
            out.append(False)
            continue
        total += float(np.polyval(polynomial, np.abs(e[i] - e[i - 1]).mean() / np.abs(e[i - 1]).mean()))
        out.append(total < threshold)
        if not out[-1]:
            total = 0.0
    return out


@pytest.mark.parametrize(
    ("steps", "shift", "threshold", "coefficients", "warmup", "tail"),
    [
        (12, 3.0, 0.15, (), 1, 0),
        (12, 8.0, 0.3, (), 2, 1),
        (9, 1.0, 0.4, (), 0, 0),
        (16, 5.0, 0.25, (2.0, 0.1, 0.0), 5, 1),
    ],
)
def test_the_pattern_is_the_timesteps(steps, shift, threshold, coefficients, warmup, tail):
    pipe = with_shift(shift)
    expected = pattern(embeddings(pipe, steps), threshold, coefficients or (1.0, 0.0), warmup, tail)
    settings = TeaCache(threshold=threshold, coefficients=coefficients, warmup=warmup, tail=tail)
    for prompt, seed in (("a red ball", 3), ("zzz 99 !!", 11)):
        _, receipt = generate(pipe, settings, prompt=prompt, seed=seed, num_inference_steps=steps)
        for branch in (0, 1):
            assert [s.branches[branch].action == "reused" for s in receipt.steps] == expected
    assert 0 < sum(expected) < steps - 1


def test_shift_and_threshold_change_the_pattern():
    counts = {
        (shift, t): generate(with_shift(shift), TeaCache(threshold=t, warmup=1))[1].blocks_run
        for shift in (1.0, 8.0)
        for t in (0.1, 0.3)
    }
    assert len(set(counts.values())) > 1
    assert counts[8.0, 0.3] <= counts[8.0, 0.1]


def test_a_skipped_step_adds_the_last_residual(sampler_by_hand):
    steps, settings = 8, TeaCache(threshold=0.3, warmup=1)
    skip = pattern(embeddings(pipeline("wan2.1"), steps), 0.3, (1.0, 0.0), 1, 0)
    residual = {}

    def stack(step, branch, h, blocks):
        if skip[step]:
            return h + residual[branch]
        out = h
        for block in blocks:
            out = block(out)
        residual[branch] = out - h
        return out

    expected = sampler_by_hand(stack, steps=steps)
    latents, receipt = generate(pipeline("wan2.1"), settings)
    assert torch.allclose(latents, expected, atol=2e-5)
    assert receipt.blocks_run == 8 * (steps - sum(skip)) < 64


@pytest.mark.parametrize("name", ["wan2.2", "wan2.2-ti2v", "cogvideox", "ltx", "hunyuan"])
def test_acts_on_every_family(name):
    settings = TeaCache(threshold=1.0, warmup=1)
    arguments = call(name)
    with accelerate(pipeline(name), Plan([settings])) as fast:
        receipt = fast("a red ball", seed=3, output_type="latent", **arguments).receipt
    assert 0 < receipt.blocks_run < receipt.blocks_total


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="fit must be one of none"):
        TeaCache(fit="somebody's model")
    with pytest.raises(ConfigError, match="not several"):
        TeaCache(coefficients=(1.0, 0.0), calibration="x.json")
    with pytest.raises(PlanError, match="there is no calibration"):
        accelerate(pipeline("wan2.1"), Plan([TeaCache(calibration=str(tmp_path / "none.json"))]))


def artefact(family, polynomial, steps=8, **other):
    curve = [0.0] * steps
    curves = Curves(
        steps=list(range(steps)),
        residual_ratio=[1.0] * steps,
        residual_ratio_std=curve,
        time_change=curve,
        first_block_change=curve,
        output_change=curve,
        tea_polynomial=polynomial,
    )
    shape = {"frames": 9, "height": 32, "width": 32, "steps": steps, "guidance": 5.0}
    own = {"model_hash": model_hash(pipeline("wan2.1")), "scheduler": "s", "solver": "s"}
    key = Key(family=family, **(shape | own | other))
    return Calibration(
        key=key,
        prompts=1,
        prompts_sha256="00",
        seed=0,
        vivace="0",
        sigmas=[1.0 - i / steps for i in range(steps + 1)],
        timesteps=[1000.0 - i for i in range(steps)],
        gram=np.eye(2 * steps).tolist(),
        curves={"transformer": {"cond": curves}},
    )


def test_a_calibrated_polynomial_is_used_and_a_foreign_one_refused(tmp_path):
    pipe = pipeline("wan2.1")
    path = artefact(describe_pipeline(pipe).family, [0.0, 0.0, 0.0, 0.5, 0.01]).save(tmp_path / "a.json")
    _, receipt = generate(pipe, TeaCache(threshold=0.3, warmup=1, calibration=str(path)))
    expected = pattern(embeddings(pipeline("wan2.1"), 8), 0.3, (0.5, 0.01), 1, 0)
    assert 0 < sum(expected) < 7
    assert [s.branches[0].action == "reused" for s in receipt.steps] == expected
    path = artefact("another", [1.0, 0.0]).save(tmp_path / "b.json")
    with pytest.raises(PlanError, match="was made for the family another"):
        accelerate(pipeline("wan2.1"), Plan([TeaCache(calibration=str(path))]))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"model_hash": "ab"}, "model hash ab and not"),
        ({"height": 64}, "height 64 and not 32"),
        ({"width": 16}, "width 16 and not 32"),
        ({"frames": 13}, "frames 13 and not 9"),
        ({"guidance": 3.0}, "guidance 3.0 and not 5.0"),
    ],
)
def test_a_calibration_for_another_run_is_refused(tmp_path, other, told):
    pipe = pipeline("wan2.1")
    path = artefact(describe_pipeline(pipe).family, [0.5, 0.01], **other).save(tmp_path / "a.json")
    with pytest.raises(PlanError, match=f"the calibration was made for {told}"):
        generate(pipe, TeaCache(threshold=0.3, warmup=1, calibration=str(path)))
    generate(pipe, TeaCache(threshold=0.3, warmup=1))


def test_other_steps_and_solvers_are_no_reason_to_refuse(tmp_path):
    pipe = pipeline("wan2.1")
    path = artefact(describe_pipeline(pipe).family, [0.5, 0.01], steps=12).save(tmp_path / "a.json")
    _, receipt = generate(pipe, TeaCache(threshold=0.3, warmup=1, calibration=str(path)))
    assert receipt.cache_hits


def test_published_polynomials_give_the_change_the_authors_plot():
    name = next(n for n in published() if n.endswith("t2v-1.3b"))
    values = [horner(published()[name], x) for x in (0.01, 0.02, 0.03, 0.04, 0.05)]
    assert values == sorted(values)
    assert 0.03 < values[0] < 0.06
    assert 0.12 < values[-1] < 0.16
    assert all(len(c) == 5 for c in published().values())


def test_a_fit_is_that_polynomial_written_out():
    name = next(iter(published()))
    runs = [
        generate(pipeline("wan2.1"), TeaCache(threshold=1.0, warmup=1, **how))[0]
        for how in ({"fit": name}, {"coefficients": published()[name]}, {})
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])

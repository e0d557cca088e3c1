"""The recorder on tiny real pipelines, against hooks of our own on the same run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.calibration.artifact import Calibration, key_of
from vivace.calibration.gram import schedule_error
from vivace.core.errors import ConfigError
from vivace.plans.calibrating import calibrate, fit
from vivace.testing.subjects import Subject

PROMPTS = ["a red ball", "two blue cones"]


def made(subject: Subject, prompts: list[str] = PROMPTS[:1], **call) -> Calibration:
    return calibrate(subject.pipeline, prompts, model=subject.model, seed=7, **(subject.call | call))


def watched(subject: Subject, **call) -> dict[str, list]:
    """Inputs and outputs of the transformer's blocks and of itself, by forward hooks, one entry a call."""
    seen: dict[str, list] = {"root": [], "first": [], "stack": []}
    transformer = subject.pipeline.transformer
    blocks, start = transformer.blocks, []

    def first(module, args, out):
        start.append(args[0])
        seen["first"].append(out - args[0])

    handles = [
        blocks[0].register_forward_hook(first),
        blocks[-1].register_forward_hook(lambda m, a, out: seen["stack"].append(out - start[-1])),
        transformer.register_forward_hook(lambda m, a, out: seen["root"].append(out[0])),
    ]
    try:
        with torch.no_grad():
            subject.run(**call)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.fixture(scope="module")
def wan() -> tuple[Subject, Calibration]:
    subject = Subject("wan2.1", layers=2)
    return subject, made(subject)


def test_gram_and_curves_are_those_of_the_run(wan) -> None:
    subject, calibration = wan
    seen = watched(subject)
    cond, uncond = ([x.double() for x in seen["root"][i::2]] for i in (0, 1))
    n = calibration.key.steps
    vectors = torch.stack([*cond, *(c - u for c, u in zip(cond, uncond, strict=True))]).flatten(1)
    scale = sum((c**2).sum() for c in cond) / n
    assert calibration.matrix == pytest.approx((vectors @ vectors.T / scale).numpy(), rel=1e-5, abs=1e-8)
    for i, branch in enumerate(("cond", "uncond")):
        curves = calibration.curves["transformer"][branch]
        stack, first = seen["stack"][i::2], seen["first"][i::2]
        for t in range(1, n):
            ratio = (stack[t].norm(dim=-1) / stack[t - 1].norm(dim=-1)).mean().item()
            moved = ((first[t] - first[t - 1]).abs().sum() / first[t - 1].abs().sum()).item()
            assert curves.residual_ratio[t] == pytest.approx(ratio, rel=1e-5)
            assert curves.first_block_change[t] == pytest.approx(moved, rel=1e-5)
            assert curves.block_change[t][0] == pytest.approx(moved, rel=1e-5)
        assert curves.steps == list(range(n))
        assert len(curves.block_sensitivity) == 2
        assert min(curves.time_change[1:]) > 0


def test_the_run_is_the_users_own_and_undone(wan) -> None:
    subject, calibration = wan
    before = subject.run().latents
    again = made(subject)
    assert torch.equal(subject.run().latents, before)
    assert again.to_json() == calibration.to_json()


def test_the_polynomial_follows_the_points(wan) -> None:
    curves = wan[1].curves["transformer"]["cond"]
    x, y = curves.time_change[1:], curves.output_change[1:]
    left = np.polyval(curves.tea_polynomial, x) - y
    assert len(curves.tea_polynomial) == 5
    assert np.abs(left).max() < np.ptp(y)
    # Least squares: no shift or tilt of the fit makes it better.
    assert abs(left.sum()) < 1e-6
    assert abs((left * x).sum()) < 1e-6


def test_few_points_give_a_lower_degree() -> None:
    assert fit(np.array([0.1, 0.2, 0.2]), np.array([1.0, 2.0, 2.0])) == pytest.approx([0, 0, 0, 10, 0])
    assert fit(np.array([0.0, 0.0]), np.array([1.0, 3.0])) == pytest.approx([0, 0, 0, 0, 2])
    assert fit(np.array([]), np.array([])) == [0.0] * 5


@pytest.mark.parametrize("name", ["cogvideox", "ltx", "hunyuan"])
def test_other_families(name: str) -> None:
    subject = Subject(name)
    calibration = made(subject, num_inference_steps=4)
    n = calibration.key.steps
    assert n == 4
    assert set(calibration.curves["transformer"]) == {"cond", "uncond"}
    curves = calibration.curves["transformer"]["uncond"]
    assert len(curves.block_change[1]) == len(subject.experts[0].blocks)
    assert min(curves.output_change[1:]) > 0
    # Cond and uncond are not mixed up: the delta is the difference of two outputs of equal steps.
    assert 0 < np.trace(calibration.matrix[n:, n:]) < 8 * n
    assert len(calibration.sigmas) == n + 1
    assert calibration.sigmas == sorted(calibration.sigmas, reverse=True)


def test_fused_halves_are_told_apart() -> None:
    subject = Subject("ltx")
    calls: list[torch.Tensor] = []
    handle = subject.pipeline.transformer.register_forward_hook(lambda m, a, out: calls.append(out[0]))
    subject.run()
    handle.remove()
    calibration = made(subject)
    n = calibration.key.steps
    c = torch.stack([x[1:].double().flatten() for x in calls])
    d = torch.stack([(x[1:] - x[:1]).double().flatten() for x in calls])
    scale = (c**2).sum() / n
    assert calibration.matrix[:n, n:] == pytest.approx((c @ d.T / scale).numpy(), rel=1e-4, abs=1e-6)


def test_two_experts_share_the_trajectory() -> None:
    calibration = made(Subject("wan2.2", layers=2))
    high, low = (calibration.curves[e]["cond"] for e in ("transformer", "transformer_2"))
    assert high.steps + low.steps == list(range(8))
    assert low.residual_ratio[0] == 1.0
    assert calibration.joined("cond", "output_change") == high.output_change + low.output_change


def test_prompts_are_averaged() -> None:
    subject = Subject("wan2.1", layers=2)
    call = {"num_inference_steps": 3}
    both = made(subject, PROMPTS, **call)
    alone = [
        calibrate(subject.pipeline, [p], model=subject.model, seed=7 + i, **subject.call, **call)
        for i, p in enumerate(PROMPTS)
    ]
    assert both.prompts == 2
    assert both.matrix == pytest.approx((alone[0].matrix + alone[1].matrix) / 2)
    curves = [c.curves["transformer"]["cond"] for c in (both, *alone)]
    mean = (np.array(curves[1].output_change) + np.array(curves[2].output_change)) / 2
    assert curves[0].output_change == pytest.approx(mean.tolist())
    middle = curves[0].percentiles["output_change"]
    assert middle["50"] == pytest.approx(mean.tolist())
    assert middle["5"][2] < middle["95"][2]


def test_without_guidance_there_is_no_delta() -> None:
    subject = Subject("wan2.1", layers=1)
    calibration = made(subject, num_inference_steps=3, guidance_scale=1.0)
    assert calibration.key.guidance == 1.0
    assert set(calibration.curves["transformer"]) == {"cond"}
    assert not calibration.matrix[3:].any()


def test_the_key_is_that_of_the_pipeline(wan, tmp_path) -> None:
    subject, calibration = wan
    key = key_of(subject.model, subject.pipeline, subject.model.workload())
    assert Calibration.load(calibration.save(tmp_path / "c.json")).matches(key)


def test_predicted_error_is_that_of_a_run_that_reuses() -> None:
    """A Euler run whose outputs are replaced by earlier ones of the exact run ends where the algebra says."""
    subject = Subject("wan2.1", layers=2)
    from diffusers import FlowMatchEulerDiscreteScheduler

    subject.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    seen = watched(subject)
    calibration = made(subject)
    exact = subject.run().latents
    cond, computed = seen["root"], (0, 1, 2, 4, 6)
    scale = np.sqrt(np.mean([float((x.double() ** 2).sum()) for x in cond[0::2]]))
    step = iter(range(len(cond)))

    def reuse(module, args, out):
        i = next(step)
        at = max(s for s in computed if s <= i // 2)
        return (cond[2 * at + i % 2], *out[1:])

    handle = subject.pipeline.transformer.register_forward_hook(reuse)
    moved = subject.run().latents
    handle.remove()
    n, g = calibration.key.steps, calibration.key.guidance
    told = schedule_error(calibration.matrix, calibration.sigmas, computed, None, 0, g)["end"]
    assert n == 8
    assert float((moved - exact).double().norm()) / scale == pytest.approx(told, rel=1e-3)


def test_no_prompts() -> None:
    with pytest.raises(ConfigError, match="at least one prompt"):
        made(Subject("wan2.1", layers=1), [])


def test_an_interrupted_calibration_goes_on_behind_the_last_clip(tmp_path):
    subject, part, seen = Subject("wan2.1"), tmp_path / "c.json.part", []
    whole = made(subject, PROMPTS)

    def stop_at_second(number, prompt):
        seen.append(number)
        if number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(subject, PROMPTS, part=part, on_prompt=stop_at_second)
    assert part.is_file()
    again = made(subject, PROMPTS, part=part, on_prompt=lambda number, prompt: seen.append(number))
    assert seen == [0, 1, 1]
    assert np.allclose(again.matrix, whole.matrix)
    assert again.curves == whole.curves
    # What was kept for other prompts, or is cut off, does not count.
    for text in (part.read_text(), part.read_text()[:100]):
        part.write_text(text)
        seen.clear()
        made(subject, PROMPTS[::-1], part=part, on_prompt=lambda number, prompt: seen.append(number))
        assert seen == [0, 1]


def test_too_few_steps_are_refused():
    with pytest.raises(ConfigError, match="3 steps or more"):
        made(Subject("wan2.1"), num_inference_steps=2)

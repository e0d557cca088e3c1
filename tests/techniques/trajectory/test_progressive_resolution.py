"""Progressive resolution: jumps against the noise path's own statistics, counts against formulas of the token grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.core.errors import PlanError
from vivace.models.describe import describe_pipeline
from vivace.plans.plan import Plan
from vivace.techniques.caching.first_block_cache import FirstBlockCache
from vivace.techniques.trajectory.few_steps import FewSteps
from vivace.techniques.trajectory.guidance_interval import GuidanceInterval
from vivace.techniques.trajectory.progressive_resolution import ProgressiveResolution
from vivace.techniques.trajectory.resampling import jump, noise_like, seeds_of, shrink_noise, small_size
from vivace.techniques.trajectory.solver import Solver
from vivace.testing.models import pipeline
from vivace.testing.subjects import Subject

SHAPE = {"num_frames": 9, "height": 64, "width": 96, "num_inference_steps": 8}
"""Latents 3x8x12, patch (1, 2, 2): 3x4x6 tokens."""
TEXT, HEADS, LAYERS = 16, 2, 4


def pairs(frames, height, width):
    """Query-key pairs of one evaluation of the tiny model: self-attention and attention to the text."""
    tokens = frames * height * width
    return HEADS * LAYERS * tokens * (tokens + TEXT)


# -- the jump on its own --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 6), (7, 9), (16, 24), (11, 20)])
def test_a_constant_frame_comes_through_a_jump_exactly(size):
    levels = torch.randn(2, 4, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    clean, noise = levels.expand(2, 4, 3, 8, 12), torch.randn(2, 4, 3, 8, 12)
    sample = 0.3 * clean + 0.7 * noise
    out = jump(sample, noise - clean, 0.7, 0.0, size, [1, 2])
    assert torch.allclose(out, levels.expand(2, 4, 3, *size), atol=1e-5)


@pytest.mark.parametrize("size", [(16, 20), (24, 28), (48, 64)])
def test_a_jump_ends_at_the_noise_level_the_next_step_expects(size):
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(2, 8, 5, 32, 40, generator=generator)
    sample = 0.2 * 3.0 + 0.8 * noise
    out = jump(sample, noise - 3.0, 0.8, 0.6, size, [5, 6])
    residual = (out - 0.4 * 3.0) / 0.6
    n = residual.numel()
    assert residual.mean().abs() < 5 / n**0.5
    assert (residual.var() - 1).abs() < 5 * (2 / n) ** 0.5
    beside = (residual[..., 1:] * residual[..., :-1]).mean()
    assert beside.abs() < 5 / n**0.5, "neighbours are correlated"


@pytest.mark.parametrize("size", [(16, 20), (24, 30), (31, 39)])
def test_shrunk_noise_is_white_with_unit_variance(size):
    """The covariance of a linear map is its matrix times its transpose, so it is read off the unit impulses."""
    height, width = 8, 10
    small = (size[0] * height // 32, size[1] * width // 40)
    impulses = torch.eye(height * width).reshape(height * width, 1, 1, height, width)
    matrix = shrink_noise(impulses, small).reshape(height * width, -1).T
    assert torch.allclose(matrix @ matrix.T, torch.eye(small[0] * small[1]), atol=1e-5)


def test_shrunk_noise_keeps_the_layout_and_its_lowest_frequencies_only():
    height, width = 16, 24

    def wave(p, q, h, w):
        a, b = np.mgrid[:h, :w]
        return np.cos(np.pi / h * (a + 0.5) * p) * np.cos(np.pi / w * (b + 0.5) * q)

    for p, q, kept in [(0, 0, True), (2, 3, True), (7, 11, True), (9, 0, False), (3, 13, False)]:
        given = torch.from_numpy(wave(p, q, height, width))[None, None, None].float()
        out = shrink_noise(given, (8, 12))[0, 0, 0]
        # Half the size in both directions has a quarter of the values, and the wave keeps its energy.
        expected = torch.from_numpy(wave(p, q, 8, 12)).float() * (2.0 if kept else 0.0)
        assert torch.allclose(out, expected, atol=1e-5), (p, q)


def test_noise_depends_on_the_sample_alone():
    first = torch.randn(3, 4, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    seeds = seeds_of(first)
    assert len(set(seeds)) == 3
    assert [seeds_of(row[None])[0] for row in first] == seeds
    together = noise_like(first, (12, 12), seeds)
    alone = [noise_like(row[None], (12, 12), [seed]) for row, seed in zip(first, seeds, strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_sides_are_rounded_down_to_whole_tokens():
    assert small_size((60, 104), (2, 2), 0.5) == (30, 52)
    assert small_size((60, 104), (2, 2), 0.75) == (44, 78)
    assert small_size((100, 2), (2, 2), 0.58) == (58, 2)


# -- the trajectory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "share", "steps", "expected"),
    [
        ("low_high", 0.5, 8, [0, 1, 2, 3]),
        ("low_high", 1.0, 4, [0, 1, 2]),
        ("low_high", 1.0, 1, []),
        ("bottleneck", 0.5, 8, [2, 3, 4, 5]),
        ("bottleneck", 1.0, 5, [1, 2, 3]),
        ("bottleneck", 1.0, 2, []),
    ],
)
def test_which_steps_are_small(shape, share, steps, expected):
    assert list(ProgressiveResolution(shape=shape, share=share).small_steps(steps)) == expected


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2", "wan2.2-ti2v"])
@pytest.mark.parametrize("shape", ["low_high", "bottleneck"])
def test_counted_pairs_follow_from_the_small_grid(family, shape):
    subject = Subject(family, SHAPE)
    settings = ProgressiveResolution(shape=shape)
    run = subject.run(settings)
    exact = subject.exact()
    assert run.latents.shape == exact.latents.shape
    grid = [int(n) for n in exact.latents.shape[2:]]
    full = pairs(grid[0], grid[1] // 2, grid[2] // 2)
    small = pairs(grid[0], grid[1] // 4, grid[2] // 4)
    assert exact.receipt.attention_pairs == 16 * full
    assert run.receipt.attention_pairs == 8 * full + 8 * small
    assert run.receipt.nfe == 16
    effects = run.receipt.techniques[0].effects
    assert effects == {"small_steps": 4, "jumps": 1 if shape == "low_high" else 2}
    estimate = settings.estimate(subject.model, subject.workload(), subject.base_estimate())
    assert estimate.problems(run.receipt.counts) == []


@pytest.mark.parametrize("shape", ["low_high", "bottleneck"])
def test_equals_a_hand_written_loop_of_euler_steps(shape):
    """The network is called by hand at each size; the sizes, levels and resampling are written out with numpy."""
    subject = Subject("wan2.1", SHAPE)
    noise = torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(9))
    technique = ProgressiveResolution(shape=shape, reshift=2.0)
    solver = Solver(solver="euler")
    with subject.open(technique, solver) as session:
        fast = subject.generate(session, latents=noise, guidance_scale=1.0).latents
    pipe = subject.pipeline
    text = pipe.encode_prompt("a red ball", do_classifier_free_guidance=False, max_sequence_length=16)[0]
    base = np.linspace(0.999, 0.0, 9)[:-1]  # as the Euler form of diffusers' multistep scheduler has it
    sigma = np.append(3.0 * base / (1 + 2.0 * base), 0.0)
    small = range(4) if shape == "low_high" else range(2, 6)
    for i in small:
        u = base[i]
        sigma[i] = 6.0 * u / (1 + 5.0 * u)  # twice the shift of 3
    x = shrink_noise(noise, (4, 6)) if 0 in small else noise
    seed = seeds_of(noise)[0]
    for i in range(8):
        time = torch.tensor([int(np.float32(sigma[i]) * np.float32(1000.0))])
        with torch.no_grad():
            v = pipe.transformer(x, time, text, return_dict=False)[0]
        clean = x - float(sigma[i]) * v
        if i < 7 and (i in small) != (i + 1 in small):
            if i in small:
                clean = torch.nn.functional.interpolate(clean[0], (8, 12), mode="bilinear")[None]
            else:
                clean = clean.unflatten(-1, (6, 2)).mean(-1).unflatten(-2, (4, 2)).mean(-2)
            fresh = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(seed + i))[None]
            x = (1 - float(sigma[i + 1])) * clean + float(sigma[i + 1]) * fresh
        else:
            x = x + float(sigma[i + 1] - sigma[i]) * v
    assert float((fast - x).norm() / x.norm()) < 1e-4


def test_full_scale_is_the_exact_run():
    subject = Subject("wan2.1", SHAPE)
    run = subject.run(ProgressiveResolution(scale=1.0, reshift=2.0))
    assert torch.equal(run.latents, subject.exact().latents)
    assert run.receipt.counts == subject.exact().receipt.counts


@pytest.mark.parametrize("solver", ["dpm++3m", "euler"])
def test_every_solver_begins_anew_at_a_jump(solver):
    subject = Subject("wan2.1", SHAPE)
    run = subject.run(ProgressiveResolution(shape="bottleneck"), Solver(solver=solver))
    assert torch.isfinite(run.latents).all()
    assert run.latents.shape == subject.exact().latents.shape


def test_it_works_beside_caches_and_other_trajectory_techniques():
    subject = Subject("wan2.1", SHAPE)
    beside = (FirstBlockCache(threshold=0.5), GuidanceInterval(high=0.75), FewSteps(steps=12))
    run = subject.run(ProgressiveResolution(shape="bottleneck"), *beside)
    assert torch.isfinite(run.latents).all()
    effects = {t.name: t.effects for t in run.receipt.techniques}
    assert effects["progressive_resolution"]["small_steps"] == 6
    assert effects["first_block_cache"]["hits"] > 0
    assert run.receipt.nfe == 12 + 9


def test_another_video_model_with_joint_attention():
    subject = Subject("hunyuan", SHAPE)
    run = subject.run(ProgressiveResolution())
    assert run.latents.shape == subject.exact().latents.shape
    assert run.receipt.attention_pairs < 0.75 * subject.exact().receipt.attention_pairs


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("wan2.1-i2v", "comes at full size"),
        ("hunyuan-i2v", "comes at full size"),
        ("ltx", "packed latents"),
        ("cogvideox", "flow-matching scheduler"),
    ],
)
def test_models_whose_size_is_fixed_are_refused(family, why):
    with pytest.raises(PlanError, match=why):
        Plan([ProgressiveResolution()]).check(describe_pipeline(pipeline(family)))


def test_a_scale_that_bends_the_picture_is_told():
    model = Subject("wan2.1", SHAPE).model
    assert "4x6" not in str(ProgressiveResolution(scale=0.5).check(model))
    [problem] = ProgressiveResolution(scale=0.75).check(model)
    assert problem.severity == "warning"
    assert "6x4 tokens 4x3" in problem.message

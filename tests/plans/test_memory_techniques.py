"""Predicted memory of techniques that change tensors, against what live tensors really take, byte by byte."""

from __future__ import annotations

import pytest
import torch

from vivace import Plan, accelerate
from vivace.core.footprint import DECODE, DENOISE, STAGES
from vivace.kernels.quant_linear.spec import Recipe
from vivace.models.describe import describe_pipeline
from vivace.models.known import KNOWN
from vivace.plans.dry_run import CannotTell, Taken, dry_run
from vivace.plans.memory import exact, planned
from vivace.techniques.base import registry
from vivace.techniques.compression.linears import layer_bytes
from vivace.testing.memory import measured_peaks
from vivace.testing.models import call, pipeline

NEAR = 0.10
"""Largest relative error allowed of what lies beside the weights; most are below 3 %."""
SMALL = {"window_frames": 3, "window_height": 4, "window_width": 4}
STEPS = 6
WIDE, LONG = (17, 64, 96), (33, 64, 64)


def predicted(family, shape, *techniques):
    pipe = pipeline(family)
    model = describe_pipeline(pipe)
    frames, height, width = shape
    workload = model.workload(frames=frames, height=height, width=width, text=16, guidance=3.0)
    base = exact(model, workload, dtype="float32", vae_dtype="float32")
    return pipe, base, planned(model, workload, base, Plan(techniques))


def measured(pipe, family, shape, *techniques):
    frames, height, width = shape
    options = call(family) | {
        "num_frames": frames,
        "height": height,
        "width": width,
        "num_inference_steps": STEPS,
    }
    with accelerate(pipe, Plan(techniques), counters=False) as fast:
        return measured_peaks(pipe, lambda: fast("a red ball", seed=1, **options))


@pytest.mark.parametrize("shape", [WIDE, pytest.param(LONG, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("token_merging", {"ratio": 0.4, "parts": "attention+ffn", **SMALL}),
        ("token_merging", {"ratio": 0.3, "parts": "all", "scope": "step", "every": 2, **SMALL}),
        ("asymmetric_reduction", {"every": 2, **SMALL}),
        ("token_skip", {"warmup": 1}),
        ("latent_frame_rate", {}),
        ("radial", {}),
        ("sparge_attention", {"refresh": 2}),
        ("chipmunk", {}),
        ("taylorseer", {"interval": 2, "warmup": 2}),
        ("pyramid_attention_broadcast", {"low": 0.0, "high": 1000.0}),
    ],
)
def test_denoising_with_one_technique(name, settings, shape):
    technique = registry[name](**settings)
    pipe, base, found = predicted("wan2.1", shape, technique)
    got = measured(pipe, "wan2.1", shape, technique)[DENOISE]
    assert found.peak(DENOISE) - base.weights == pytest.approx(got - base.weights, rel=NEAR)


PLANS = {
    "merged": [("token_merging", SMALL), ("int8_linear", {}), ("fast_decode", {"chunk": 1})],
    "sparse and cached": [
        ("sparge_attention", {}),
        ("taylorseer", {"interval": 2, "warmup": 2}),
        ("cache_format", {"format": "int4", "group": 32}),
    ],
    "modules": [
        ("layerwise_casting", {}),
        ("pyramid_attention_broadcast", {"low": 0.0, "high": 1000.0}),
        ("cache_format", {"residual": 0}),
    ],
}


CASES = [
    *((plan, "wan2.1", WIDE) for plan in PLANS),
    ("modules", "wan2.1", LONG),
    *(pytest.param(plan, "wan2.1", LONG, marks=pytest.mark.slow) for plan in ("merged", "sparse and cached")),
    # "merged" is 14 % too low on this small CogVideoX: what rounding activations takes is in no prediction yet.
    *((plan, "cogvideox", WIDE) for plan in ("sparse and cached", "modules")),
]


@pytest.mark.parametrize(("plan", "family", "shape"), CASES)
def test_whole_plans(plan, family, shape):
    made = [registry[name](**settings) for name, settings in PLANS[plan]]
    pipe, _, found = predicted(family, shape, *made)
    got = measured(pipe, family, shape, *made)
    for stage in STAGES:
        assert found.peak(stage) == pytest.approx(got[stage], rel=NEAR), stage


@pytest.mark.parametrize("settings", [{}, {"chunk": 1, "tile": 3}, {"max_gib": 0.002}, {"dtype": "float16"}])
def test_decoding_in_pieces(settings):
    technique = registry["fast_decode"](**settings)
    pipe, base, found = predicted("wan2.1", WIDE, technique)
    got = measured(pipe, "wan2.1", WIDE, technique)
    assert found.peak(DECODE) == pytest.approx(got[DECODE], rel=0.02)
    assert found.peak(DECODE) != base.peak(DECODE)


def test_a_dry_run_of_nothing_is_the_exact_run():
    model = KNOWN["wan2.1-1.3b"].describe()
    workload = model.workload(frames=17, height=256, width=256)
    base = exact(model, workload)
    found = dry_run(model, model.experts[0], workload, [], torch.bfloat16)
    # Here modules that loading leaves in float32 are 16 bits wide.
    assert found.working == pytest.approx(base.part("transformer").working, rel=0.25)
    assert found.kept == 0


def test_what_is_kept_grows_with_the_depth():
    """A technique that remembers at every block: built are two of them."""
    kept = []
    for layers in (2, 4, 8):
        pipe = pipeline("wan2.1", layers=layers)
        model = describe_pipeline(pipe)
        workload = model.workload(frames=17, height=64, width=64, text=16, guidance=3.0)
        found = dry_run(model, model.experts[0], workload, [registry["chipmunk"]()], torch.float32)
        assert isinstance(found, Taken)
        kept.append(found.kept)
    assert kept[2] - kept[1] == 2 * (kept[1] - kept[0]) > 0


def test_a_technique_that_needs_numbers_cannot_be_told():
    pipe = pipeline("wan2.1")
    model = describe_pipeline(pipe)
    workload = model.workload(frames=17, height=64, width=64, text=16, guidance=3.0)
    threshold = registry["teacache"](warmup=0, threshold=0.5)
    with pytest.raises(CannotTell):
        dry_run(model, model.experts[0], workload, [threshold], torch.float32)


@pytest.mark.parametrize(
    "recipe",
    [Recipe(), Recipe(weights="int4", group=32), Recipe(weights="nvfp4", low_rank=4), Recipe(rotate=True)],
)
def test_bytes_of_a_quantised_layer(recipe):
    from vivace.kernels.quant_linear.reference import quantise

    linear = torch.nn.Linear(96, 80)
    made = quantise(linear, recipe, torch.ones(96))
    held = sum(t.nbytes for t in (*made.parameters(), *made.buffers())) - linear.bias.nbytes
    assert layer_bytes(recipe, 96, 80, True) == held

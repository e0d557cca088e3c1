"""Placement: the same bits, every weight back as the same object, nothing left, and refusals with a reason."""

from __future__ import annotations

import pytest
import torch

from vivace.core.errors import ConfigError, PlanError
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.base import registry
from vivace.techniques.compression.group_offload import GroupOffload
from vivace.techniques.compression.layerwise_casting import LayerwiseCasting
from vivace.techniques.compression.model_offload import ModelOffload
from vivace.techniques.compression.text_quantization import TextQuantization
from vivace.testing.fingerprints import differences, fingerprint
from vivace.testing.models import call, pipeline

DISK = {"device": "cpu", "to": "disk"}
PLACED = [
    GroupOffload(**DISK),
    GroupOffload(**DISK, blocks=3),
    GroupOffload(**DISK, level="leaf"),
    ModelOffload(device="cpu"),
]


def frames(pipe, family, *techniques, **changes):
    options = call(family) | {"num_inference_steps": 3, "output_type": "pt"} | changes
    with accelerate(pipe, Plan(techniques)) as session:
        return session("a red ball", seed=1, **options)


def distance(out, want):
    return float((out.raw.frames - want.raw.frames).norm() / want.raw.frames.norm())


@pytest.mark.parametrize("family", ["wan2.2", "cogvideox", "ltx", "hunyuan"])
def test_the_same_frames_and_nothing_left(family, tmp_path):
    pipe = pipeline(family)
    want = frames(pipe, family)
    before = fingerprint(pipe)
    for technique in PLACED:
        if isinstance(technique, GroupOffload):
            technique = technique.replace(folder=str(tmp_path))
        # Weights that come back lie elsewhere in memory, where vector instructions may add in another order.
        assert distance(frames(pipe, family, technique), want) < 1e-5
        assert not differences(before, fingerprint(pipe))
    assert not list(tmp_path.iterdir())


def test_weights_are_in_files_while_nobody_uses_them(tmp_path):
    pipe = pipeline("wan2.1")
    with accelerate(pipe, Plan([GroupOffload(**DISK, folder=str(tmp_path))])) as session:
        files = list(tmp_path.rglob("*.safetensors"))
        expected = sum(
            p.nbytes for m in (pipe.transformer, pipe.vae, pipe.text_encoder) for p in m.parameters()
        )
        out = session("a", seed=1, **call("wan2.1") | {"num_inference_steps": 2})
        effects = out.receipt.techniques[0].effects
        assert sum(f.stat().st_size for f in files) >= effects["bytes_waiting"] > 0.9 * expected
        # 4 blocks of the transformer in 2 steps of 2 branches, 1 of the encoder twice, and the rest of each.
        assert effects["loads"] >= 4 * 2 * 2


def test_a_skipped_block_is_not_loaded():
    pipe, family = pipeline("wan2.1"), "wan2.1"
    skipping = registry["first_block_cache"](threshold=0.5, warmup=1, tail=0)
    plain = frames(pipe, family, GroupOffload(**DISK), num_inference_steps=6)
    both = frames(pipe, family, GroupOffload(**DISK), skipping, num_inference_steps=6)
    alone = frames(pipe, family, skipping, num_inference_steps=6)
    assert both.receipt.cache_hits == alone.receipt.cache_hits > 0
    assert distance(both, alone) < 1e-5
    loads = [
        next(t for t in o.receipt.techniques if t.name == "group_offload").effects["loads"]
        for o in (plain, both)
    ]
    assert loads[1] == loads[0] - both.receipt.cache_hits * 3


@pytest.mark.parametrize("technique", [PLACED[0], PLACED[3]], ids=lambda t: t.card.name)
@pytest.mark.parametrize("other", ["int8_linear", "text_quantization", "layerwise_casting", "text_cache"])
def test_composes_with_other_weights(technique, other, tmp_path):
    pipe = pipeline("wan2.1")
    partner = registry[other](folder=str(tmp_path)) if other == "text_cache" else registry[other]()
    if other in ("int8_linear", "text_quantization"):
        partner = partner.replace(backend="reference")
    want = frames(pipe, "wan2.1", partner)
    before = fingerprint(pipe)
    assert distance(frames(pipe, "wan2.1", technique, partner), want) < 1e-5
    assert not differences(before, fingerprint(pipe))


def test_this_machine_has_nothing_to_offload_from(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pipe = pipeline("wan2.1")
    for technique in (ModelOffload(), GroupOffload()):
        with pytest.raises(PlanError, match="no GPU is visible"):
            accelerate(pipe, Plan([technique]))
    with pytest.raises(PlanError, match="to: disk"):
        accelerate(pipe, Plan([GroupOffload(device="cpu")]))
    with pytest.raises(PlanError, match="no device"):
        accelerate(pipe, Plan([ModelOffload(device="toaster")]))


def test_two_placements_and_foreign_hooks_are_refused():
    pipe = pipeline("wan2.1")
    with pytest.raises(PlanError, match="placement"):
        accelerate(pipe, Plan([PLACED[0], PLACED[3]]))
    with pytest.raises(PlanError, match=r"linear\.weight"):
        accelerate(pipe, Plan([LayerwiseCasting(), registry["int8_linear"]()]))
    pipe.enable_model_cpu_offload(device="cpu")
    before = fingerprint(pipe)
    for technique in (PLACED[0], PLACED[3]):
        with pytest.raises(ConfigError, match="accelerate's hooks already"):
            accelerate(pipe, Plan([technique]))
    assert not differences(before, fingerprint(pipe))


@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2"])
def test_layerwise_casting_rounds_as_diffusers_does(format):
    """diffusers' own hooks on the same layers are the oracle."""
    from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook

    kind = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[format]
    want, pipe = pipeline("wan2.1"), pipeline("wan2.1")
    for path, module in want.transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and path.startswith("blocks"):
            bias = module.bias.data.clone()
            apply_layerwise_casting_hook(module, kind, torch.float32, False)
            module.bias.data = bias
    got = frames(pipe, "wan2.1", LayerwiseCasting(format=format))
    # diffusers rounds the bias too, which ours keeps.
    assert distance(got, frames(want, "wan2.1")) < 2e-2
    exact = frames(pipe, "wan2.1")
    assert distance(got, exact) > 1e-4


@pytest.mark.parametrize("family", ["wan2.1", "cogvideox", "hunyuan"])
@pytest.mark.parametrize("settings", [{"backend": "reference"}, {"mode": "dynamic"}])
def test_text_encoder_in_int8(family, settings):
    pipe = pipeline(family)
    want = frames(pipe, family)
    before = fingerprint(pipe)
    got = frames(pipe, family, TextQuantization(**settings))
    assert 0 < distance(got, want) < 0.05
    effects = got.receipt.techniques[0].effects
    assert effects["bytes_after"] < 0.35 * effects["bytes_before"]
    assert not differences(before, fingerprint(pipe))


def test_no_text_encoder_to_quantise():
    pipe = pipeline("wan2.1")
    pipe.text_encoder = None
    with pytest.raises(PlanError, match="needs a text encoder"):
        accelerate(pipe, Plan([TextQuantization()]))

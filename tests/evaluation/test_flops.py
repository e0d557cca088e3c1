"""Counted FLOPs against hand-written formulas: the live counters, the meta device, and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vivace import accelerate
from vivace.evaluation.flops import counted, decoder_flops, encoder_flops, stage_flops
from vivace.models.describe import describe_pipeline
from vivace.plans.costs import baseline
from vivace.plans.plan import Plan
from vivace.testing import models


@pytest.fixture(scope="module")
def wan():
    return models.pipeline("wan2.1")


def by_hand(config, latent, text, rows=1):
    """FLOPs of one Wan transformer call, from the paper's architecture: patch, text, blocks, head; 2 a multiply-add."""
    t, h, w = latent
    p = config.patch_size
    s = (t // p[0]) * (h // p[1]) * (w // p[2])
    d = config.num_attention_heads * config.attention_head_dim
    volume = p[0] * p[1] * p[2]
    patch = 2 * s * d * config.in_channels * volume
    time = 2 * (config.freq_dim * d + d * d + d * 6 * d)
    words = 2 * text * (config.text_dim * d + d * d)
    self_attention = 4 * 2 * s * d * d + 4 * s * s * d
    cross = 2 * 2 * s * d * d + 2 * 2 * text * d * d + 4 * s * text * d
    ffn = 2 * 2 * s * d * config.ffn_dim
    head = 2 * s * d * config.out_channels * volume
    return rows * (patch + time + words + config.num_layers * (self_attention + cross + ffn) + head)


def test_live_counters_equal_the_formula_and_the_meta_device(wan):
    model = describe_pipeline(wan)
    shape = {"num_frames": 9, "height": 32, "width": 32}
    with accelerate(wan, Plan(), model=model) as fast:
        receipt = fast(
            "a cube", seed=0, num_inference_steps=2, guidance_scale=4.0, max_sequence_length=16, **shape
        ).receipt
    workload = model.workload(frames=9, height=32, width=32, steps=2, guidance=4.0, text=16)
    latent = model.adapter.latent(model, workload)
    assert receipt.flops == pytest.approx(4 * by_hand(wan.transformer.config, latent, 16), rel=1e-9)
    assert baseline(model, workload).flops[0] == receipt.flops


def test_torchs_counter_on_meta_equals_the_formula(wan):
    transformer = wan.transformer
    with torch.device("meta"):
        copy = type(transformer).from_config(dict(transformer.config))
    config = transformer.config
    latent = (3, 8, 8)
    call = {
        "hidden_states": torch.zeros(1, config.in_channels, *latent, device="meta"),
        "timestep": torch.full((1,), 500.0, device="meta"),
        "encoder_hidden_states": torch.zeros(1, 16, config.text_dim, device="meta"),
    }
    assert counted(lambda: copy(**call)) == pytest.approx(by_hand(config, latent, 16), rel=1e-9)


def test_torchs_counter_misses_attention_on_a_cpu():
    """Why nothing here is counted on CPU tensors. When this fails, torch has learned it: drop the note in `flops`."""
    q = torch.randn(1, 2, 64, 16)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    q = q.to("meta")
    on_meta = counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert on_meta == 4 * 2 * 64 * 64 * 16
    assert counter.get_total_flops() in (0, on_meta)


def test_stages_grow_with_what_they_process(wan):
    assert encoder_flops(wan.text_encoder, 32) > encoder_flops(wan.text_encoder, 16) > 0
    assert decoder_flops(wan.vae, (3, 8, 8)) > decoder_flops(wan.vae, (2, 8, 8)) > 0
    model = describe_pipeline(wan)
    found = stage_flops(wan, model, model.workload(frames=9, height=32, width=32, text=16))
    assert set(found) == {"flops_text", "flops_vae"}
    assert found["flops_text"] == pytest.approx(2 * encoder_flops(wan.text_encoder, 16))

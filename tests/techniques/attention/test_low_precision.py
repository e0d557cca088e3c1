"""`precision="int8"` under every dynamic method: it runs, says so, and moves the clip by rounding only."""

from __future__ import annotations

import pytest

from vivace.techniques.attention.dynamic import DynamicAttention
from vivace.techniques.base import registry
from vivace.testing.subjects import Subject, distance

METHODS = sorted(name for name in registry if issubclass(registry[name], DynamicAttention))
CLIP = {"num_frames": 17, "height": 64, "width": 64, "num_inference_steps": 3}
"""5 x 4 x 4 tokens: five blocks of 16, in Wan as in Hunyuan, where text stands beside them."""
BOUND, OF_HARD_CHOICES = 0.1, 0.2
"""Relative distance of final latents. Rounding alone makes up to 0.03; where it turns a choice of blocks, more: most
where few blocks are kept, or a token changes its cluster."""
HARD = ("svg2", "vsa")


def test_all_methods_are_here() -> None:
    assert {"adaspa", "chipmunk", "pisa", "sla", "svg2", "vmoba", "vsa"} < set(METHODS)


@pytest.mark.parametrize("family", ["wan2.1", "hunyuan"])
@pytest.mark.parametrize("name", METHODS)
def test_stays_close_to_full_precision(name, family, tmp_path) -> None:
    subject = Subject(family, CLIP)
    technique = registry[name].examples(tmp_path, subject.pipeline)[0]
    full = subject.run(technique)
    low = subject.run(technique.replace(precision="int8"))
    assert 1e-6 < distance(low.latents, full.latents) < (OF_HARD_CHOICES if name in HARD else BOUND)
    chosen = {k.op: k for k in low.receipt.kernels}
    assert chosen["low_bit_attention"].choice == "reference"
    assert "emulated" in chosen["low_bit_attention"].why
    assert "block_attention" not in chosen
    pairs = low.receipt.attention_pairs / full.receipt.attention_pairs
    assert pairs == pytest.approx(1.0, abs=0.15)

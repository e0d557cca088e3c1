"""Whole-clip decoding gives the chunked path's frames, and says when it steps aside."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.core.errors import PlanError
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.compression.whole_clip_decode import WholeClipDecode
from vivace.testing.models import call, pipeline


def frames(name: str, plan: Plan, **changes):
    pipe = pipeline(name)
    with accelerate(pipe, plan) as fast:
        return fast("a red sphere", seed=3, **call(name) | changes)


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_same_frames_as_the_chunked_path(name):
    want, got = frames(name, Plan()), frames(name, Plan([WholeClipDecode()]))
    assert np.abs(got.raw.frames - want.raw.frames).max() < 1e-5
    assert got.receipt.techniques[0].effects == {"clips": 1}
    assert [k.choice for k in got.receipt.kernels] == ["whole_clip"]


def test_a_clip_too_large_is_decoded_in_chunks_and_the_receipt_says_so():
    want, got = frames("wan2.1", Plan()), frames("wan2.1", Plan([WholeClipDecode(max_gib=1e-6)]))
    assert np.array_equal(got.raw.frames, want.raw.frames)
    assert got.receipt.techniques[0].effects == {"chunked_clips": 1}
    assert "GiB" in got.receipt.kernels[0].why


def test_tiling_stays_in_force():
    pipe = pipeline("wan2.1")
    pipe.vae.enable_tiling()
    with accelerate(pipe, Plan([WholeClipDecode()])) as fast:
        assert fast("a", **call("wan2.1")).receipt.techniques[0].effects == {"chunked_clips": 1}


def test_return_dict_and_undo():
    pipe, z = pipeline("wan2.1"), torch.randn(1, 16, 2, 2, 2)
    with torch.no_grad():
        want = pipe.vae.decode(z).sample
        with accelerate(pipe, Plan([WholeClipDecode()])):
            assert torch.allclose(pipe.vae.decode(z).sample, want, atol=1e-5)
            assert torch.allclose(pipe.vae.decode(z, return_dict=False)[0], want, atol=1e-5)
        assert "decode" not in vars(pipe.vae)


def test_other_vaes_refuse_unless_optional():
    pipe = pipeline("cogvideox")
    with pytest.raises(PlanError, match="decode in one pass"):
        accelerate(pipe, Plan([WholeClipDecode()]))
    plan = Plan([WholeClipDecode()], optional=["whole_clip_decode"])
    with accelerate(pipe, plan) as fast:
        assert fast.plan.ordered() == ()
        assert "left out" in fast.warnings[0]


def test_optional_survives_a_file(tmp_path):
    plan = Plan([WholeClipDecode()], optional=["whole_clip_decode"])
    again = Plan.load(plan.save(tmp_path / "p.yaml"))
    assert again == plan
    assert again.optional == {"whole_clip_decode"}

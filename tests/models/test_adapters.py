"""Every adapter keeps its contract, and the contract notices adapters that do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from vivace.core.context import COND, UNCOND
from vivace.core.errors import ConfigError, ShapeError
from vivace.core.shapes import TokenGrid
from vivace.models.adapter import Adapter, BlockLayout
from vivace.models.cogvideox import CogVideoXAdapter, CogVideoXKernelProcessor
from vivace.models.describe import describe_pipeline
from vivace.models.families import adapters, by_class, for_module, register, unregister
from vivace.models.hunyuan import HunyuanVideoAdapter
from vivace.models.ltx import LTXAdapter
from vivace.models.wan import WanAdapter
from vivace.testing import models
from vivace.testing.adapter_checks import ADAPTER_CHECKS, AdapterCase, check_adapter


@pytest.fixture(scope="module", params=sorted(models.BUILDERS))
def case(request) -> AdapterCase:
    return AdapterCase(request.param)


@pytest.mark.parametrize("check", ADAPTER_CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
def test_contract(check, case):
    check(case)


@pytest.mark.parametrize("frames", [9, 13])
def test_tokens_of_two_latent_frames_pad_the_latent(frames):
    """CogVideoX 1.5: three latent frames become four, and so do four."""
    call = models.call("cogvideox") | {"num_frames": frames}
    pipe = models.pipeline("cogvideox", temporal_patch=2)
    check_adapter(pipe, call=call).raise_for_failures()
    model = describe_pipeline(pipe)
    assert model.grid(model.workload(frames=frames, height=32, width=32, text=16)) == TokenGrid(
        2, 2, 2, 16, True
    )


def test_image_tokens_beside_the_text_are_attended_and_counted():
    """Wan 2.1 image-to-video: cross-attention to 257 image tokens with keys and values of their own."""
    pipe = models.pipeline("wan2.1-i2v", image_encoder=True, layers=2)
    call = models.call("wan2.1-i2v") | {"max_sequence_length": 512, "num_inference_steps": 2}
    check_adapter(pipe, call=call).raise_for_failures()


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox", "ltx", "hunyuan"])
def test_processors_are_exact_in_bfloat16(name):
    pipe = models.pipeline(name)
    for part in (pipe.transformer, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is not None:
            part.to(torch.bfloat16)
    case = AdapterCase(pipe, models.call(name) | {"num_inference_steps": 1})
    next(c for c in ADAPTER_CHECKS if c.__name__ == "check_processors_are_exact")(case)


def test_guidance_off_is_one_branch():
    for name in ("wan2.1", "cogvideox", "hunyuan"):
        case = AdapterCase(name, models.call(name, guided=False))
        assert case.workload().branches == 1
        for check in ADAPTER_CHECKS[-2:]:
            check(case)


def test_two_block_lists_of_any_depth_count_as_one_order():
    pipe = models.pipeline("hunyuan", layers=1, single_layers=3)
    expert = for_module(pipe.transformer).expert("transformer", pipe.transformer)
    assert [b.layout.kind for b in expert.blocks] == ["dual", "single", "single", "single"]
    assert [b.index for b in expert.blocks] == [0, 1, 2, 3]
    assert expert.blocks[1].site == "transformer.single_transformer_blocks.0"
    check_adapter(pipe, call=models.call("hunyuan")).raise_for_failures()


def test_hunyuan_image_text_length_differs_between_the_branches():
    model = describe_pipeline(models.pipeline("hunyuan-i2v"))
    workload = model.workload(text=16)
    assert model.adapter.text_tokens(model, workload, COND) == 576 // 4 + 12
    assert model.adapter.text_tokens(model, workload, UNCOND) == 576 // 2 + 12


def test_branches_are_announced_or_fused():
    from vivace.plans.plan import Plan
    from vivace.plans.session import accelerate

    expected = {"wan2.1": ["cond", "uncond"], "hunyuan-i2v": ["cond", "uncond"], "cogvideox": ["fused"]}
    for name, branches in expected.items():
        with accelerate(models.pipeline(name), Plan()) as session:
            receipt = session("red", **models.call(name)).receipt
        assert all([b.branch for b in step.branches] == branches for step in receipt.steps)
        assert receipt.nfe == receipt.nfe_requested == 16


def test_fused_projections_are_read():
    for name in ("wan2.1", "cogvideox"):
        pipe = models.pipeline(name)
        pipe.transformer.fuse_qkv_projections()
        report = check_adapter(pipe, call=models.call(name))
        assert report["check_processors_are_exact"].verdict == "pass", str(report)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("wan2.1", (9, 32, 48), (10, 32, 32)),
        ("cogvideox", (13, 32, 48), (9, 40, 32)),
        ("ltx", (17, 32, 64), (13, 32, 32)),
        ("hunyuan", (5, 16, 32), (9, 32, 24)),
    ],
)
def test_pixel_rules(name, good, bad):
    pixels = describe_pipeline(models.pipeline(name)).pixels
    pixels.check(*good)
    with pytest.raises(ShapeError, match="nearest"):
        pixels.check(*bad)


def test_every_family_is_found_by_class_and_by_subclass():
    assert set(adapters()) == {"cogvideox", "hunyuan", "ltx", "wan"}
    pipe = models.pipeline("ltx", layers=1)
    sub = type("MyTransformer", (type(pipe.transformer),), {})
    pipe.transformer.__class__ = sub
    assert for_module(pipe.transformer) is by_class("LTXVideoTransformer3DModel")


def test_a_pipeline_without_adapter_is_refused_by_name():
    with pytest.raises(ConfigError, match="has no adapter"):
        AdapterCase(torch.nn.Identity())


# -- seeded faults: each is an adapter with one mistake, and one check that must see it -----------------------


class TextOnTheWrongSide(CogVideoXAdapter):
    family = "fault-side"
    joint_text = "last"


class MaskNotBatched(LTXAdapter):
    family = "fault-batched"
    layouts = {"transformer_blocks": BlockLayout(batched=("hidden_states", "encoder_hidden_states", "temb"))}  # noqa: RUF012


class NoTextStream(CogVideoXAdapter):
    family = "fault-stream"
    layouts = {"transformer_blocks": BlockLayout()}  # noqa: RUF012


class OneListForgotten(HunyuanVideoAdapter):
    family = "fault-lists"
    layouts = {"transformer_blocks": HunyuanVideoAdapter.layouts["transformer_blocks"]}  # noqa: RUF012
    depth_keys = {"transformer_blocks": "num_layers"}  # noqa: RUF012


class ListsInTheWrongOrder(HunyuanVideoAdapter):
    family = "fault-order"
    layouts = dict(reversed(HunyuanVideoAdapter.layouts.items()))  # noqa: RUF012
    depth_keys = dict(reversed(HunyuanVideoAdapter.depth_keys.items()))  # noqa: RUF012


class NoRotation(CogVideoXAdapter):
    family = "fault-rotation"

    def processor(self, site, kernel):
        class Unrotated(CogVideoXKernelProcessor):
            def __call__(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb=None):
                return super().__call__(attn, hidden_states, encoder_hidden_states)

        return Unrotated(kernel)


class CrossCountedAsSelf(WanAdapter):
    family = "fault-kind"
    attention = {"attn1": "self", "attn2": "self"}  # noqa: RUF012


class WrongCompression(WanAdapter):
    family = "fault-grid"

    def compression(self, vae: Mapping[str, Any]) -> tuple[int, int]:
        return 4, 16


class RolesForgotten(LTXAdapter):
    family = "fault-roles"
    roles = {"attn1.to_q": "attention.q"}  # noqa: RUF012


FAULTS: list[tuple[str, Adapter, str]] = [
    ("cogvideox", TextOnTheWrongSide(), "check_text_stands_where_told"),
    ("ltx", MaskNotBatched(), "check_rows_are_independent"),
    ("cogvideox", NoTextStream(), "check_block_calls_bind"),
    ("hunyuan", OneListForgotten(), "check_sites_are_found"),
    ("hunyuan", ListsInTheWrongOrder(), "check_sites_are_found"),
    ("cogvideox", NoRotation(), "check_processors_are_exact"),
    ("wan2.1", CrossCountedAsSelf(), "check_processors_are_exact"),
    ("wan2.1", WrongCompression(), "check_grids_agree"),
    ("ltx", RolesForgotten(), "check_sites_are_found"),
]


@contextmanager
def registered(adapter: Adapter) -> Iterator[None]:
    register(adapter)
    try:
        yield
    finally:
        unregister(adapter)


@pytest.mark.parametrize(("name", "fault", "check"), FAULTS, ids=lambda v: getattr(v, "family", v))
def test_faults_are_noticed(name, fault, check):
    with registered(fault):
        report = check_adapter(name)
    assert check in [r.check for r in report.failures], str(report)

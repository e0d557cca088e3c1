"""Efficient-vDiT's attention tile on live pipelines, against masks of frames made by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vivace import Plan, accelerate
from vivace.calibration.artifact import key_of
from vivace.models.describe import describe_pipeline
from vivace.models.families import for_module
from vivace.techniques.attention.efficient_vdit import EfficientVDiT
from vivace.techniques.attention.mask_file import MaskFile
from vivace.testing import models

CALL = {"num_frames": 17, "num_inference_steps": 3, "output_type": "latent"}


def frames_mask(grid, references) -> torch.Tensor:
    """Bool (S, S): a video token sees its own frame and the reference frames, which see all; so does text."""
    frame = torch.arange(grid.video) // (grid.height * grid.width)
    referred = torch.isin(frame, torch.tensor(references))
    video = (frame[:, None] == frame) | referred | referred[:, None]
    out = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    start = grid.text if grid.text_first else 0
    out[start : start + grid.video, start : start + grid.video] = video
    return out


def by_hand(family, references_of_layer):
    """Latents under masks by hand; `references_of_layer(index)` are frames, None for dense."""
    pipe, clock = models.pipeline(family), []
    for name in ("transformer", "transformer_2"):
        if (module := getattr(pipe, name, None)) is None:
            continue
        adapter = for_module(module)
        for site in adapter.expert(name, module).attentions:
            if site.kind == "cross":
                continue

            def kernel(q, k, v, mask=None, index=site.index):
                references = references_of_layer(index)
                grid = clock[0].evaluation.grid
                allowed = (
                    torch.ones(1, 1, dtype=torch.bool)
                    if references is None
                    else frames_mask(grid, references)
                )
                allowed = allowed if mask is None else allowed & mask
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)

            site.module.set_processor(adapter.processor(site, kernel))
    with accelerate(pipe, Plan()) as session:
        clock.append(session.clock)
        return torch.as_tensor(session("a cone", seed=3, **models.call(family) | CALL).raw.frames)


def run(family, technique):
    with accelerate(models.pipeline(family), Plan([technique])) as session:
        out = session("a cone", seed=3, **models.call(family) | CALL)
    return torch.as_tensor(out.raw.frames), out.receipt


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2", "cogvideox", "hunyuan"])
@pytest.mark.parametrize(("count", "frames"), [(1, [0]), (2, [0, 2])])
def test_frames_see_themselves_and_the_references(family, count, frames) -> None:
    """17 frames are five latent ones."""
    got, receipt = run(family, EfficientVDiT(references=count))
    torch.testing.assert_close(got, by_hand(family, lambda layer: frames), rtol=2e-3, atol=2e-4)
    assert receipt.attention_pairs < receipt.attention_pairs_dense


def test_each_layer_has_its_own_number_from_a_file(tmp_path) -> None:
    """Heads disagree on purpose: their mean error decides for the layer."""
    pipe = models.pipeline("wan2.1")
    model = describe_pipeline(pipe)
    made = MaskFile(
        key=key_of(model, pipe, model.workload()),
        patterns=("full", "frames:2", "frames:1"),
        densities=(1.0, 0.5, 0.3),
        block=128,
        errors={
            "transformer": [
                [[0.0, 0.05, 0.1], [0.0, 0.05, 0.1]],  # frames:1 at 0.1
                [[0.0, 0.02, 0.06], [0.0, 0.16, 0.5]],  # frames:2: means 0.09 and 0.28
                [[0.0, 0.6, 0.7], [0.0, 0.01, 0.01]],  # full: means 0.305 and 0.355
                [[0.0, 0.2, 0.15], [0.0, 0.2, 0.01]],  # frames:1, though frames:2 is worse
            ]
        },
        prompts=1,
        prompts_sha256="",
        seed=0,
        vivace="",
    )
    file = str(made.save(tmp_path / "masks.json"))
    want = by_hand("wan2.1", {0: [0], 1: [0, 2], 2: None, 3: [0]}.get)
    got, _ = run("wan2.1", EfficientVDiT(file=file, threshold=0.1))
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4)

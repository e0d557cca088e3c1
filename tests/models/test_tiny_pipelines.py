"""The tiny pipelines are quick to build, repeatable, and lively: everything that goes in changes what comes out."""

from __future__ import annotations

import time

import pytest
import torch

from vivace.testing import models

FAMILIES = sorted(models.BUILDERS)


def latents(pipe, name: str, prompt: str = "red", **changes):
    call = models.call(name) | {"num_inference_steps": 3} | changes
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt=prompt, generator=generator, output_type="latent", return_dict=False, **call)[0]


def change(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_input_and_every_block_matters(name):
    pipe = models.pipeline(name)
    plain = latents(pipe, name)
    assert torch.isfinite(plain).all()
    assert change(plain, latents(pipe, name, prompt="two blue cones")) > 0.02
    assert (
        change(plain, latents(pipe, name, **models.call(name, guided=False) | {"num_inference_steps": 3}))
        > 0.02
    )
    assert change(plain, latents(pipe, name, num_inference_steps=4)) > 0.005
    for expert in (pipe.transformer, getattr(pipe, "transformer_2", None)):
        lists = ("blocks", "transformer_blocks", "single_transformer_blocks")
        for block in (b for attribute in lists for b in getattr(expert, attribute, ())):
            matrices = [p for p in block.parameters() if p.ndim == 2]
            kept = [m.detach().clone() for m in matrices]
            with torch.no_grad():
                for matrix in matrices:
                    matrix.mul_(0.5)
                assert change(plain, latents(pipe, name)) > 0.01
                for matrix, old in zip(matrices, kept, strict=True):
                    matrix.copy_(old)


@pytest.mark.parametrize("name", FAMILIES)
def test_building_is_quick_seeded_and_leaves_the_global_generator_alone(name):
    models.pipeline(name)  # imports and lazy initialisation are not its cost
    state = torch.random.get_rng_state()
    start = time.process_time()
    one = models.pipeline(name)
    seconds = time.process_time() - start
    same, other = models.pipeline(name), models.pipeline(name, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [torch.cat([p.flatten() for p in p.transformer.parameters()]) for p in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert seconds < 3.0  # 0.02 s to 0.1 s on a quiet machine


@pytest.mark.parametrize("name", [n for n in FAMILIES if n.endswith("i2v") and n != "wan2.2-ti2v"])
def test_the_picture_matters(name):
    pipe = models.pipeline(name)
    dark = models.picture(32, 32).point(lambda v: v // 4)
    assert change(latents(pipe, name), latents(pipe, name, image=dark)) > 1e-3


@pytest.mark.parametrize("name", ["hunyuan", "hunyuan-i2v"])
def test_the_prompt_begins_where_the_pipeline_cuts_the_instruction_off(name):
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video as text
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as image

    tokenizer = models.pipeline(name).tokenizer
    template = (image if name.endswith("i2v") else text).DEFAULT_PROMPT_TEMPLATE
    ids = tokenizer(template["template"].format("red ball")).input_ids
    assert tokenizer.decode(ids[template["crop_start"] :]).startswith("red ball<|eot_id|>")

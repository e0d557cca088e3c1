"""A sampler on the tiny Wan written out as one plain loop, with the blocks left to the test."""

from __future__ import annotations

import pytest
import torch

from vivace.testing.models import CALL, pipeline


@torch.no_grad()
def by_hand(stack, prompt="a red ball", seed=3, steps=8, scale=5.0):
    """Latents of the tiny Wan when `stack(step, branch, h, blocks)` gives the output of its blocks.

    `h` is what enters block 0, (1, S, C), and `blocks` are functions of one tensor.
    """
    pipe = pipeline("wan2.1")
    net = pipe.transformer
    text, negative = pipe.encode_prompt(prompt, "", max_sequence_length=CALL["max_sequence_length"])
    x = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    pipe.scheduler.set_timesteps(steps)
    for i, t in enumerate(pipe.scheduler.timesteps):
        prediction = {}
        for branch, embedded in (("cond", text), ("uncond", negative)):
            h = net.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()
            temb, mod, embedded, _ = net.condition_embedder(t.expand(1), embedded, None)
            rest = (embedded, mod.unflatten(1, (6, -1)), net.rope(x))
            h = stack(i, branch, h, [lambda a, b=block, r=rest: b(a, *r) for block in net.blocks])
            shift, gain = (net.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
            h = net.proj_out(net.norm_out(h) * (1 + gain) + shift).reshape(1, 3, 2, 2, 1, 2, 2, 16)
            prediction[branch] = h.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        u, c = prediction["uncond"], prediction["cond"]
        x = pipe.scheduler.step(u + scale * (c - u), t, x, return_dict=False)[0]
    return x


def forecast_by_hand(computed, forecast, **options):
    """Latents when the stack runs at the steps in `computed` only and is `forecast(memory, step)` between.

    `memory` lists (step, output) of the computed steps of the branch, oldest first.
    """
    memories = {"cond": [], "uncond": []}

    def stack(step, branch, h, blocks):
        memory = memories[branch]
        if step not in computed:
            return forecast(memory, step)
        for block in blocks:
            h = block(h)
        memory.append((step, h))
        return h

    return by_hand(stack, **options)


@pytest.fixture
def sampler_by_hand():
    return by_hand


@pytest.fixture
def forecasting_by_hand():
    return forecast_by_hand

"""A plain denoising loop with guidance written out by hand: the oracle of the guidance techniques. Knows no Vivace."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

SCALE = 4.0
Rule = Callable[[int, float, torch.Tensor, Callable[[], torch.Tensor]], torch.Tensor]
"""rule(step, sigma, c, evaluate_u) -> u, for one sample."""


class Loop:
    """A Wan transformer and scheduler driven by hand, one sample at a time."""

    def __init__(self, pipe, samples=1, seed=11, frames=3, size=4):
        self.transformer, self.template = pipe.transformer, pipe.scheduler
        generator = torch.Generator().manual_seed(seed)
        config = self.transformer.config
        self.noise = torch.randn(samples, config.in_channels, frames, size, size, generator=generator)
        self.cond, self.uncond = (
            torch.randn(samples, 16, config.text_dim, generator=generator) for _ in range(2)
        )

    @torch.no_grad()
    def __call__(self, make_rule: Callable[[], Rule], steps: int = 8) -> tuple[torch.Tensor, int]:
        """Final latents of all samples, and how often the transformer was called for a sample."""
        out, calls = [], 0
        for i in range(len(self.noise)):
            scheduler, rule = copy.deepcopy(self.template), make_rule()
            scheduler.set_timesteps(steps)
            x = self.noise[i : i + 1]

            def predict(text, x, t, i=i):
                nonlocal calls
                calls += 1
                return self.transformer(x, t.expand(1), text[i : i + 1], return_dict=False)[0]

            for step, t in enumerate(scheduler.timesteps):
                c = predict(self.cond, x, t)
                sigma = float(scheduler.sigmas[step])
                u = rule(step, sigma, c, lambda x=x, t=t: predict(self.uncond, x, t))
                x = scheduler.step(u + SCALE * (c - u), t, x, return_dict=False)[0]
            out.append(x)
        return torch.cat(out), calls

    def ours(self, pipe, *techniques, steps=8):
        """The same through the pipeline in a session: its latents and receipt."""
        from vivace.plans.plan import Plan
        from vivace.plans.session import accelerate

        with accelerate(pipe, Plan(techniques)) as session:
            out = session(
                None,
                prompt_embeds=self.cond,
                negative_prompt_embeds=self.uncond,
                latents=self.noise,
                guidance_scale=SCALE,
                num_inference_steps=steps,
                num_frames=(self.noise.shape[2] - 1) * 4 + 1,
                height=self.noise.shape[3] * 8,
                width=self.noise.shape[4] * 8,
                output_type="latent",
            )
        return out.raw.frames, out.receipt

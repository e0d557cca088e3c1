"""A denoising loop over a Wan transformer that can evaluate guidance in one batched call or in two.

No released pipeline does both, so the claim that a technique does not care which it is needs a loop of our own.
The transformer, its weights and the scheduler are the tiny pipeline's real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from vivace.models.adapter import Guidance
from vivace.models.describe import describe_pipeline
from vivace.models.families import adapters
from vivace.models.wan import WanAdapter
from vivace.plans.session import accelerate
from vivace.techniques.base import Technique
from vivace.testing.subjects import Run, Subject, plan_of

SCALE = 4.0


class FusedWanTransformer(WanTransformer3DModel):
    """Wan's transformer under a name of its own, so that an adapter can say its guidance is fused."""


class FusedWanAdapter(WanAdapter):
    """Wan, with the guidance pair in one batch."""

    family = "wan-fused"
    transformer_classes = (FusedWanTransformer.__name__,)
    guidance = Guidance.FUSED


@contextmanager
def fused_family() -> Iterator[None]:
    """The family with fused guidance exists inside the block."""
    known = adapters()
    known[FusedWanAdapter.family] = FusedWanAdapter()
    try:
        yield
    finally:
        del known[FusedWanAdapter.family]


class GuidedLoop:
    """The shortest pipeline: set the timesteps, evaluate both branches, step."""

    def __init__(self, subject: Subject, *, fused: bool) -> None:
        self.fused = fused
        self.transformer: Any = subject.pipeline.transformer
        if fused:
            twin: Any = FusedWanTransformer.from_config(self.transformer.config)
            twin.load_state_dict(self.transformer.state_dict())
            self.transformer = twin.eval()
        self.scheduler = subject.pipeline.scheduler
        self.guidance_scale = SCALE
        self.components = {"transformer": self.transformer, "scheduler": self.scheduler}
        self.model = describe_pipeline(self, name="a guided loop", defaults=subject.defaults)
        generator = torch.Generator().manual_seed(11)
        shape, words = subject.exact().latents.shape, (1, 16, self.transformer.config.text_dim)
        self._noise = torch.randn(shape, generator=generator)
        self._text = [torch.randn(words, generator=generator) for _ in range(2)]

    def run(self, technique: Technique, factor: float = 1.0) -> Run:
        """One generation in a session of its own, from the noise times `factor`."""
        with accelerate(self, plan_of(technique), model=self.model) as session:
            out = session(latents=self._noise * factor)
            return Run(out.raw.frames, out.receipt)

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor, num_inference_steps: int = 8) -> Any:
        self.scheduler.set_timesteps(num_inference_steps)
        cond, uncond = self._text
        for t in self.scheduler.timesteps:
            time = t.expand(latents.shape[0])
            if self.fused:
                both = self.transformer(
                    torch.cat([latents, latents]), torch.cat([time, time]), torch.cat([uncond, cond])
                ).sample
                without, wanted = both.chunk(2)
            else:
                with self.transformer.cache_context("cond"):
                    wanted = self.transformer(latents, time, cond, return_dict=False)[0]
                with self.transformer.cache_context("uncond"):
                    without = self.transformer(latents, time, uncond, return_dict=False)[0]
            guided = without + self.guidance_scale * (wanted - without)
            latents = self.scheduler.step(guided, t, latents, return_dict=False)[0]
        return SimpleNamespace(frames=latents)

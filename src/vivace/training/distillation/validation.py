"""What a student makes while it learns: clips of held-out captions, how many attributes are right, and a sheet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vivace.tiny.train.clips import ClipShape, to_frames
from vivace.tiny.train.evaluate import accuracy, load_check, prompts_of
from vivace.tiny.train.seeds import held_out
from vivace.tiny.train.sheets import contact_sheet
from vivace.tiny.whole_clip import decode_latents
from vivace.training.chance import Chance
from vivace.training.data.encoding import Encoder, Normalisation
from vivace.training.distillation.recipe import Recipe, sample
from vivace.training.distillation.team import Team
from vivace.world import sample_scenes

PORTION = 16
"""Clips made at a time; how many, does not matter to what is made."""
SHOWN = 6
"""Rows of a sheet."""


@dataclass
class Validation:
    """Held-out captions of the world with fixed noise; the world's verifier says what is right.

    Args:
        encoder: of the pipeline, on the device. shape: of the clips. count: of captions.
        portion: clips made at a time, the last ones filled up: compiled blocks know one size, that of
            training; 0 for a few.
    """

    encoder: Encoder
    shape: ClipShape
    count: int = 32
    portion: int = 0

    def __post_init__(self) -> None:
        self.scenes = sample_scenes(held_out("dev", self.count))
        self.prompts = prompts_of(self.scenes)
        self.text = self.encoder.text(self.prompts)["text"]
        self.check = load_check(None, self.encoder.device)
        model = self.encoder.model
        assert model.adapter is not None
        asked = model.workload(frames=self.shape.frames, height=self.shape.height, width=self.shape.width)
        size = (self.encoder.pipeline.transformer.config.in_channels, *model.adapter.latent(model, asked))
        self.noise = Chance("cpu", 7, 0, "validation").normal(torch.empty(self.count, *size))

    @torch.no_grad()
    def __call__(self, team: Team, recipe: Recipe, sheet: Path | None = None) -> dict[str, float]:
        """`accuracy`: mean share of right attributes, 0 to 1. Writes a sheet of renders and what the student made."""
        device, clips = self.encoder.device, []
        portion = self.portion or PORTION
        for start in range(0, self.count, portion):
            rows = torch.arange(start, start + portion).clamp_max(self.count - 1)
            noise, text = self.noise[rows].to(device), self.text[rows].to(device)
            clips.append(self.decode(sample(team, recipe, noise, text)[: self.count - start]))
        video = torch.cat(clips)
        if sheet is not None:
            shown = min(SHOWN, self.count)
            truth = self.shape.draw(self.scenes[:shown], torch.device("cpu"))[0]
            contact_sheet(sheet, truth, video[:shown].cpu(), self.prompts[:shown])
        table = accuracy(self.check, video, self.prompts, torch.device(device))
        return {"accuracy": round(table["mean"], 4)}

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 clips (B, T, H, W, 3)."""
        vae: Any = self.encoder.pipeline.vae
        how = Normalisation.of(vae)
        raw = latents / how.gain.to(latents) + how.centre.to(latents)
        return torch.cat([to_frames(decode_latents(vae, part.to(vae.dtype))) for part in raw.split(4)])

"""How well a VAE gives clips back, through the plain chunked path of diffusers."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from vivace.tiny.train.clips import ClipShape, to_frames, to_model


def decibel(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of mean squared errors of values in [0, 1]."""
    return -10.0 * error.clamp(min=1e-10).log10()


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """uint8 (B, T, H, W, 3) -> the same after encoding (posterior mean) and decoding by the class's own methods."""
    encoded = cast(AutoencoderKLOutput, vae.encode(to_model(video).to(vae.dtype)))
    decoded = cast(DecoderOutput, vae.decode(encoded.latent_dist.mode()))
    return to_frames(decoded.sample)


@torch.no_grad()
def measure_vae(
    vae: AutoencoderKLWan, seeds: list[int], shape: ClipShape, device: torch.device, batch: int = 16
) -> dict[str, Any]:
    """Mean over clips of the PSNR of all pixels, of object pixels, and of every frame (a decline would be drift)."""
    total, objects, frames = [], [], []
    for start in range(0, len(seeds), batch):
        video, mask = shape.render(seeds[start : start + batch], device)
        error = ((reconstruct(vae, video).float() - video.float()) / 255.0).square().mean(dim=-1)
        total.append(decibel(error.mean(dim=(1, 2, 3))))
        inside = mask.float()
        seen = inside.sum(dim=(1, 2, 3)) > 0
        objects.append(
            decibel((error * inside).sum(dim=(1, 2, 3)) / inside.sum(dim=(1, 2, 3)).clamp(min=1.0))[seen]
        )
        frames.append(decibel(error.mean(dim=(2, 3))))
    everything = torch.cat(total)
    return {
        "clips": len(seeds),
        "psnr": float(everything.mean()),
        "psnr_worst_clip": float(everything.min()),
        "psnr_objects": float(torch.cat(objects).mean()),
        "psnr_per_frame": [round(float(v), 3) for v in torch.cat(frames).mean(dim=0)],
    }

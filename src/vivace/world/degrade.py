"""Damage that looks like that of decoders and diffusion: what the verifier must read through. Labels never change."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def degrade(x: Tensor, index: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Clips (B, 3, T, H, W) in [-1, 1], each damaged in its own way drawn from `seed`; same shape and range.

    `index` (B, T, H, W) says which object a pixel shows; it is shifted along and returned beside the clips.

    A small shift and zoom, colour and brightness, loss of resolution, coarse and fine noise, stuttering frames.
    About one clip in eight stays as it is.
    """
    b, channels, t, h, w = x.shape
    device = x.device
    draw = torch.Generator().manual_seed(seed)
    field = torch.Generator(device=device).manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(shape, generator=draw)).to(device)

    def noise(height: int, width: int) -> Tensor:
        return torch.randn((b * t, channels, height, width), generator=field, device=device)

    frames = torch.cat([x, index[:, None].to(x.dtype)], dim=1).transpose(1, 2)
    if torch.rand((), generator=draw) < 0.5:  # some clips have fewer frames than the grid: they repeat
        stutter = torch.linspace(0, 1, t) * int(torch.randint(9, 16, (), generator=draw))
        stutter = (stutter.round() / stutter.max() * (t - 1)).round().long().to(device)
        chosen = uniform(0, 1, b) < 0.5
        frames = torch.where(chosen[:, None, None, None, None], frames[:, stutter], frames)

    zoom, shift = uniform(0.95, 1.05, b), uniform(-0.06, 0.06, b, 2)
    zero = torch.zeros_like(zoom)
    placed = torch.stack(
        [torch.stack([zoom, zero, shift[:, 0]], -1), torch.stack([zero, zoom, shift[:, 1]], -1)], 1
    )
    grid = F.affine_grid(placed, [b, channels, h, w], align_corners=False).repeat_interleave(t, 0)
    flat, labels = frames.flatten(0, 1).split([channels, 1], dim=1)
    flat = F.grid_sample(flat, grid, padding_mode="reflection", align_corners=False)
    labels = F.grid_sample(labels, grid, mode="nearest", padding_mode="reflection", align_corners=False)

    size = int(h * float(0.4 + 0.5 * torch.rand((), generator=draw)))
    coarse = F.interpolate(flat, (size, size), mode="bilinear", align_corners=False, antialias=True)
    coarse = F.interpolate(coarse, (h, w), mode="bilinear", align_corners=False)
    share = (uniform(0, 1, b) * (uniform(0, 1, b) < 0.6)).repeat_interleave(t)[:, None, None, None]
    flat = flat + share * (coarse - flat)

    blotches = F.interpolate(
        noise(max(h // 8, 1), max(w // 8, 1)), (h, w), mode="bilinear", align_corners=False
    )
    fine_sigma, coarse_sigma = (
        uniform(0, top, b).repeat_interleave(t)[:, None, None, None] for top in (0.10, 0.10)
    )
    flat = flat + fine_sigma * noise(h, w) + coarse_sigma * blotches

    damaged = flat.unflatten(0, (b, t)).transpose(1, 2)
    gain, offset = uniform(0.90, 1.08, b, 3, 1, 1, 1), uniform(-0.10, 0.10, b, 1, 1, 1, 1)
    damaged = (damaged * gain + offset).clamp(-1.0, 1.0)
    keep = uniform(0, 1, b)[:, None, None, None, None] < 0.125
    moved = labels.unflatten(0, (b, t))[:, :, 0].to(index.dtype)
    return torch.where(keep, x, damaged), torch.where(keep[:, 0], index, moved)

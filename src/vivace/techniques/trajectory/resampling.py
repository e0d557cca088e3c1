"""Latents from one size to another on a straight noise path: x = (1 - sigma) x0 + sigma noise.

All tensors are (B, C, T, H, W); sizes are (height, width) in latent positions; latent frames are kept.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

Size = tuple[int, int]


def small_size(size: Size, patch: Size, scale: float) -> Size:
    """`size` times `scale`, each side rounded down to whole tokens, at least one token."""
    # The hundredth of a thousandth of a token is for products such as 50 * 0.58, which floats put below 29.
    height, width = (max(1, int(n // p * scale + 1e-5)) * p for n, p in zip(size, patch, strict=True))
    return height, width


def shrink_noise(noise: torch.Tensor, size: Size) -> torch.Tensor:
    """The low frequencies of white noise as white noise of a smaller size.

    The lowest coefficients of an orthonormal cosine transform are transformed back at the new size. Each of the two
    is an isometry, so independent values of unit variance stay independent and of unit variance, at any ratio of
    the sizes; a mean over neighbours would shrink the variance, and where windows overlap it would correlate them.
    """
    rows, columns = (
        _projection(old, new).to(noise.device) for old, new in zip(noise.shape[-2:], size, strict=True)
    )
    return (rows @ noise.float() @ columns.T).to(noise.dtype)


def _projection(old: int, new: int) -> torch.Tensor:
    """(new, old) float32 with orthonormal rows."""
    return (_cosines(new).T @ _cosines(old)[:new]).float()


def _cosines(n: int) -> torch.Tensor:
    """Orthonormal type-2 cosine transform (n, n) float64, one frequency a row."""
    import torch

    k = torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi / n * (k + 0.5) * k[:, None]) * math.sqrt(2.0 / n)
    basis[0] /= math.sqrt(2.0)
    return basis


def resize(clean: torch.Tensor, size: Size) -> torch.Tensor:
    """A clean estimate at another size, frame by frame: mean over areas downwards, linear between points upwards."""
    import torch.nn.functional as F

    batch, channels, frames = clean.shape[:3]
    flat = clean.float().transpose(1, 2).flatten(0, 1)
    if size[0] * size[1] < clean.shape[-2] * clean.shape[-1]:
        out = F.interpolate(flat, size, mode="area")
    else:
        out = F.interpolate(flat, size, mode="bilinear", align_corners=False)
    return out.unflatten(0, (batch, frames)).transpose(1, 2).reshape(batch, channels, frames, *size)


def seeds_of(noise: torch.Tensor) -> list[int]:
    """A seed for every sample, from the bits of its own first noise: the same alone and in any batch."""
    rows = noise.detach().float().cpu().contiguous().numpy()
    # Torch seeds are 64-bit with a sign.
    return [int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:7], "big") for row in rows]


def noise_like(sample: torch.Tensor, size: Size, seeds: Sequence[int]) -> torch.Tensor:
    """White noise (B, C, T, *size) float32 on the sample's device; sample i draws from a CPU generator of seed i."""
    import torch

    shape = (*sample.shape[1:3], *size)
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws).to(sample.device)


def jump(
    sample: torch.Tensor,
    velocity: torch.Tensor,
    sigma: float,
    next_sigma: float,
    size: Size,
    seeds: Sequence[int],
) -> torch.Tensor:
    """A state at `sigma` as a state at `next_sigma` and another size.

    The clean estimate x - sigma v is resized and noised again to exactly the level that the next step expects.

    Args:
        sample: x at `sigma`, (B, C, T, H, W).
        velocity: the network's prediction v = noise - x0 there.
        sigma: noise level of the sample.
        next_sigma: noise level of the result; may be higher.
        size: size of the result.
        seeds: one for each sample.
    """
    clean = resize(sample.float() - sigma * velocity.float(), size)
    return ((1.0 - next_sigma) * clean + next_sigma * noise_like(sample, size, seeds)).to(sample.dtype)


def shifted(sigmas: torch.Tensor, factor: float) -> torch.Tensor:
    """Noise levels whose flow shift is `factor` times what it was: f sigma / (1 + (f - 1) sigma) (arXiv 2403.03206)."""
    return factor * sigmas / (1.0 + (factor - 1.0) * sigmas)

"""Low and high spatial frequencies of a transformer's output, frame by frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.core.shapes import TokenGrid

if TYPE_CHECKING:
    import torch

RADIUS = 5
"""Low frequencies lie within the shorter side's length over this number from zero."""


def split(x: torch.Tensor, grid: TokenGrid | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, high) with low + high = x.

    Args:
        x: (B, ..., H, W), or packed video tokens (B, S, C) whose places `grid` tells.
        grid: token grid; packed tokens that do not fill it count as low frequencies altogether.
    """
    import torch

    if x.ndim > 3:
        low = _low(x.float(), (-2, -1)).to(x.dtype)
        return low, x - low
    if grid is None or grid.video != x.shape[1]:
        return x, torch.zeros_like(x)
    planes = x.float().unflatten(1, (grid.frames, grid.height, grid.width))
    low = _low(planes, (2, 3)).flatten(1, 3).to(x.dtype)
    return low, x - low


def _low(x: torch.Tensor, axes: tuple[int, int]) -> torch.Tensor:
    """The part of `x` whose frequencies along two axes lie in the circle around zero."""
    import torch

    height, width = (x.shape[a] for a in axes)
    rows, columns = (torch.fft.fftfreq(n, 1.0 / n, device=x.device) for n in (height, width))
    inside = rows[:, None] ** 2 + columns[None, :] ** 2 <= (min(height, width) // RADIUS) ** 2
    spectrum = torch.fft.fft2(x, dim=axes)
    while inside.ndim < x.ndim - (axes[0] % x.ndim):
        inside = inside.unsqueeze(-1)
    return torch.fft.ifft2(spectrum * inside, dim=axes).real

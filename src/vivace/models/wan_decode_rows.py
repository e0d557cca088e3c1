"""The decoder of `AutoencoderKLWan` with its passes between the convolutions joined (`vivace.kernels.pixel_rows`).

Convolutions take half of a plain decoding on a GPU. The rest are passes over activations of gigabytes: two conversions
and four passes for each norm, SiLU, a copy with the past in front, a bias, a sum. Here norm, SiLU, the bias of the
convolution before and the place behind the past frames are one pass, and so are a bias and the sum with the shortcut.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vivace.kernels.pixel_rows.op import PixelRows
from vivace.models.wan_decode import WanDecode

Pair = tuple[Tensor, Tensor]


class RowsDecode(WanDecode):
    """`WanDecode` over pixels whose channels lie side by side, on one backend of `pixel_rows`."""

    def __init__(self, vae: Any, dtype: torch.dtype | None, rows: PixelRows) -> None:
        super().__init__(vae, dtype, channels_last=True)
        self.rows = rows
        self._unit = functools.partial(unit, rows)
        self._block = functools.partial(residual, rows)
        self._space = functools.partial(double_space, rows)
        self._time = double_time


def _normed(
    rows: PixelRows,
    x: Tensor,
    past: Tensor | None,
    gain: Tensor,
    before: Tensor | None,
    weight: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Norm, SiLU and convolution of x + `before`; the convolution's own bias is left to who comes next."""
    frames, radius = weight.shape[2] - 1, weight.shape[3] // 2
    y = rows.norm_silu(x, gain.flatten(), before, past, frames)
    new = y[:, :, -frames:].clone() if keep and frames else None
    return F.conv3d(y, weight, None, padding=(0, radius, radius)), new


def unit(
    rows: PixelRows,
    x: Tensor,
    past: Tensor | None,
    gain: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `wan_decode.unit`."""
    if gain is not None:
        y, new = _normed(rows, x, past, gain, None, weight, keep)
        return (y if bias is None else y.add_(bias[:, None, None, None])), new
    frames, radius = weight.shape[2] - 1, weight.shape[3] // 2
    new = None
    if frames:
        front = x.new_zeros(*x.shape[:2], frames, *x.shape[3:]) if past is None else past
        x = torch.cat((front, x), dim=2)
        new = x[:, :, -frames:].clone() if keep else None
    x = x.contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(x, weight, bias, padding=(0, radius, radius)), new


def residual(
    rows: PixelRows,
    x: Tensor,
    pasts: tuple[Tensor | None, Tensor | None],
    gains: Pair,
    weights: Pair,
    biases: tuple[Tensor | None, Tensor | None],
    shortcut: tuple[Tensor, Tensor | None] | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `wan_decode.residual`."""
    y, first = _normed(rows, x, pasts[0], gains[0], None, weights[0], keep)
    y, second = _normed(rows, y, pasts[1], gains[1], biases[0], weights[1], keep)
    beside = x if shortcut is None else F.conv3d(x, *shortcut)
    return rows.add_rows(y, beside, biases[1]), first, second


def double_space(rows: PixelRows, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `wan_decode.double_space`."""
    batch, _, time = x.shape[:3]
    y = rows.double_pixels(x).transpose(1, 2).flatten(0, 1)
    y = F.conv2d(y, weight, None, padding=weight.shape[-1] // 2)
    if bias is not None:
        y.add_(bias[:, None, None])
    return y.unflatten(0, (batch, time)).transpose(1, 2)


def double_time(x: Tensor) -> Tensor:
    """See `wan_decode.double_time`; copied once."""
    rows = x.permute(0, 2, 3, 4, 1).unflatten(-1, (2, -1)).permute(0, 1, 4, 2, 3, 5)
    return rows.flatten(1, 2).permute(0, 4, 1, 2, 3)

"""What stands between the convolutions of a video decoder, over pixels whose channels lie side by side.

    norm_silu(x, gain, bias, past, frames) -> y     silu(normed(x + bias)), behind the frames that a convolution needs
    add_rows(y, beside, bias)                       y += beside + bias, in place
    double_pixels(x) -> y                           every pixel two by two

* x (B, C, T, H, W) in memory format `channels_last_3d`, any float dtype; so is every result. `beside` likewise.
* `gain` (C) holds the norm's weight times the square root of C: root mean square over channels as
  `torch.nn.functional.normalize` does it, in float32. `bias` (C) or None is the convolution's that made x.
* `norm_silu` gives (B, C, frames + T, H, W): in front the `past` (B, C, frames, H, W), or zeros where it is None.
* `double_pixels` gives (B, C, T, 2 H, 2 W), nearest neighbours.

One read and one write of each number, where torch takes four to eight passes. A pixel's result depends on that pixel
only. No gradients. Custom operations of torch, `vivace::norm_silu`, `vivace::add_rows` and `vivace::double_pixels`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vivace.kernels.api import Candidate, register
from vivace.kernels.gpu import avoid_interpreted, without_triton

if TYPE_CHECKING:
    import torch

OP = "pixel_rows"
SMALLEST = 1e-12
"""Least length that is divided by, as in `torch.nn.functional.normalize`."""
WIDEST = 4096
"""Most channels that the Triton kernels hold in registers."""


def check_channels(x: torch.Tensor, **vectors: torch.Tensor | None) -> None:
    """Refuse what does not fit together.

    Raises:
        ValueError: the sentence says what.
        RuntimeError: gradients are asked for.
    """
    import torch

    if x.ndim != 5:
        raise ValueError(f"x must be (B, C, T, H, W), not {tuple(x.shape)}.")
    for name, given in vectors.items():
        if given is not None and tuple(given.shape) != (x.shape[1],):
            raise ValueError(f"{name} must have the shape ({x.shape[1]},), not {tuple(given.shape)}.")
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("pixel rows have no gradients: call them under torch.no_grad().")


def _load(name: str) -> Callable[[], Any]:
    def load() -> Any:
        return importlib.import_module(f"vivace.kernels.{OP}.op").PixelRows(name)

    return load


def _refuse_triton(context: Mapping[str, Any]) -> str | None:
    if reason := without_triton(context):
        return reason
    if context.get("channels", 0) > WIDEST:
        return f"pixels of {context['channels']} channels do not fit; {WIDEST} at most"
    return None


def _never(context: Mapping[str, Any]) -> str | None:
    return None


register(OP, Candidate("triton", _refuse_triton, _load("triton"), avoid_interpreted))
register(OP, Candidate("reference", _never, _load("reference")))

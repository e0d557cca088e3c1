"""The operations of `spec` as custom operations of torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch

from vivace.kernels.pixel_rows.spec import OP, check_channels

T = torch.Tensor


def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"vivace.kernels.{OP}.{backend}")


@torch.library.custom_op("vivace::norm_silu", mutates_args=())
def _norm_silu(x: T, gain: T, bias: T | None, past: T | None, frames: int, backend: str) -> T:
    return _module(backend).norm_silu(x, gain, bias, past, frames)


@_norm_silu.register_fake
def _(x: T, gain: T, bias: object, past: object, frames: int, backend: str) -> T:
    shape = (*x.shape[:2], frames + x.shape[2], *x.shape[3:])
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last_3d)


@torch.library.custom_op("vivace::add_rows", mutates_args=("y",))
def _add_rows(y: T, beside: T, bias: T | None, backend: str) -> None:
    _module(backend).add_rows(y, beside, bias)


@_add_rows.register_fake
def _(y: T, beside: T, bias: object, backend: str) -> None:
    return None


@torch.library.custom_op("vivace::double_pixels", mutates_args=())
def _double_pixels(x: T, backend: str) -> T:
    return _module(backend).double_pixels(x)


@_double_pixels.register_fake
def _(x: T, backend: str) -> T:
    shape = (*x.shape[:3], 2 * x.shape[3], 2 * x.shape[4])
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last_3d)


@dataclass(frozen=True)
class PixelRows:
    """The operations on one backend."""

    backend: str

    def norm_silu(self, x: T, gain: T, bias: T | None = None, past: T | None = None, frames: int = 0) -> T:
        """silu(normed(x + bias)) behind `frames` frames: (B, C, frames + T, H, W).

        Raises:
            ValueError: the tensors do not fit each other.
            RuntimeError: gradients are asked for.
        """
        check_channels(x, gain=gain, bias=bias)
        wanted = (*x.shape[:2], frames, *x.shape[3:])
        if past is not None and tuple(past.shape) != wanted:
            raise ValueError(f"past must be {wanted}, not {tuple(past.shape)}.")
        return _norm_silu(x, gain, bias, past, frames, self.backend)

    def add_rows(self, y: T, beside: T, bias: T | None = None) -> T:
        """y with beside + bias added in place.

        Raises:
            ValueError: the tensors do not fit each other.
            RuntimeError: gradients are asked for.
        """
        check_channels(y, bias=bias)
        if y.shape != beside.shape:
            raise ValueError(f"beside must be {tuple(y.shape)}, not {tuple(beside.shape)}.")
        _add_rows(y, beside, bias, self.backend)
        return y

    def double_pixels(self, x: T) -> T:
        """Every pixel two by two: (B, C, T, 2 H, 2 W).

        Raises:
            ValueError: x has another number of dimensions.
            RuntimeError: gradients are asked for.
        """
        check_channels(x)
        return _double_pixels(x, self.backend)

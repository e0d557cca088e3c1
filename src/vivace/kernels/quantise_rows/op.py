"""`vivace::quantise_rows` as a custom operation of torch; see `spec`."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from vivace.kernels.launch import at_once
from vivace.kernels.quantise_rows.spec import Before, check_inputs

T = torch.Tensor


@torch.library.custom_op("vivace::quantise_rows", mutates_args=())
def _op(
    x: T, kind: str, norm: str, eps: float, weight: T | None, bias: T | None, scale: T | None, shift: T | None,
    gelu: bool, backend: str,
) -> tuple[T, T]:  # fmt: skip
    before = Before(norm, eps, weight, bias, scale, shift, gelu)
    return importlib.import_module(f"{__package__}.{backend}").run(x, kind, before)


@_op.register_fake
def _(x: T, kind: str, *rest: object) -> tuple[T, T]:
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:2], dtype=torch.float32)


def quantise_rows(
    x: T, kind: str = "int8", before: Before | None = None, backend: str = "reference"
) -> tuple[T, T]:
    """Codes and scales of rows (`vivace.kernels.quantise_rows.spec`).

    Raises:
        ValueError: the tensors do not fit each other.
        RuntimeError: gradients are asked for.
    """
    f = before or Before()
    check_inputs(x, kind, f)
    if at_once(x):
        return importlib.import_module(f"{__package__}.{backend}").run(x, kind, f)
    return _op(x, kind, f.norm, f.eps, f.weight, f.bias, f.scale, f.shift, f.gelu, backend)


def runner(backend: str) -> Callable[..., tuple[T, T]]:
    """`quantise_rows` on one backend."""

    def run(x: T, kind: str = "int8", before: Before | None = None) -> tuple[T, T]:
        return quantise_rows(x, kind, before, backend)

    return run

"""`vivace::scaled_matmul` as a custom operation of torch; see `spec`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from vivace.kernels.launch import at_once
from vivace.kernels.scaled_matmul.spec import After, check_inputs

T = torch.Tensor


@torch.library.custom_op("vivace::scaled_matmul", mutates_args=())
def _op(
    a: T, a_scale: T, b: T, b_scale: T, bias: T | None, gelu: bool, residual: T | None, gate: T | None,
    dtype: torch.dtype, backend: str,
) -> T:  # fmt: skip
    module = importlib.import_module(f"{__package__}.{backend}")
    return module.run(a, a_scale, b, b_scale, bias, After(gelu, residual, gate), dtype)


@_op.register_fake
def _(
    a: T,
    a_scale: T,
    b: T,
    b_scale: T,
    bias: Any,
    gelu: bool,
    residual: Any,
    gate: Any,
    dtype: Any,
    backend: str,
) -> T:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


def scaled_matmul(
    a: T, a_scale: T, b: T, b_scale: T, bias: T | None = None, after: After | None = None,
    dtype: torch.dtype = torch.bfloat16, backend: str = "reference",
) -> T:  # fmt: skip
    """A linear layer on 8-bit codes (`vivace.kernels.scaled_matmul.spec`).

    Raises:
        ValueError: the tensors do not fit each other.
    """
    g = after or After()
    check_inputs(a, a_scale, b, b_scale, bias, g)
    if at_once(a):
        return importlib.import_module(f"{__package__}.{backend}").run(a, a_scale, b, b_scale, bias, g, dtype)
    return _op(a, a_scale, b, b_scale, bias, g.gelu, g.residual, g.gate, dtype, backend)


def runner(backend: str) -> Callable[..., T]:
    """`scaled_matmul` on one backend."""

    def run(
        a: T, a_scale: T, b: T, b_scale: T, bias: T | None = None, after: After | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> T:  # fmt: skip
        return scaled_matmul(a, a_scale, b, b_scale, bias, after, dtype, backend)

    return run

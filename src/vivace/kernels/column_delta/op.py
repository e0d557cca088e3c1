"""`vivace::column_sums` and `vivace::column_attention` as custom operations of torch; see `spec`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from vivace.kernels.column_delta.spec import Columns, check_inputs

T = torch.Tensor


@torch.library.custom_op("vivace::column_sums", mutates_args=())
def _sums(q: T, k: T, lse: T, bias: T | None, block: int, scale: float, backend: str) -> T:
    return _module(backend).sums(q, k, lse, block, scale, bias)


@_sums.register_fake
def _(q: T, k: T, lse: T, bias: Any, block: int, scale: float, backend: str) -> Any:
    b, h, s, _ = q.shape
    return q.new_empty((b, h, s // block, k.shape[2]), dtype=torch.float32)


@torch.library.custom_op("vivace::column_attention", mutates_args=())
def _attend(q: T, k: T, v: T, index: T, bias: T | None, scale: float, backend: str) -> tuple[T, T]:
    return _module(backend).attend(q, k, v, index, scale, bias)


@_attend.register_fake
def _(q: T, *rest: Any) -> Any:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def _module(backend: str) -> Any:
    return importlib.import_module(f"{__package__}.{backend}")


def column_sums(
    q: T, k: T, lse: T, block: int, scale: float, bias: T | None = None, backend: str = "reference"
) -> T:
    """Probabilities summed over blocks of queries (`vivace.kernels.column_delta.spec`).

    Raises:
        ValueError: the tensors do not fit each other.
        RuntimeError: gradients are asked for.
    """
    check_inputs(q, k, block, bias)
    return _sums(q, k, lse, bias, block, scale, backend)


def column_attention(
    q: T, k: T, v: T, index: T, scale: float, bias: T | None = None, backend: str = "reference"
) -> tuple[T, T]:
    """Attention over single keys (`vivace.kernels.column_delta.spec`).

    Raises:
        ValueError: the tensors do not fit each other.
        RuntimeError: gradients are asked for.
    """
    check_inputs(q, k, index.shape[2], bias, index)
    return _attend(q, k, v, index, bias, scale, backend)


def runner(backend: str) -> Callable[..., Columns]:
    """Both operations on one backend."""

    def sums(q: T, k: T, lse: T, block: int, scale: float, bias: T | None = None) -> T:
        return column_sums(q, k, lse, block, scale, bias, backend)

    def attend(q: T, k: T, v: T, index: T, scale: float, bias: T | None = None) -> tuple[T, T]:
        return column_attention(q, k, v, index, scale, bias, backend)

    return lambda: Columns(sums, attend)

"""`vivace::block_attention` as a custom operation of torch; see `spec`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from vivace.kernels.block_attention import reference
from vivace.kernels.block_attention.spec import Routes, check_inputs

T = torch.Tensor


@torch.library.custom_op("vivace::block_attention", mutates_args=())
def _op(
    q: T, k: T, v: T, index: T, count: T, sizes: T | None, bias: T | None, block: int, scale: float, backend: str,
    skip: float = 0.0,
) -> tuple[T, T]:  # fmt: skip
    routes = Routes(index, count, sizes, block)
    if skip > 0.0 and backend == "triton":
        return _module(backend).forward(q, k, v, routes, scale, bias, skip)
    return _module(backend).forward(q, k, v, routes, scale, bias)


@_op.register_fake
def _(
    q: T, k: T, v: T, index: T, count: T, sizes: Any, bias: Any, block: int, scale: float, backend: str,
    skip: float = 0.0,
) -> Any:  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("vivace::block_attention_backward", mutates_args=())
def _backward_op(
    q: T, k: T, v: T, index: T, count: T, sizes: T | None, bias: T | None, block: int, scale: float, backend: str,
    out: T, lse: T, grad_out: T, grad_lse: T,
) -> tuple[T, T, T]:  # fmt: skip
    routes = Routes(index, count, sizes, block)
    # The reference is for reading; its gradients are those of the gathered kernel.
    module = _module("gather" if backend == "reference" else backend)
    return module.backward(q, k, v, routes, scale, bias, out, lse, grad_out, grad_lse)


@_backward_op.register_fake
def _(q: T, k: T, v: T, *rest: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[T, T]) -> None:
    q, k, v, index, count, sizes, bias, ctx.block, ctx.scale, ctx.backend, _ = inputs
    ctx.save_for_backward(q, k, v, index, count, sizes, bias, *output)


def _gradients(ctx: Any, grad_out: T, grad_lse: T) -> tuple[Any, ...]:
    *given, out, lse = ctx.saved_tensors
    grads = _backward_op(*given, ctx.block, ctx.scale, ctx.backend, out, lse, grad_out, grad_lse)
    return (*grads, *[None] * 8)


_op.register_autograd(_gradients, setup_context=_keep)


def _module(backend: str) -> Any:
    return reference if backend == "reference" else importlib.import_module(f"{__package__}.{backend}")


def block_attention(
    q: T,
    k: T,
    v: T,
    routes: Routes,
    scale: float | None = None,
    bias: T | None = None,
    backend: str = "gather",
    skip: float = 0.0,
) -> tuple[T, T]:
    """Attention over lists of key blocks (`vivace.kernels.block_attention.spec`).

    Args:
        backend: `hopper`, `triton`, `gather` or `reference`; `vivace.kernels.api.select` says which can run.
        skip: where positive, the kernel `triton` leaves out the product with a tile's values when all its scores lie so
            far below their rows' largest so far (natural logarithm); the others compute it.

    Raises:
        ValueError: the tensors do not fit each other, or the scale is not positive.
    """
    check_inputs(q, k, v, routes, bias)
    if scale is not None and not scale > 0.0:
        raise ValueError(f"the scale of scores must be positive, not {scale}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _op(q, k, v, routes.index, routes.count, routes.sizes, bias, routes.block, scale, backend, skip)


def runner(backend: str) -> Callable[..., tuple[T, T]]:
    """`block_attention` on one backend."""

    def run(
        q: T,
        k: T,
        v: T,
        routes: Routes,
        scale: float | None = None,
        bias: T | None = None,
        skip: float = 0.0,
    ) -> tuple[T, T]:
        return block_attention(q, k, v, routes, scale, bias, backend, skip)

    return run

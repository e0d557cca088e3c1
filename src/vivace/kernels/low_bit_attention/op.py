"""`vivace::low_bit_attention` as a custom operation of torch; see `spec`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from vivace.kernels.block_attention.spec import Routes
from vivace.kernels.low_bit_attention.spec import BLOCK, GROUP, check_inputs

T = torch.Tensor


@torch.library.custom_op("vivace::low_bit_attention", mutates_args=())
def _op(
    q: T, k: T, v: T, index: T | None, count: T | None, sizes: T | None, bias: T | None, block: int, scale: float,
    qk: str, pv: str, group: int, backend: str,
) -> tuple[T, T]:  # fmt: skip
    routes = None if index is None or count is None else Routes(index, count, sizes, block)
    module = importlib.import_module(f"{__package__}.{backend}")
    return module.forward(q, k, v, routes, scale, bias, qk, pv, block, group)


@_op.register_fake
def _(q: T, *rest: Any) -> Any:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def low_bit_attention(
    q: T,
    k: T,
    v: T,
    routes: Routes | None = None,
    scale: float | None = None,
    bias: T | None = None,
    qk: str = "int8",
    pv: str = "fp8",
    block: int = BLOCK,
    group: int | None = None,
    backend: str = "reference",
) -> tuple[T, T]:
    """Attention with 8-bit products (`vivace.kernels.low_bit_attention.spec`).

    Args:
        block: slots of a block where `routes` is None.
        group: queries that share a scale, 0 for a whole block; by default 32, or the block where that is smaller.
        backend: `hopper`, `triton` or `reference`; `spec.choose` says which can run.

    Raises:
        ValueError: the tensors do not fit each other.
        RuntimeError: gradients are asked for.
    """
    block = block if routes is None else routes.block
    group = min(GROUP, block) if group is None else group or block
    check_inputs(q, k, v, routes, bias, qk, pv, block, group)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lists = (None, None, None) if routes is None else (routes.index, routes.count, routes.sizes)
    return _op(q, k, v, *lists, bias, block, scale, qk, pv, group, backend)


def runner(backend: str) -> Callable[..., tuple[T, T]]:
    """`low_bit_attention` on one backend; called as `block_attention`'s runner is."""

    def run(
        q: T, k: T, v: T, routes: Routes | None = None, scale: float | None = None, bias: T | None = None,
        **modes: Any,
    ) -> tuple[T, T]:  # fmt: skip
        return low_bit_attention(q, k, v, routes, scale, bias, backend=backend, **modes)

    return run

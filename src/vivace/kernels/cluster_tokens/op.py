"""`vivace::cluster_tokens` and `vivace::permute_tokens` as custom operations of torch; see `spec`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from vivace.kernels.cluster_tokens.spec import Clustering, check_inputs, check_order

T = torch.Tensor


@torch.library.custom_op("vivace::cluster_tokens", mutates_args=())
def _cluster(x: T, centres: T, iterations: int, gone: T, backend: str) -> tuple[T, T, T]:
    return _module(backend).cluster(x, centres, iterations, gone)


@_cluster.register_fake
def _(x: T, centres: T, iterations: int, gone: T, backend: str) -> tuple[T, T, T]:
    whole = x.new_empty(x.shape[:3], dtype=torch.int32)
    return whole, torch.empty_like(whole), centres.new_empty(centres.shape, dtype=torch.float32)


@torch.library.custom_op("vivace::permute_tokens", mutates_args=())
def _permute(x: T, order: T, back: bool, backend: str) -> T:
    return _module(backend).permute(x, order, back)


@_permute.register_fake
def _(x: T, order: T, back: bool, backend: str) -> T:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: T) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.back, ctx.backend = inputs[2:]


def _undo(ctx: Any, grad: T) -> tuple[T, None, None, None]:
    """The gradient of a permutation is its inverse."""
    return _permute(grad, ctx.saved_tensors[0], not ctx.back, ctx.backend), None, None, None


_permute.register_autograd(_undo, setup_context=_keep)


def _module(backend: str) -> Any:
    return importlib.import_module(f"{__package__}.{backend}")


def cluster(x: T, centres: T, iterations: int, gone: T, backend: str = "reference") -> tuple[T, T, T]:
    """Lloyd's iterations (`vivace.kernels.cluster_tokens.spec`).

    Raises:
        ValueError: no iterations, or tensors that do not fit each other.
    """
    check_inputs(x, centres, iterations, gone)
    return _cluster(x, centres, iterations, gone, backend)


def permute(x: T, order: T, back: bool = False, backend: str = "reference") -> T:
    """Rows of x in an order, or back from it (`take` and `put` of `vivace.kernels.cluster_tokens.spec`).

    Raises:
        ValueError: the order does not fit x.
    """
    check_order(x, order)
    return _permute(x, order, back, backend)


def runner(backend: str) -> Callable[..., Clustering]:
    """All three on one backend."""
    take, put = (functools.partial(permute, back=back, backend=backend) for back in (False, True))
    made = Clustering(functools.partial(cluster, backend=backend), take, put)
    return lambda: made

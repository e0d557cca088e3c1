"""`vivace::select_blocks` as a custom operation of torch; see `spec`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from vivace.kernels.block_attention.spec import Routes

T = torch.Tensor


@torch.library.custom_op("vivace::select_blocks", mutates_args=())
def _op(
    scores: T, top: int, mass: float, forced: T | None, text: int, softmax: bool, backend: str, also: T | None = None
) -> tuple[T, T]:  # fmt: skip
    return importlib.import_module(f"{__package__}.{backend}").select(
        scores, top, mass, forced, text, softmax, also
    )


@_op.register_fake
def _(
    scores: T, top: int, mass: float, forced: Any, text: int, softmax: bool, backend: str, also: Any = None
) -> Any:
    b, h, nq, nk = scores.shape
    return (
        scores.new_empty((b, h, nq + text, nk + text), dtype=torch.int32),
        scores.new_empty((b, h, nq + text), dtype=torch.int32),
    )


def select_blocks(
    scores: T,
    top: int = 0,
    mass: float = 0.0,
    forced: T | None = None,
    text: int = 0,
    softmax: bool = True,
    backend: str = "reference",
    also: T | None = None,
) -> tuple[T, T]:
    """Lists of key blocks from scores (`vivace.kernels.block_select.spec`).

    Raises:
        ValueError: neither `top` nor `mass` nor `forced` takes anything, or a mask has another shape than the scores.
    """
    if scores.dtype == torch.bool:
        if top > 0 or mass > 0.0:
            raise ValueError("a bool selection is made already: top and mass have nothing to choose from.")
    elif top < 1 and mass <= 0.0 and forced is None:
        raise ValueError(
            "a selection needs top >= 1, mass > 0 or forced blocks; otherwise rows may stay empty."
        )
    if forced is not None and tuple(forced.shape) != tuple(scores.shape[2:]):
        raise ValueError(f"forced must be {tuple(scores.shape[2:])}, not {tuple(forced.shape)}.")
    b, h, nq, nk = scores.shape
    if also is not None and tuple(also.shape) not in [(x, y, nq, nk) for x in (1, b) for y in (1, h)]:
        raise ValueError(f"also must be (1 or {b}, 1 or {h}, {nq}, {nk}), not {tuple(also.shape)}.")
    return _op(scores, top, mass, forced, text, softmax, backend, also)


def visited_pairs(
    routes: Routes, query_sizes: T, batch: int, heads: int, backend: str = "reference"
) -> float | T:
    """`Routes.pairs`; by the Triton kernel in one pass over what is listed, as a tensor that nobody has waited for."""
    if backend == "reference":
        return routes.pairs(query_sizes, batch, heads)
    module = importlib.import_module(f"{__package__}.{backend}")
    keys = module.visited(routes.index, routes.count, routes.sizes, routes.block)
    b, h = keys.shape[:2]
    return (keys.double() * query_sizes).sum() * (batch / b) * (heads / h)


def runner(backend: str) -> Callable[..., tuple[T, T]]:
    """`select_blocks` on one backend."""

    def run(
        scores: T,
        top: int = 0,
        mass: float = 0.0,
        forced: T | None = None,
        text: int = 0,
        softmax: bool = True,
        also: T | None = None,
    ) -> tuple[T, T]:
        return select_blocks(scores, top, mass, forced, text, softmax, backend, also)

    return run

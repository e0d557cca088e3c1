"""`vivace::select_blocks` as a custom operation of torch; see `spec`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

T = torch.Tensor


@torch.library.custom_op("vivace::select_blocks", mutates_args=())
def _op(
    scores: T, top: int, mass: float, forced: T | None, text: int, softmax: bool, backend: str
) -> tuple[T, T]:
    return importlib.import_module(f"{__package__}.{backend}").select(
        scores, top, mass, forced, text, softmax
    )


@_op.register_fake
def _(scores: T, top: int, mass: float, forced: Any, text: int, softmax: bool, backend: str) -> Any:
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
) -> tuple[T, T]:
    """Lists of key blocks from scores (`vivace.kernels.block_select.spec`).

    Raises:
        ValueError: neither `top` nor `mass` nor `forced` takes anything, or `forced` has another shape.
    """
    if top < 1 and mass <= 0.0 and forced is None:
        raise ValueError(
            "a selection needs top >= 1, mass > 0 or forced blocks; otherwise rows may stay empty."
        )
    if forced is not None and tuple(forced.shape) != tuple(scores.shape[2:]):
        raise ValueError(f"forced must be {tuple(scores.shape[2:])}, not {tuple(forced.shape)}.")
    return _op(scores, top, mass, forced, text, softmax, backend)


def runner(backend: str) -> Callable[..., tuple[T, T]]:
    """`select_blocks` on one backend."""

    def run(
        scores: T,
        top: int = 0,
        mass: float = 0.0,
        forced: T | None = None,
        text: int = 0,
        softmax: bool = True,
    ) -> tuple[T, T]:
        return select_blocks(scores, top, mass, forced, text, softmax, backend)

    return run

"""`vivace::arrange_blocks` and `vivace::restore_blocks` as custom operations of torch; see `spec`."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from vivace.kernels.arrange_blocks.spec import Mover, Places

T = torch.Tensor


def _module(backend: str) -> Any:
    return importlib.import_module(f"{__package__}.{backend}")


@torch.library.custom_op("vivace::arrange_blocks", mutates_args=())
def _arrange(
    x: T, slots: T, back: T, counts: T, copy: bool, pool: bool, alike: bool, backend: str
) -> tuple[T, T, T]:
    return _module(backend).arrange(x, slots, back, counts, copy, pool, alike)


@_arrange.register_fake
def _(x: T, slots: T, back: T, counts: T, copy: bool, pool: bool, alike: bool, backend: str) -> Any:
    b, _, h, d = x.shape
    n, c = slots.shape
    return (
        x.new_empty((b, h, n * c, d) if copy else (0,)),
        x.new_empty((b, h, n, d) if pool else (0,), dtype=torch.float32),
        x.new_empty((b, h, n) if alike else (0,), dtype=torch.float32),
    )


@torch.library.custom_op("vivace::restore_blocks", mutates_args=())
def _restore(
    blocks: T | None, mean: T | None, slots: T, back: T, counts: T, dtype: torch.dtype, backend: str
) -> T:
    return _module(backend).restore(blocks, mean, slots, back, counts, dtype)


@_restore.register_fake
def _(blocks: Any, mean: Any, slots: T, back: T, counts: T, dtype: torch.dtype, backend: str) -> Any:
    b, h, _, d = (mean if blocks is None else blocks).shape
    return slots.new_empty((b, back.shape[0], h, d), dtype=dtype)


def _keep_arrange(ctx: Any, inputs: tuple[Any, ...], output: tuple[T, T, T]) -> None:
    x, slots, back, counts, ctx.copy, ctx.pool, _, ctx.backend = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(slots, back, counts)
    ctx.set_materialize_grads(False)


def _back_arrange(ctx: Any, blocks: T | None, mean: T | None, alike: T | None) -> tuple[Any, ...]:
    blocks, mean = blocks if ctx.copy else None, mean if ctx.pool else None
    given = None
    if blocks is not None or mean is not None:
        given = _restore(blocks, mean, *ctx.saved_tensors, ctx.dtype, ctx.backend)
    return given, *[None] * 7


def _keep_restore(ctx: Any, inputs: tuple[Any, ...], output: T) -> None:
    blocks, mean, slots, back, counts, _, ctx.backend = inputs
    ctx.copy, ctx.pool = blocks is not None, mean is not None
    ctx.kinds = [None if x is None else x.dtype for x in (blocks, mean)]
    ctx.save_for_backward(slots, back, counts)


def _back_restore(ctx: Any, given: T) -> tuple[Any, ...]:
    blocks, mean, _ = _arrange(given, *ctx.saved_tensors, ctx.copy, ctx.pool, False, ctx.backend)
    first, second = ctx.kinds
    return (blocks.to(first) if ctx.copy else None, mean.to(second) if ctx.pool else None, *[None] * 5)


_arrange.register_autograd(_back_arrange, setup_context=_keep_arrange)
_restore.register_autograd(_back_restore, setup_context=_keep_restore)


def arrange_blocks(
    x: T,
    places: Places,
    copy: bool = True,
    pool: bool = False,
    alike: bool = False,
    backend: str = "reference",
) -> tuple[T, T, T]:
    """Blocks, means and likeness of tokens (`vivace.kernels.arrange_blocks.spec`).

    Raises:
        ValueError: x has another number of tokens than there are places.
    """
    _check(x.ndim == 4 and x.shape[1] == len(places.back), f"x {tuple(x.shape)}", places)
    out, mean, cosine = _arrange(x, places.slots, places.back, places.counts, copy, pool, alike, backend)
    return out, mean, cosine.detach()


def restore_blocks(
    blocks: T | None,
    mean: T | None,
    places: Places,
    dtype: torch.dtype | None = None,
    backend: str = "reference",
) -> T:
    """The transpose of `arrange_blocks`; `dtype` of the result is that of the first one given when left out.

    Raises:
        ValueError: nothing is given, or it has another number of slots or blocks than there are places.
    """
    given = blocks if blocks is not None else mean
    if given is None:
        raise ValueError("restore_blocks needs blocks, means or both.")
    n, c = places.slots.shape
    _check(blocks is None or blocks.shape[2] == n * c, f"blocks {tuple(given.shape)}", places)
    _check(mean is None or mean.shape[2] == n, f"means of {tuple(given.shape)}", places)
    return _restore(blocks, mean, places.slots, places.back, places.counts, dtype or given.dtype, backend)


def _check(fits: bool, what: str, places: Places) -> None:
    if not fits:
        n, c = places.slots.shape
        raise ValueError(f"{what} does not fit {len(places.back)} tokens in {n} blocks of {c} slots.")


def mover(backend: str) -> Mover:
    """Both operations on one backend."""

    def arrange(
        x: T, places: Places, copy: bool = True, pool: bool = False, alike: bool = False
    ) -> tuple[T, T, T]:
        return arrange_blocks(x, places, copy, pool, alike, backend)

    def restore(blocks: T | None, mean: T | None, places: Places, dtype: torch.dtype | None = None) -> T:
        return restore_blocks(blocks, mean, places, dtype, backend)

    return Mover(arrange, restore, backend != "reference")

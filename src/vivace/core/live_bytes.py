"""Bytes of live tensors, counted exactly and on any device: what each operation makes, until its storage is freed.

    with LiveBytes() as live:
        model(x)
    live.peak

What existed before the block is not counted, and neither is scratch memory that a kernel takes and gives back inside
one operation. On the meta device nothing is computed and nothing is allocated, so the peak of a model that would not
fit is known in seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered. `peak` is the most that was alive at once, `now` what still is."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        # By address of the storage: its size, 0 for one that was there before.
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def reset(self) -> None:
        """Forget the peak so far: it starts again from what is alive now."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._see(tensor, new=False)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._see(tensor, new=True)
        return out

    def _see(self, tensor: torch.Tensor, *, new: bool) -> None:
        try:
            storage = tensor.untyped_storage()
        except RuntimeError:
            return  # no storage: a quantised tensor is made of others, which are seen themselves
        key = storage._cdata
        size = storage.nbytes() if new else 0
        if key in self._known:
            return

        def freed(_: Any, key: int = key, size: int = size) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = (weakref.ref(storage, freed), size)
        self.now += size
        self.peak = max(self.peak, self.now)


class FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel takes memory for it: the output and one float for each query, no score matrix.

    Entered around a call on the meta device, where torch would otherwise take the unfused formula. The output lies as
    the fused kernels write it, heads beside each other for every token.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value")
            query, _, value = (kwargs[n] if n in kwargs else args[i] for i, n in enumerate(names))
            if query.is_meta:
                batch, heads, tokens, _ = query.shape
                sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
                out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
                del sums
                return out
        return func(*args, **kwargs)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]

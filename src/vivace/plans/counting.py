"""Installing the counters on a live transformer, through the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from vivace.core.counters import Meter, linear_flops
from vivace.core.surgery import Surgery
from vivace.models.adapter import AttentionSite, Block, Expert


def install(
    edit: Surgery, meter: Meter, experts: Iterable[Expert], compile_backend: str | None = None
) -> None:
    """Count matrix products, attention and blocks of every expert; compile block bodies inside when asked.

    Compiled bodies lie below the block counters. The first call of each shape runs eagerly with all counters on,
    which is what a later compiled call of that shape is accounted with.
    """
    with edit.by("counters"):
        for expert in experts:
            for module in expert.module.modules():
                _count_products(edit, meter, module)
            for site in expert.attentions:
                _count_attention(edit, meter, site)
    for expert in experts:
        for block in expert.blocks:
            if compile_backend is not None:
                with edit.by("compile"):
                    _compile(edit, meter, block, compile_backend)
            with edit.by("counters"):
                _count_block(edit, meter, block)


def _count_products(edit: Surgery, meter: Meter, module: Any) -> None:
    from torch import nn

    if isinstance(module, nn.Linear) or getattr(module, "counts_as_linear", False):

        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
                if meter.active:
                    rows = x.numel() // module.in_features
                    tokens = x.shape[1] if x.ndim == 3 else 0
                    meter.product(linear_flops(rows, module.in_features, module.out_features), tokens)
                return old(x, *args, **kwargs)

            return forward

        edit.wrap(module, make)
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):

        def make_conv(old: Callable[..., Any]) -> Callable[..., Any]:
            def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
                out = old(x, *args, **kwargs)
                if meter.active:
                    taps = module.weight.numel() // module.out_channels
                    meter.product(2.0 * out.numel() * taps)
                return out

            return forward

        edit.wrap(module, make_conv)


def _count_attention(edit: Surgery, meter: Meter, site: AttentionSite) -> None:
    def make(old: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            out = old(*args, **kwargs)
            if meter.active:
                rows, queries, keys = site.lengths(args, kwargs)
                dense = float(rows) * site.heads * queries * keys
                kernel = getattr(site.module.processor, "kernel", None)
                pairs = getattr(kernel, "pairs", None)
                visited = dense if pairs is None else pairs(rows, site.heads, queries, keys)
                again = None
                if pairs is not None and getattr(kernel, "varies", False):
                    again = partial(_pairs, pairs, site.heads, queries, keys)
                # Keys of cross-attention are text, which nobody shortens.
                dense *= meter.stretch(queries) * (meter.stretch(keys) if site.kind != "cross" else 1.0)
                meter.attention(visited, dense, site.head_dim, again)
            return out

        return forward

    edit.wrap(site.module, make)


def _pairs(pairs: Callable[..., float], heads: int, queries: int, keys: int, rows: int) -> float:
    return pairs(rows, heads, queries, keys)


def _count_block(edit: Surgery, meter: Meter, block: Block) -> None:
    def make(old: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = kwargs[block.layout.hidden] if block.layout.hidden in kwargs else args[0]
            return meter.block(block.site, hidden.shape[0], lambda: old(*args, **kwargs))

        return forward

    edit.wrap(block.module, make)


def _compile(edit: Surgery, meter: Meter, block: Block, backend: str) -> None:
    def make(old: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        compiled = torch.compile(old, backend=backend, fullgraph=True, dynamic=False)
        meter.compiled.add(block.site)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if meter.clock.evaluation is None or not meter.knows(block.site):
                return old(*args, **kwargs)
            was, meter.active = meter.active, False
            try:
                return compiled(*args, **kwargs)
            finally:
                meter.active = was

        return forward

    edit.wrap(block.module, make)

"""A call of dynamic attention as the engine hands it to a method, on the plain kernels."""

from __future__ import annotations

from vivace.kernels.block_attention.op import block_attention
from vivace.kernels.block_select.op import select_blocks
from vivace.techniques.attention.dynamic import View


def view_of(technique, grid, q, k, v, mask=None) -> View:
    """q, k, v (B, S, H, D) of a grid's tokens; `mask` one of keys."""
    layout = technique.layout(grid)
    return View(
        *(layout.arrange(x) for x in (q, k, v)),
        layout=layout,
        scale=q.shape[-1] ** -0.5,
        memory={},
        select=select_blocks,
        attend=block_attention,
        bias=layout.key_bias(mask, len(q)),
    )

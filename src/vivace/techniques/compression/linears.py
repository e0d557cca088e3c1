"""Which linears of the blocks a technique of weights takes: by block and by role."""

from __future__ import annotations

import functools

from vivace.kernels.quant_linear.spec import Recipe
from vivace.models.adapter import ModelDescription


def blocks_between(model: ModelDescription, skip: int) -> frozenset[str]:
    """Addresses of the blocks but `skip` at the front and at the back of every expert."""
    return frozenset(
        block
        for expert in model.experts
        for i, block in enumerate(expert.block_sites)
        if skip <= i < expert.depth - skip
    )


def takes_role(roles: str, role: str) -> bool:
    """Whether `roles` (all, ffn, attention) holds a linear's role; linears that no adapter names never."""
    feed_forward = role.removeprefix("text.").startswith("ffn.")
    if role == "other" or (roles == "ffn" and not feed_forward):
        return False
    return roles != "attention" or not feed_forward


@functools.cache
def layer_bytes(recipe: Recipe, inputs: int, outputs: int, smoothed: bool = False) -> int:
    """Bytes of a quantised layer without its bias: codes, scales, the branch, and the smoothing vector."""
    from vivace.kernels.quant_linear.layer import QuantLinear

    layer = QuantLinear(inputs, outputs, recipe, smoothed=smoothed, device="meta")
    return sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))

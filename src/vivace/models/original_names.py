"""Layer names of Wan's own code in diffusers' naming: LoRA files of other trainers come with the former."""

from __future__ import annotations

import re
from collections.abc import Mapping

_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
}
_NORMS = {"norm_q": "norm_q", "norm_k": "norm_k", "norm_k_img": "norm_added_k"}
_IN_BLOCK: Mapping[str, str] = {
    **{
        f"{own}.{a}": f"{theirs}.{b}"
        for own, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for a, b in (_ATTENTION | _NORMS).items()
    },
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    # The norm before cross-attention; the two others have no weights.
    "norm3": "norm2",
}
_OUTSIDE: Mapping[str, str] = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}


def diffusers_layer(name: str) -> str | None:
    """A layer's path in diffusers' transformer from its path in Wan's code; None for a path of another kind."""
    if (found := re.fullmatch(r"blocks\.(\d+)\.(.+)", name)) is None:
        return _OUTSIDE.get(name)
    inside = _IN_BLOCK.get(found[2])
    return None if inside is None else f"blocks.{found[1]}.{inside}"

"""LTX-Video (arXiv 2501.00103): self-attention over packed video tokens, cross-attention to text, fused guidance.

The pipeline packs the latent to (B, S, C) before the transformer and says its frames, height and width beside it.
Image-to-video gives every token its own timestep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from vivace.core.context import COND
from vivace.core.shapes import TokenGrid, Workload
from vivace.models.adapter import Adapter, AttentionSite, BlockLayout, Guidance, ModelDescription
from vivace.models.attention_parts import per_head, rotate_pairs


class LTXAdapter(Adapter):
    """See the module."""

    family = "ltx"
    transformer_classes = ("LTXVideoTransformer3DModel",)
    guidance = Guidance.FUSED
    multiple = 32
    layouts: ClassVar[Mapping[str, BlockLayout]] = {
        "transformer_blocks": BlockLayout(
            batched=(
                "hidden_states",
                "encoder_hidden_states",
                "temb",
                "image_rotary_emb",
                "encoder_attention_mask",
            )
        )
    }
    depth_keys: ClassVar[Mapping[str, str]] = {"transformer_blocks": "num_layers"}
    attention: ClassVar[Mapping[str, str]] = {"attn1": "self", "attn2": "cross"}
    feed_forward: ClassVar[Mapping[str, str]] = {"ff": "ffn"}
    roles: ClassVar[Mapping[str, str]] = {
        "attn1.to_q": "attention.q",
        "attn1.to_k": "attention.k",
        "attn1.to_v": "attention.v",
        "attn1.to_out.0": "attention.out",
        "attn2.to_q": "cross.q",
        "attn2.to_k": "cross.k",
        "attn2.to_v": "cross.v",
        "attn2.to_out.0": "cross.out",
        "ff.net.0.proj": "ffn.in",
        "ff.net.2": "ffn.out",
    }
    usual: ClassVar[Mapping[str, Any]] = {
        "num_frames": 161,
        "height": 512,
        "width": 704,
        "guidance_scale": 3.0,
        "max_sequence_length": 128,
    }

    def compression(self, vae: Mapping[str, Any]) -> tuple[int, int]:
        halvings = sum(vae.get("spatio_temporal_scaling", (True, True, True, False)))
        temporal = vae.get("temporal_compression_ratio") or vae.get("patch_size_t", 1) * 2**halvings
        spatial = vae.get("spatial_compression_ratio") or vae.get("patch_size", 4) * 2**halvings
        return temporal, spatial

    def grid_of_call(self, config: Mapping[str, Any], call: Mapping[str, Any]) -> TokenGrid:
        if call.get("num_frames") is None:
            # Conditioned on frames at given places, the extra tokens are no part of a grid.
            return TokenGrid(1, 1, call["hidden_states"].shape[1])
        return TokenGrid(call["num_frames"], call["height"], call["width"])

    def dummy_call(
        self, model: ModelDescription, workload: Workload, device: Any, dtype: Any, branch: str = COND
    ) -> dict[str, Any]:
        config, rows = model.experts[0].config, workload.batch
        new = functools.partial(torch.zeros, device=device, dtype=dtype)
        grid = self.grid(model, workload)
        temporal, spatial = self.compression(model.defaults.get("vae", {}))
        times = (rows, grid.video) if "ImageToVideo" in model.pipeline_class else (rows,)
        return {
            "hidden_states": new(rows, grid.video, config["in_channels"]),
            "encoder_hidden_states": new(rows, workload.text, config["caption_channels"]),
            "timestep": torch.full(times, 500.0, device=device),
            "encoder_attention_mask": torch.ones(rows, workload.text, device=device, dtype=torch.bool),
            "num_frames": grid.frames,
            "height": grid.height,
            "width": grid.width,
            "rope_interpolation_scale": (temporal / 25, spatial, spatial),
        }

    def processor(self, site: AttentionSite, kernel: Callable[..., Any]) -> Any:
        return LTXKernelProcessor(kernel)


class LTXKernelProcessor:
    """LTX-Video's attention around any kernel: norms and rotation run across all heads at once."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, kernel: Callable[..., torch.Tensor]) -> None:
        self.kernel = kernel

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = per_head(attn, attention_mask, context)
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(context)), attn.to_v(context)
        if image_rotary_emb is not None:
            q, k = rotate_pairs(q, *image_rotary_emb), rotate_pairs(k, *image_rotary_emb)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        out = self.kernel(q, k, v, mask).flatten(2, 3).to(q.dtype)
        return attn.to_out[1](attn.to_out[0](out))

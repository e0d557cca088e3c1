"""Wan 2.1 and 2.2 (arXiv 2503.20314): self-attention over video tokens, cross-attention to text, separate guidance.

Wan 2.2 A14B has two experts, `transformer` for high noise and `transformer_2` for low noise; Wan 2.2 TI2V-5B gives
every token its own timestep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch

from vivace.core.context import COND
from vivace.core.shapes import Workload
from vivace.models.adapter import Adapter, AttentionSite, Block, BlockLayout, Guidance, ModelDescription

IMAGE_TEXT_LENGTH = 512
"""Text length that diffusers assumes behind the image tokens of image-to-video models."""
IMAGE_TOKENS = 257
"""Tokens of the CLIP image encoder of Wan 2.1 image-to-video: 16 x 16 patches and the class."""


class WanAdapter(Adapter):
    """See the module."""

    family = "wan"
    transformer_classes = ("WanTransformer3DModel",)
    guidance = Guidance.SEPARATE
    decode_chunk = 1
    fuses_blocks = True
    layouts: ClassVar[Mapping[str, BlockLayout]] = {
        "blocks": BlockLayout(batched=("hidden_states", "encoder_hidden_states", "temb"), rotary="rotary_emb")
    }
    attention: ClassVar[Mapping[str, str]] = {"attn1": "self", "attn2": "cross"}
    rotary = "rotary_emb"
    feed_forward: ClassVar[Mapping[str, str]] = {"ffn": "ffn"}
    roles: ClassVar[Mapping[str, str]] = {
        "attn1.to_q": "attention.q",
        "attn1.to_k": "attention.k",
        "attn1.to_v": "attention.v",
        "attn1.to_out.0": "attention.out",
        "attn2.to_q": "cross.q",
        "attn2.to_k": "cross.k",
        "attn2.to_v": "cross.v",
        "attn2.to_out.0": "cross.out",
        "attn2.add_k_proj": "cross.k",
        "attn2.add_v_proj": "cross.v",
        "ffn.net.0.proj": "ffn.in",
        "ffn.net.2": "ffn.out",
    }

    def compression(self, vae: Mapping[str, Any]) -> tuple[int, int]:
        return vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)

    def patch(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return tuple(config["patch_size"])  # type: ignore[return-value]

    def dummy_call(
        self, model: ModelDescription, workload: Workload, device: Any, dtype: Any, branch: str = COND
    ) -> dict[str, Any]:
        config, rows = model.experts[0].config, workload.batch
        new = functools.partial(torch.zeros, device=device, dtype=dtype)
        times = (
            (rows, self.grid(model, workload).video) if model.settings.get("expand_timesteps") else (rows,)
        )
        call = {
            "hidden_states": new(rows, config["in_channels"], *self.latent(model, workload)),
            "timestep": torch.full(times, 500.0, device=device),
            "encoder_hidden_states": new(rows, workload.text, config["text_dim"]),
        }
        if config.get("image_dim"):
            call["encoder_hidden_states_image"] = new(rows, IMAGE_TOKENS, config["image_dim"])
        return call

    def fused_block(self, block: Block) -> Callable[..., torch.Tensor] | str | None:
        from vivace.models.wan_fused import fused_forward

        return fused_forward(block.module)

    def whole_clip_decoder(self, vae: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
        if (vae if isinstance(vae, str) else type(vae).__name__) != "AutoencoderKLWan":
            return None
        from vivace.tiny.whole_clip import decode_latents

        return lambda latents: decode_latents(cast(Any, vae), latents)

    def processor(self, site: AttentionSite, kernel: Callable[..., Any]) -> Any:
        return WanKernelProcessor(kernel)


class WanKernelProcessor:
    """Wan's attention around any kernel: projections, RMS norms across heads, rotary embedding, output."""

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
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        image = None
        if getattr(attn, "add_k_proj", None) is not None and encoder_hidden_states is not None:
            split = encoder_hidden_states.shape[1] - IMAGE_TEXT_LENGTH
            image, encoder_hidden_states = encoder_hidden_states[:, :split], encoder_hidden_states[:, split:]
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if getattr(attn, "fused_projections", False):
            if attn.is_cross_attention:
                q, (k, v) = attn.to_q(hidden_states), attn.to_kv(context).chunk(2, dim=-1)
            else:
                q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        heads = (attn.heads, -1)
        q, k = attn.norm_q(q).unflatten(2, heads), attn.norm_k(k).unflatten(2, heads)
        v = v.unflatten(2, heads)
        if rotary_emb is not None:
            q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        out = self.kernel(q, k, v, attention_mask).flatten(2, 3).type_as(q)
        if image is not None:
            ki = attn.norm_added_k(attn.add_k_proj(image)).unflatten(2, heads)
            vi = attn.add_v_proj(image).unflatten(2, heads)
            out = out + self.kernel(q, ki, vi, None).flatten(2, 3).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of interleaved pairs. x (B, S, H, D); cos, sin (1, S, 1, D) with each value twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2).type_as(x)

"""CogVideoX 1.0 and 1.5 (arXiv 2408.06072): one joint attention over [text, video], guidance pair in one batch.

Version 1.5 makes tokens of two latent frames each (`patch_size_t`) and pads the latent to a multiple of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from vivace.core.context import COND
from vivace.core.shapes import TokenGrid, Workload
from vivace.models.adapter import Adapter, AttentionSite, BlockLayout, Guidance, ModelDescription
from vivace.models.attention_parts import by_token, per_head, rotate_pairs


class CogVideoXAdapter(Adapter):
    """See the module."""

    family = "cogvideox"
    transformer_classes = ("CogVideoXTransformer3DModel",)
    guidance = Guidance.FUSED
    decode_chunk = 2
    joint_text = "first"
    layouts: ClassVar[Mapping[str, BlockLayout]] = {
        "transformer_blocks": BlockLayout(
            text="encoder_hidden_states", batched=("hidden_states", "encoder_hidden_states", "temb")
        )
    }
    depth_keys: ClassVar[Mapping[str, str]] = {"transformer_blocks": "num_layers"}
    attention: ClassVar[Mapping[str, str]] = {"attn1": "joint"}
    feed_forward: ClassVar[Mapping[str, str]] = {"ff": "ffn"}
    roles: ClassVar[Mapping[str, str]] = {
        "attn1.to_q": "attention.q",
        "attn1.to_k": "attention.k",
        "attn1.to_v": "attention.v",
        "attn1.to_out.0": "attention.out",
        "ff.net.0.proj": "ffn.in",
        "ff.net.2": "ffn.out",
    }
    usual: ClassVar[Mapping[str, Any]] = {
        "num_frames": 49,
        "height": 480,
        "width": 720,
        "guidance_scale": 6.0,
        "max_sequence_length": 226,
    }

    def compression(self, vae: Mapping[str, Any]) -> tuple[int, int]:
        channels = vae.get("block_out_channels", (128, 256, 256, 512))
        return int(vae.get("temporal_compression_ratio", 4)), 2 ** (len(channels) - 1)

    def latent(self, model: ModelDescription, workload: Workload) -> tuple[int, int, int]:
        frames, height, width = super().latent(model, workload)
        per_token = self.patch(model.experts[0].config)[0]
        return -(-frames // per_token) * per_token, height, width

    def grid_of_call(self, config: Mapping[str, Any], call: Mapping[str, Any]) -> TokenGrid:
        frames, _, height, width = call["hidden_states"].shape[1:]
        return self._grid(config, (frames, height, width), call["encoder_hidden_states"].shape[1])

    def dummy_call(
        self, model: ModelDescription, workload: Workload, device: Any, dtype: Any, branch: str = COND
    ) -> dict[str, Any]:
        config, rows = model.experts[0].config, workload.batch
        new = functools.partial(torch.zeros, device=device, dtype=dtype)
        frames, height, width = self.latent(model, workload)
        call: dict[str, Any] = {
            "hidden_states": new(rows, frames, config["in_channels"], height, width),
            "timestep": torch.full((rows,), 500, device=device),
            "encoder_hidden_states": new(rows, workload.text, config["text_embed_dim"]),
        }
        if config.get("use_rotary_positional_embeddings"):
            shape = (self.grid(model, workload).video, config["attention_head_dim"])
            call["image_rotary_emb"] = (
                torch.ones(shape, device=device, dtype=torch.float32),
                torch.zeros(shape, device=device, dtype=torch.float32),
            )
        if config.get("ofs_embed_dim"):
            call["ofs"] = torch.full((1,), 2.0, device=device, dtype=dtype)
        return call

    def processor(self, site: AttentionSite, kernel: Callable[..., Any]) -> Any:
        return CogVideoXKernelProcessor(kernel)


class CogVideoXKernelProcessor:
    """CogVideoX's joint attention around any kernel; only video tokens are rotated."""

    def __init__(self, kernel: Callable[..., torch.Tensor]) -> None:
        self.kernel = kernel

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        mask = per_head(attn, attention_mask, x)
        if getattr(attn, "fused_projections", False):
            q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        q, k, v = (y.unflatten(2, (attn.heads, -1)) for y in (q, k, v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if image_rotary_emb is not None:
            cos, sin = (by_token(f).to(q.device) for f in image_rotary_emb)
            q, k = (torch.cat([y[:, :text], rotate_pairs(y[:, text:], cos, sin)], dim=1) for y in (q, k))
        out = attn.to_out[1](attn.to_out[0](self.kernel(q, k, v, mask).flatten(2, 3)))
        return out[:, text:], out[:, :text]

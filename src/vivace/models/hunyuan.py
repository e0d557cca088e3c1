"""HunyuanVideo (arXiv 2412.03603): dual-stream, then single-stream blocks; joint attention over [video, text].

Guidance is distilled into the model and given as an input; a pair of branches is evaluated only with true guidance
(`true_cfg_scale` above 1 and a negative prompt). Text is padded, and a mask over the keys hides the padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from vivace.core.context import COND
from vivace.core.shapes import Workload
from vivace.models.adapter import Adapter, AttentionSite, BlockLayout, Guidance, ModelDescription
from vivace.models.attention_parts import by_token, rotate_pairs

IMAGE_TOKENS = 576
"""Tokens of the picture in the multimodal text encoder of image-to-video: 24 x 24 patches."""
INTERLEAVE = {"token_replace": 4, "latent_concat": 2}
"""The pipeline keeps every so-many-th image token on the conditional branch, and every second on the other."""
CUT = 4
"""Tokens of the assistant's header that the image-to-video pipeline cuts out of the text."""

_BATCHED = ("hidden_states", "encoder_hidden_states", "temb", "attention_mask", "token_replace_emb")


class HunyuanVideoAdapter(Adapter):
    """See the module."""

    family = "hunyuan"
    transformer_classes = ("HunyuanVideoTransformer3DModel",)
    guidance = Guidance.SEPARATE
    guidance_argument = "true_cfg_scale"
    joint_text = "last"
    template_tokens = 95
    all_hidden_states = True
    layouts: ClassVar[Mapping[str, BlockLayout]] = {
        "transformer_blocks": BlockLayout(
            text="encoder_hidden_states", batched=_BATCHED, kind="dual", rotary="freqs_cis"
        ),
        "single_transformer_blocks": BlockLayout(
            text="encoder_hidden_states", batched=_BATCHED, kind="single"
        ),
    }
    depth_keys: ClassVar[Mapping[str, str]] = {
        "transformer_blocks": "num_layers",
        "single_transformer_blocks": "num_single_layers",
    }
    attention: ClassVar[Mapping[str, str]] = {"attn": "joint"}
    feed_forward: ClassVar[Mapping[str, str]] = {"ff": "ffn", "ff_context": "text.ffn"}
    roles: ClassVar[Mapping[str, str]] = {
        "attn.to_q": "attention.q",
        "attn.to_k": "attention.k",
        "attn.to_v": "attention.v",
        "attn.to_out.0": "attention.out",
        "attn.add_q_proj": "text.q",
        "attn.add_k_proj": "text.k",
        "attn.add_v_proj": "text.v",
        "attn.to_add_out": "text.out",
        "ff.net.0.proj": "ffn.in",
        "ff.net.2": "ffn.out",
        "ff_context.net.0.proj": "text.ffn.in",
        "ff_context.net.2": "text.ffn.out",
        # A single-stream block projects attention and feed-forward out together.
        "proj_mlp": "ffn.in",
        "proj_out": "ffn.out",
    }
    usual: ClassVar[Mapping[str, Any]] = {
        "num_frames": 129,
        "height": 720,
        "width": 1280,
        "true_cfg_scale": 1.0,
        "max_sequence_length": 256,
    }

    def text_tokens(self, model: ModelDescription, workload: Workload, branch: str = COND) -> int:
        kind = model.experts[0].config.get("image_condition_type")
        if kind is None:
            return workload.text
        interleave = INTERLEAVE[kind] if branch == COND else 2
        return IMAGE_TOKENS // interleave + workload.text - CUT

    def dummy_call(
        self, model: ModelDescription, workload: Workload, device: Any, dtype: Any, branch: str = COND
    ) -> dict[str, Any]:
        config, rows = model.experts[0].config, workload.batch
        new = functools.partial(torch.zeros, device=device, dtype=dtype)
        text = self.text_tokens(model, workload, branch)
        call = {
            "hidden_states": new(rows, config["in_channels"], *self.latent(model, workload)),
            "timestep": torch.full((rows,), 500.0, device=device),
            "encoder_hidden_states": new(rows, text, config["text_embed_dim"]),
            "encoder_attention_mask": torch.ones(rows, text, device=device, dtype=dtype),
            "pooled_projections": new(rows, config["pooled_projection_dim"]),
        }
        if config.get("guidance_embeds"):
            call["guidance"] = torch.full((rows,), 6000.0, device=device, dtype=dtype)
        return call

    def processor(self, site: AttentionSite, kernel: Callable[..., Any]) -> Any:
        return HunyuanKernelProcessor(kernel)


class HunyuanKernelProcessor:
    """HunyuanVideo's joint attention around any kernel, for both kinds of blocks; only video tokens are rotated.

    In a dual-stream block text has its own projections; a single-stream block shares them and leaves the output
    projection to the block.
    """

    _attention_backend = None
    _parallel_config = None

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
        video, dual = hidden_states.shape[1], attn.add_q_proj is not None
        x = hidden_states if dual else torch.cat([hidden_states, encoder_hidden_states], dim=1)
        q, k, v = _heads(attn, attn.to_q(x), attn.to_k(x), attn.to_v(x), attn.norm_q, attn.norm_k)
        if image_rotary_emb is not None:
            cos, sin = (by_token(f).to(q.device) for f in image_rotary_emb)
            q, k = (torch.cat([rotate_pairs(y[:, :video], cos, sin), y[:, video:]], dim=1) for y in (q, k))
        if dual:
            c = encoder_hidden_states
            text = attn.add_q_proj(c), attn.add_k_proj(c), attn.add_v_proj(c)
            joined = zip((q, k, v), _heads(attn, *text, attn.norm_added_q, attn.norm_added_k), strict=True)
            q, k, v = (torch.cat(pair, dim=1) for pair in joined)
        out = self.kernel(q, k, v, attention_mask).flatten(2, 3).to(q.dtype)
        hidden, text_out = out[:, :video], out[:, video:]
        if getattr(attn, "to_out", None) is not None:
            hidden = attn.to_out[1](attn.to_out[0](hidden))
        if getattr(attn, "to_add_out", None) is not None:
            text_out = attn.to_add_out(text_out)
        return hidden, text_out


def _heads(
    attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, norm_q: Any, norm_k: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split (B, S, H*D) into heads (B, S, H, D) and normalise queries and keys."""
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
    return (q if norm_q is None else norm_q(q)), (k if norm_k is None else norm_k(k)), v

"""Whole-clip encode and decode of diffusers' `AutoencoderKLWan`, equal to its chunked path.

The class runs a clip in chunks of one latent frame and carries a cache of past frames from chunk to chunk (Wan, arXiv:
2503.20314, section 4.1). A causal convolution with such a cache equals one causal convolution over the whole clip with
its zero padding applied once; what differs between the first chunk and the rest is the resampling in time:

* down: the first frame passes by, a strided convolution without padding reads the whole clip for the others;
* up: the first frame passes by, a causal convolution *that never sees it* doubles the others.

So the whole clip costs one pass over the modules (about five times fewer kernel launches for 29 frames), has static
shapes and can be compiled. The functions walk the modules and change nothing in them.

`conv="fused"` runs norm and activation of each layer as one compiled kernel: on a GPU these, not the convolutions, take
most of the time of a VAE of few channels. `conv="stack"` computes each causal 3-D convolution as one 2-D convolution
over three time-shifted copies stacked along the channels: the same sum in another order. On GPUs 2-D kernels for 16-64
channels are far better tuned than 3-D ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanAttentionBlock,
    WanCausalConv3d,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    WanResidualUpBlock,
    WanRMS_norm,
    WanUpBlock,
    patchify,
    unpatchify,
)
from torch import Tensor, nn

from vivace.core.errors import ShapeError

Conv = Literal["direct", "fused", "stack"]


def config_of(vae: AutoencoderKLWan) -> Any:
    """Its configuration, whose entries are attributes too: diffusers declares a plain dictionary."""
    return vae.config


def encode_moments(vae: AutoencoderKLWan, video: Tensor, conv: Conv = "direct") -> Tensor:
    """Mean and log-variance of the posterior, channels (2 z), of a whole clip.

    `video`: (B, 3, T, H, W) in [-1, 1] with T = 4 n + 1. Returns (B, 2 z, n + 1, H / s, W / s), unclamped.
    Raises `ShapeError` when T is not of that form: the chunked path would silently drop frames.
    """
    if (video.shape[2] - 1) % 4:
        raise ShapeError(f"a clip of {video.shape[2]} frames cannot be encoded; use 4 n + 1 frames, e.g. 29.")
    if (patch := config_of(vae).patch_size) is not None:
        video = patchify(video, patch)
    net = vae.encoder
    x = causal_conv(net.conv_in, video, conv)
    for block in net.down_blocks:
        x = _down(block, x, conv)
    x = _middle(net.mid_block, x, conv)
    x = causal_conv(net.conv_out, _activate(net.norm_out, x, conv), conv)
    return causal_conv(vae.quant_conv, x, conv)


def decode_latents(
    vae: AutoencoderKLWan, latents: Tensor, conv: Conv = "direct", clamp: bool = True
) -> Tensor:
    """The clip of a whole latent: (B, z, n + 1, h, w) -> (B, 3, 4 n + 1, s h, s w), in [-1, 1] when clamped."""
    net = vae.decoder
    x = causal_conv(vae.post_quant_conv, latents, conv)
    x = _middle(net.mid_block, causal_conv(net.conv_in, x, conv), conv)
    for block in net.up_blocks:
        x = _up(block, x, conv)
    x = causal_conv(net.conv_out, _activate(net.norm_out, x, conv), conv)
    if (patch := config_of(vae).patch_size) is not None:
        x = unpatchify(x, patch)
    return x.clamp(-1.0, 1.0) if clamp else x


def causal_conv(layer: WanCausalConv3d, x: Tensor, conv: Conv = "direct") -> Tensor:
    """A causal convolution over the whole clip (B, C, T, H, W), zero frames before the first."""
    frames = layer.kernel_size[0]
    if conv != "stack" or (frames == 1 and layer.kernel_size[1] == 1):
        return layer(x)
    _, _, time, _, _ = x.shape
    padded = F.pad(x, (0, 0, 0, 0, frames - 1, 0))
    stacked = torch.cat([padded[:, :, k : k + time] for k in range(frames)], dim=1)
    weight = layer.weight.transpose(1, 2).flatten(1, 2)
    return _per_frame(stacked, lambda y: F.conv2d(y, weight, layer.bias, padding=layer.kernel_size[1] // 2))


def _per_frame(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` over the frames as a batch of images; both reshapes are views for channels-last clips."""
    batch, _, time = x.shape[:3]
    y = function(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (batch, time)).transpose(1, 2)


def _activate(norm: WanRMS_norm, x: Tensor, conv: Conv) -> Tensor:
    return (
        _compiled_activation()(x, norm.gamma, norm.scale, norm.bias) if conv == "fused" else F.silu(norm(x))
    )


@functools.cache
def _compiled_activation() -> Callable[..., Tensor]:
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    return torch.compile(_norm_silu, dynamic=False)


def _norm_silu(x: Tensor, gamma: Tensor, scale: float, bias: Tensor | float) -> Tensor:
    """`F.silu(WanRMS_norm(x))` in fp32, returned in the type of `x`."""
    return F.silu(F.normalize(x.float(), dim=1) * scale * gamma + bias).to(x.dtype)


def _residual(block: WanResidualBlock, x: Tensor, conv: Conv) -> Tensor:
    skip = block.conv_shortcut
    shortcut = x if isinstance(skip, nn.Identity) else causal_conv(skip, x, conv)
    y = causal_conv(block.conv1, _activate(block.norm1, x, conv), conv)
    y = causal_conv(block.conv2, block.dropout(_activate(block.norm2, y, conv)), conv)
    return y + shortcut


def _residuals(
    block: WanMidBlock | WanResidualDownBlock | WanUpBlock | WanResidualUpBlock,
) -> list[WanResidualBlock]:
    return cast(list[WanResidualBlock], list(block.resnets))


def _middle(block: WanMidBlock, x: Tensor, conv: Conv) -> Tensor:
    first, *rest = _residuals(block)
    x = _residual(first, x, conv)
    for attention, residual in zip(block.attentions, rest, strict=True):
        x = _residual(residual, x if attention is None else attention(x), conv)
    return x


def _down(block: nn.Module, x: Tensor, conv: Conv) -> Tensor:
    if isinstance(block, WanResidualBlock):
        return _residual(block, x, conv)
    if isinstance(block, WanAttentionBlock):
        return block(x)
    if isinstance(block, WanResample):
        return _resample(block, x, conv)
    assert isinstance(block, WanResidualDownBlock)
    shortcut = block.avg_shortcut(x)  # pads a zero frame before the first, as the first chunk does
    for residual in _residuals(block):
        x = _residual(residual, x, conv)
    return (x if block.downsampler is None else _resample(block.downsampler, x, conv)) + shortcut


def _up(block: nn.Module, x: Tensor, conv: Conv) -> Tensor:
    assert isinstance(block, WanUpBlock | WanResidualUpBlock)
    entry = x
    for residual in _residuals(block):
        x = _residual(residual, x, conv)
    if isinstance(block, WanUpBlock):
        return x if block.upsamplers is None else _resample(cast(WanResample, block.upsamplers[0]), x, conv)
    if block.upsampler is not None:
        x = _resample(block.upsampler, x, conv)
    return x if block.avg_shortcut is None else x + block.avg_shortcut(entry, first_chunk=True)


def _resample(block: WanResample, x: Tensor, conv: Conv) -> Tensor:
    if block.mode == "upsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], _double_frames(causal_conv(block.time_conv, x[:, :, 1:], conv))], dim=2)
    if block.mode.startswith("upsample"):
        convolve = cast(nn.Sequential, block.resample)[1]
        # nearest-exact by two is plain repetition, exact in any dtype, so no detour over fp32
        x = _per_frame(x, lambda y: convolve(F.interpolate(y, scale_factor=2.0, mode="nearest-exact")))
    else:
        x = _per_frame(x, block.resample)
    if block.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], _halve_frames(block.time_conv, x, conv)], dim=2)
    return x


def _double_frames(x: Tensor) -> Tensor:
    """(B, 2 C, T, H, W) -> (B, C, 2 T, H, W); the first C channels are the earlier frames."""
    return x.unflatten(1, (2, -1)).transpose(1, 2).transpose(2, 3).flatten(2, 3)


def _halve_frames(layer: WanCausalConv3d, x: Tensor, conv: Conv) -> Tensor:
    """The strided time convolution without padding: T frames -> (T - 1) / 2."""
    if conv != "stack":
        return layer(x)
    stacked = torch.cat([x[:, :, 0:-2:2], x[:, :, 1:-1:2], x[:, :, 2::2]], dim=1)
    weight = layer.weight.transpose(1, 2).flatten(1, 2)
    return _per_frame(stacked, lambda y: F.conv2d(y, weight, layer.bias))

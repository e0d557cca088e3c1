"""The embedded pipeline with random weights: diffusers and transformers classes at a small configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from vivace.tiny.defaults import TEXT_LENGTH
from vivace.tiny.tokenizer import build_tokenizer


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Sizes of the parts; the defaults are the embedded model (9.1 M + 1.7 M + 0.4 M parameters).

    The VAE is of the kind of Wan 2.2 (pixel patches of 2x2, average shortcuts): 8x smaller in space, 4x in time. The
    transformer reads every latent position as a token, so 29 frames of 128x128 are 8 x 16 x 16 = 2,048 tokens.
    """

    heads: int = 4
    head_dim: int = 64
    layers: int = 8
    ffn_dim: int = 1024
    text_dim: int = 128
    text_layers: int = 2
    vae_dim: int = 24
    latent_channels: int = 48
    flow_shift: float = 3.0


def build_pipeline(
    seed: int = 0, config: TinyConfig | None = None, words: Iterable[str] | None = None
) -> WanPipeline:
    """A `WanPipeline` with fp32 weights drawn from `seed`, in eval mode, on the CPU.

    `words` is the tokenizer's vocabulary, by default that of `vivace.world`. The global random state is untouched.
    """
    config = config or TinyConfig()
    if words is None:
        from vivace.world import vocabulary

        words = vocabulary()
    tokenizer = build_tokenizer(words, TEXT_LENGTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = build_text_encoder(config, len(tokenizer)).eval()
        transformer = build_transformer(config).eval()
        vae = build_vae(config).eval()
    pipeline = WanPipeline(
        tokenizer=cast(Any, tokenizer),  # the class declares `AutoTokenizer`, which is never instantiated,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=cast(Any, build_scheduler(config)),  # and one scheduler of the many it takes
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_text_encoder(config: TinyConfig, vocabulary_size: int) -> UMT5EncoderModel:
    """The UMT5 encoder, without dropout: the captions are the ground truth and endlessly many."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary_size,
            d_model=config.text_dim,
            d_kv=config.text_dim // 4,
            d_ff=2 * config.text_dim,
            num_layers=config.text_layers,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_transformer(config: TinyConfig) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        text_dim=config.text_dim,
        freq_dim=256,
        ffn_dim=config.ffn_dim,
        num_layers=config.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


def build_vae(config: TinyConfig) -> AutoencoderKLWan:
    """The VAE; its latent statistics are mean 0 and deviation 1 until training folds the real ones in."""
    return AutoencoderKLWan(
        base_dim=config.vae_dim,
        z_dim=config.latent_channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * config.latent_channels,
        latents_std=[1.0] * config.latent_channels,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def build_scheduler(config: TinyConfig) -> UniPCMultistepScheduler:
    """UniPC (arXiv:2302.04867) on the rectified-flow sigmas with Wan's time shift."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=config.flow_shift,
    )

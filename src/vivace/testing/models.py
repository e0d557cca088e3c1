"""Tiny real diffusers pipelines with random weights, one per family, built offline in well under a second.

They are the subjects of the contract suite: real classes, real schedulers, no stand-ins. Weights are random and
scaled up a little where the library's initialisation would make every block a near-identity.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def byte_tokenizer() -> Any:
    """A byte-level tokenizer that needs no training and no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocab |= {c: 3 + i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def wan(*, layers: int = 4, experts: int = 1, image: bool = False) -> Any:
    """Wan 2.1 (one expert) or 2.2 (two), text-to-video or image-to-video."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanImageToVideoPipeline,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    def transformer() -> Any:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=36 if image else 16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=48,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ).eval()

    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    text = UMT5EncoderModel(
        UMT5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    ).eval()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    parts: dict[str, Any] = {
        "tokenizer": byte_tokenizer(),
        "text_encoder": text,
        "vae": vae,
        "scheduler": scheduler,
        "transformer": transformer(),
        "transformer_2": transformer() if experts == 2 else None,
        "boundary_ratio": 0.8 if experts == 2 else None,
    }
    if image:
        return WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None)
    return WanPipeline(**parts)


BUILDERS: dict[str, Callable[..., Any]] = {
    "wan2.1": wan,
    "wan2.2": functools.partial(wan, experts=2),
    "wan2.1-i2v": functools.partial(wan, image=True),
}


def pipeline(name: str, *, seed: int = 0, **options: Any) -> Any:
    """A tiny pipeline of the named family, quiet, deterministic from `seed`; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = BUILDERS[name](**options)
        enliven(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def enliven(pipe: Any, gain: float = 3.0) -> None:
    """Scale up the linears inside the blocks, so that every block matters to the output."""
    for name in ("transformer", "transformer_2"):
        module = getattr(pipe, name, None)
        if module is None:
            continue
        with torch.no_grad():
            for path, parameter in module.named_parameters():
                if "blocks" in path and parameter.ndim == 2:
                    parameter.mul_(gain)


CALL: dict[str, Any] = {
    "num_frames": 9,
    "height": 32,
    "width": 32,
    "num_inference_steps": 8,
    "max_sequence_length": 16,
}
"""Arguments that make a small clip on every tiny pipeline."""

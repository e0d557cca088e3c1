"""Tiny real diffusers pipelines with random weights, one per family, built offline in well under a second.

They are the subjects of the contract suite: real classes, real schedulers, no stand-ins. Weights are random and
scaled up a little where the library's initialisation would make every block a near-identity.
"""

# The libraries annotate tuples of any length as tuples of one, and optional components as required ones.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

TEXT_WIDTH = 32
VOCABULARY = 300


def byte_tokenizer(length: int = 512, pieces: tuple[str, ...] = (), start: str | None = None) -> Any:
    """A byte-level tokenizer that needs no training and no download.

    Args:
        length: its `model_max_length`.
        pieces: strings that become one token each; their ids follow those of the bytes.
        start: the piece that opens every sequence.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocab |= {c: 3 + i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    if start is None:
        frame = {"single": "$A </s>", "pair": "$A </s> $B </s>", "special_tokens": [("</s>", 1)]}
    else:
        special = [(start, tokenizer.token_to_id(start))]
        frame = {"single": f"{start} $A", "pair": f"{start} $A $B", "special_tokens": special}
    tokenizer.post_processor = processors.TemplateProcessing(**frame)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def wan(
    *,
    layers: int = 4,
    experts: int = 1,
    image: bool = False,
    image_encoder: bool = False,
    token_timesteps: bool = False,
) -> Any:
    """Wan 2.1 (one expert) or 2.2 (two), text-to-video or image-to-video; TI2V gives every token a timestep.

    With `image_encoder`, image-to-video also attends to the picture's CLIP tokens, as Wan 2.1 does; it then needs
    `max_sequence_length=512`, which diffusers takes for granted there.
    """
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
            text_dim=TEXT_WIDTH,
            freq_dim=32,
            ffn_dim=48,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
            image_dim=16 if image_encoder else None,
            added_kv_proj_dim=24 if image_encoder else None,
        ).eval()

    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    text = UMT5EncoderModel(
        UMT5Config(
            vocab_size=VOCABULARY,
            d_model=TEXT_WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
        )
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
        encoder = _clip_vision(224) if image_encoder else None
        return WanImageToVideoPipeline(
            **parts, image_encoder=encoder, image_processor=_clip_processor(224) if image_encoder else None
        )
    return WanPipeline(**parts, expand_timesteps=token_timesteps)


def cogvideox(*, layers: int = 4, image: bool = False, temporal_patch: int | None = None) -> Any:
    """CogVideoX with rotary positions and DDIM; `temporal_patch=2` makes it a CogVideoX 1.5."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8 if image else 4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH,
        num_layers=layers,
        sample_width=16,
        sample_height=16,
        sample_frames=9,
        patch_size=2,
        patch_size_t=temporal_patch,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    ).eval()
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=32,
        sample_width=32,
    ).eval()
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    build = CogVideoXImageToVideoPipeline if image else CogVideoXPipeline
    return build(
        tokenizer=byte_tokenizer(), text_encoder=_t5(), vae=vae, transformer=transformer, scheduler=scheduler
    )


def ltx(*, layers: int = 4, image: bool = False) -> Any:
    """LTX-Video, text-to-video or image-to-video (a timestep for every token)."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXImageToVideoPipeline,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=layers,
        caption_channels=TEXT_WIDTH,
    ).eval()
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5,
        patch_size=1,
        patch_size_t=1,
    ).eval()
    build = LTXImageToVideoPipeline if image else LTXPipeline
    return build(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=_t5(),
        tokenizer=byte_tokenizer(128),
        transformer=transformer,
    )


def hunyuan(*, layers: int = 2, single_layers: int = 2, image: bool = False) -> Any:
    """HunyuanVideo with guidance embedded; image-to-video replaces the tokens of the first frame."""
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoImageToVideoPipeline,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video as text_to_video
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as image_to_video

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        num_single_layers=single_layers,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        guidance_embeds=not image,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 6, 6),
        image_condition_type="token_replace" if image else None,
    ).eval()
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()
    template = (image_to_video if image else text_to_video).DEFAULT_PROMPT_TEMPLATE
    tokenizer = _llama_tokenizer(template)
    parts: dict[str, Any] = {
        "text_encoder": _llava(tokenizer) if image else _llama(len(tokenizer)),
        "tokenizer": tokenizer,
        "transformer": transformer,
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder_2": _clip(),
        "tokenizer_2": byte_tokenizer(77),
    }
    if image:
        return HunyuanVideoImageToVideoPipeline(**parts, image_processor=_clip_processor(336))
    return HunyuanVideoPipeline(**parts)


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=TEXT_WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
        )
    ).eval()


def _llama_config(vocabulary: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def _llama(vocabulary: int) -> Any:
    from transformers import LlamaModel

    return LlamaModel(_llama_config(vocabulary)).eval()


def _llava(tokenizer: Any) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=_clip_vision_config(336),
        text_config=_llama_config(len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    return LlavaForConditionalGeneration(config).eval()


def _clip_vision_config(size: int) -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=14,
    )


def _clip_vision(size: int) -> Any:
    from transformers import CLIPVisionModel

    return CLIPVisionModel(_clip_vision_config(size)).eval()


def _clip_processor(size: int) -> Any:
    # The default processor needs torchvision; this one needs Pillow.
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def _clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=1,
        )
    ).eval()


def _llama_tokenizer(template: Mapping[str, Any]) -> Any:
    """A tokenizer under which the instruction before the prompt is as long as the pipeline assumes.

    The pipeline cuts off a fixed number of tokens (`crop_start`), and the prompt must begin where the cut ends.
    """
    marks = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "\n\n", "<image>"]
    marks += ["system", "user", "assistant"]
    head, _, _ = template["template"].partition("{}")
    start, stop = head.index("Describe"), head.index("<|eot_id|>")
    if "<image>" in head:
        start -= 1  # the line break after the image is no token of its own
    around = byte_tokenizer(pieces=tuple(marks), start=marks[0])(head[:start] + head[stop:]).input_ids
    body, count = head[start:stop], template["crop_start"] - len(around)
    # One long piece, then one token a byte.
    return byte_tokenizer(pieces=(*marks, body[: len(body) + 1 - count]), start=marks[0])


BUILDERS: dict[str, Callable[..., Any]] = {
    "wan2.1": wan,
    "wan2.2": functools.partial(wan, experts=2),
    "wan2.1-i2v": functools.partial(wan, image=True),
    "wan2.2-ti2v": functools.partial(wan, token_timesteps=True),
    "cogvideox": cogvideox,
    "cogvideox-i2v": functools.partial(cogvideox, image=True),
    "ltx": ltx,
    "ltx-i2v": functools.partial(ltx, image=True),
    "hunyuan": hunyuan,
    "hunyuan-i2v": functools.partial(hunyuan, image=True),
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


def call(name: str, *, guided: bool = True) -> dict[str, Any]:
    """All arguments but the prompt for the tiny pipeline `name`, with or without classifier-free guidance.

    Image-to-video pipelines get a small picture; HunyuanVideo gets its true guidance by a negative prompt.
    """
    arguments = dict(CALL)
    if name.startswith("hunyuan"):
        arguments |= {"negative_prompt": "blur", "true_cfg_scale": 3.0 if guided else 1.0}
    elif not guided:
        arguments["guidance_scale"] = 1.0
    if name.endswith("-i2v"):
        arguments["image"] = picture(arguments["width"], arguments["height"])
    return arguments


def picture(width: int, height: int) -> Any:
    """A small PIL picture with a gradient along each side, the conditioning of image-to-video pipelines."""
    from PIL import Image

    pixels = [
        (255 * x // max(width - 1, 1), 255 * y // max(height - 1, 1), 128)
        for y in range(height)
        for x in range(width)
    ]
    image = Image.new("RGB", (width, height))
    image.putdata(pixels)
    return image

"""Published models by configuration: for planning and costing without a download, and for speed runs.

The numbers are those of the configuration files published with the models in diffusers' layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vivace.models.adapter import ModelDescription
from vivace.models.describe import describe_configs


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """One published model: class names, configurations, and the call it is usually made with."""

    name: str
    hub: str
    pipeline_class: str
    transformer_class: str
    transformer: Mapping[str, Any]
    vae_class: str
    vae: Mapping[str, Any]
    scheduler_class: str
    scheduler: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    encoders: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    """Text encoders: component -> class in transformers and configuration."""

    def describe(self) -> ModelDescription:
        """The description that its downloaded folder would give."""
        classes = {
            "transformer": self.transformer_class,
            "vae": self.vae_class,
            "scheduler": self.scheduler_class,
        }
        configs = {"transformer": self.transformer, "vae": self.vae, "scheduler": self.scheduler}
        for name, (kind, config) in self.encoders.items():
            classes[name], configs[name] = kind, config
        return describe_configs(self.name, self.pipeline_class, configs, classes, self.defaults)

    def build_transformer(self, *, device: Any = "cpu", dtype: Any = None, seed: int = 0) -> Any:
        """The transformer with random weights, in eval mode: as fast as the real one, and knows nothing.

        Args:
            device: where it is built; "meta" builds it without memory.
            dtype: torch dtype of all weights; the default dtype when left out.
            seed: of the weights; the global generators are left alone.
        """
        import diffusers
        import torch

        device = torch.device(device)
        devices = [device] if device.type == "cuda" else []
        before = torch.get_default_dtype()
        with torch.random.fork_rng(devices=devices), device:
            torch.manual_seed(seed)
            try:
                torch.set_default_dtype(dtype or before)
                module = getattr(diffusers, self.transformer_class).from_config(dict(self.transformer))
            finally:
                torch.set_default_dtype(before)
        return module.eval()


_UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_LLAMA_3_8B = {
    "vocab_size": 128320,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
_CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}


def _wan(name: str, hub: str, heads: int, layers: int, ffn: int) -> KnownModel:
    return KnownModel(
        name=name,
        hub=hub,
        pipeline_class="WanPipeline",
        transformer_class="WanTransformer3DModel",
        transformer={
            "patch_size": (1, 2, 2),
            "num_attention_heads": heads,
            "attention_head_dim": 128,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": ffn,
            "num_layers": layers,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
            "image_dim": None,
            "added_kv_proj_dim": None,
            "rope_max_seq_len": 1024,
        },
        vae_class="AutoencoderKLWan",
        vae={
            "base_dim": 96,
            "z_dim": 16,
            "dim_mult": (1, 2, 4, 4),
            "num_res_blocks": 2,
            "temperal_downsample": (False, True, True),
            "scale_factor_temporal": 4,
            "scale_factor_spatial": 8,
        },
        scheduler_class="UniPCMultistepScheduler",
        scheduler={
            "num_train_timesteps": 1000,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
            "solver_order": 2,
        },
        defaults={
            "num_frames": 81,
            "height": 480,
            "width": 832,
            "num_inference_steps": 50,
            "guidance_scale": 5.0,
            "max_sequence_length": 512,
            "fps": 16,
        },
        encoders={"text_encoder": ("UMT5EncoderModel", _UMT5_XXL)},
    )


_HUNYUAN = KnownModel(
    name="hunyuanvideo",
    hub="hunyuanvideo-community/HunyuanVideo",
    pipeline_class="HunyuanVideoPipeline",
    transformer_class="HunyuanVideoTransformer3DModel",
    transformer={
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 20,
        "num_single_layers": 40,
        "num_refiner_layers": 2,
        "mlp_ratio": 4.0,
        "patch_size": 2,
        "patch_size_t": 1,
        "qk_norm": "rms_norm",
        "guidance_embeds": True,
        "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
        "rope_theta": 256.0,
        "rope_axes_dim": (16, 56, 56),
    },
    vae_class="AutoencoderKLHunyuanVideo",
    vae={
        "latent_channels": 16,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "temporal_compression_ratio": 4,
        "spatial_compression_ratio": 8,
        "scaling_factor": 0.476986,
    },
    scheduler_class="FlowMatchEulerDiscreteScheduler",
    scheduler={"num_train_timesteps": 1000, "shift": 7.0},
    defaults={
        "num_frames": 129,
        "height": 720,
        "width": 1280,
        "num_inference_steps": 50,
        "guidance_scale": 6.0,
        "max_sequence_length": 256,
        "fps": 24,
    },
    encoders={"text_encoder": ("LlamaModel", _LLAMA_3_8B), "text_encoder_2": ("CLIPTextModel", _CLIP_L)},
)

KNOWN: Mapping[str, KnownModel] = {
    model.name: model
    for model in (
        _wan("wan2.1-1.3b", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 12, 30, 8960),
        _wan("wan2.1-14b", "Wan-AI/Wan2.1-T2V-14B-Diffusers", 40, 40, 13824),
        _HUNYUAN,
    )
}
"""By the name that `vivace.models.loading.describe` takes."""

"""Published models with random weights: the real shape, so the real speed, and no download. They know nothing."""

from __future__ import annotations

import hashlib
import inspect
import json
from typing import TYPE_CHECKING, Any

from vivace.core.errors import UnknownNameError
from vivace.models.describe import remember
from vivace.models.known import KNOWN, KnownModel

if TYPE_CHECKING:
    import torch

_TEXT_WIDTHS = ("text_dim", "text_embed_dim")


def known(name: str) -> KnownModel:
    """A published configuration by name.

    Raises:
        UnknownNameError: no configuration has that name.
    """
    if name not in KNOWN:
        raise UnknownNameError("configuration", name, KNOWN)
    return KNOWN[name]


def fingerprint(name: str, seed: int = 0) -> str:
    """sha256 over the configuration and the seed of the weights."""
    model = known(name)
    said = {"transformer": model.transformer, "vae": model.vae, "scheduler": model.scheduler, "seed": seed}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def build_pipeline(
    name: str, *, device: str | torch.device = "cpu", dtype: Any = None, seed: int = 0, **changes: Any
) -> Any:
    """A diffusers pipeline of a published configuration, without text encoders; call it with `embeddings`.

    Args:
        device, dtype: of the weights. Modules that the class keeps in fp32 stay there, as `from_pretrained` does.
        seed: of the weights; global generators are left alone.
        changes: of the transformer's configuration, e.g. `num_layers=2` for a trial on a small machine.

    Raises:
        UnknownNameError: no configuration has that name.
    """
    import diffusers
    import torch

    model, device = known(name), torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        try:
            # Large weights are made in their final type; what stays in fp32 is widened, its values mean nothing.
            torch.set_default_dtype(dtype)
            config = {**model.transformer, **changes}
            transformer = getattr(diffusers, model.transformer_class)(**config).eval()
            # The library's constructor wants lists where the published configuration has them.
            vae_config = {k: list(v) if isinstance(v, tuple) else v for k, v in model.vae.items()}
            vae = getattr(diffusers, model.vae_class)(**vae_config).eval()
        finally:
            torch.set_default_dtype(before)
    kept = tuple(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for part, parameter in transformer.named_parameters():
        if any(word in kept for word in part.split(".")):
            parameter.data = parameter.data.float()
    pipeline_class = getattr(diffusers, model.pipeline_class)
    parts = {
        "transformer": transformer,
        "vae": vae,
        "scheduler": getattr(diffusers, model.scheduler_class)(**model.scheduler),
    }
    wanted = inspect.signature(pipeline_class.__init__).parameters
    empty = {n: None for n in wanted if n.startswith(("text_encoder", "tokenizer"))}
    pipeline = pipeline_class(**empty, **parts)
    pipeline.set_progress_bar_config(disable=True)
    remember(pipeline, name, dict(model.defaults))
    return pipeline


def embeddings(pipeline: Any, samples: int, length: int, seed: int = 0) -> dict[str, Any]:
    """Random text embeddings in place of a prompt: arguments for the pipeline's call.

    Args:
        pipeline: one of `build_pipeline`.
        samples: rows (B); `length`: text tokens (L).
    """
    import torch

    config = pipeline.transformer.config
    weight = pipeline.transformer.parameters()
    device, dtype = next(weight).device, pipeline.transformer.dtype
    width = next(config[key] for key in _TEXT_WIDTHS if key in config)
    draw = torch.Generator().manual_seed(seed)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype)

    accepted = inspect.signature(type(pipeline).__call__).parameters
    call = {"prompt_embeds": new(samples, length, width)}
    if "pooled_prompt_embeds" in accepted:
        call["pooled_prompt_embeds"] = new(samples, config["pooled_projection_dim"])
    if "prompt_attention_mask" in accepted:
        call["prompt_attention_mask"] = torch.ones(samples, length, dtype=torch.bool, device=device)
    elif "negative_prompt_embeds" in accepted:
        # HunyuanVideo, which has the mask, is guidance-distilled: it has no negative branch by default.
        call["negative_prompt_embeds"] = new(samples, length, width)
    return call

"""The model that is trained on: which pipelines clips of `vivace.world` can be made into calls of."""

from __future__ import annotations

from typing import Any

import torch

from vivace.core.errors import ConfigError
from vivace.models.adapter import Adapter
from vivace.models.families import for_module
from vivace.models.loading import load


def load_model(name: str) -> tuple[Any, Adapter]:
    """The pipeline, in float32 and eval mode, and the adapter of its transformer.

    Args:
        name: `tiny`, or a diffusers folder of a Wan text-to-video pipeline with one transformer.

    Raises:
        VivaceError: there is no such model, or it is of another kind.
    """
    pipeline: Any = load(name, dtype=torch.float32)
    return pipeline, supported(pipeline)


def supported(pipeline: Any) -> Adapter:
    """The adapter of a pipeline that clips of the world can be encoded for; its parts in eval mode.

    Raises:
        ConfigError: it is of another kind.
    """
    adapter = for_module(getattr(pipeline, "transformer", None))
    kinds = (type(pipeline).__name__, type(getattr(pipeline, "vae", None)).__name__)
    one = getattr(pipeline, "transformer_2", None) is None
    if adapter is None or kinds != ("WanPipeline", "AutoencoderKLWan") or not one:
        raise ConfigError(
            "clips of the world can be made for Wan text-to-video pipelines with one transformer only, not for "
            f"{kinds[0]}; give one, or 'tiny'."
        )
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
        part.eval().requires_grad_(False)
    return adapter

"""From frames and prompts to what a transformer is given: normalised latents and text embeddings.

Both are the inverse and the counterpart of what the pipeline itself does, whatever its family: the normalisation is
read from the VAE's configuration, prompts go through the pipeline's own `encode_prompt`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vivace.calibration.artifact import model_hash
from vivace.core.errors import ModelError
from vivace.models.adapter import EXPERTS, ModelDescription
from vivace.models.describe import describe_pipeline
from vivace.tiny.train.clips import to_model
from vivace.tiny.whole_clip import encode_moments

WHOLE_CLIP_BYTES = 2**30
"""Largest activation for which a clip is encoded in one pass; larger clips go through the VAE's own chunks."""
_TENSORS, _VALUES = 16, 1024
"""How many tensors of a module are looked at, and how many values of each."""


@dataclass(frozen=True)
class Normalisation:
    """latent = (x - centre) * gain, x being what the VAE's encoder gives; both (1, C, 1, 1, 1) or (1, 1, 1, 1, 1)."""

    centre: Tensor
    gain: Tensor

    @classmethod
    def of(cls, vae: Any) -> Normalisation:
        """The inverse of x = latent * latents_std / scaling_factor + latents_mean, as diffusers' pipelines decode.

        What a VAE does not say is left out; `shift_factor` stands for `latents_mean` where there is no such thing.

        Raises:
            ModelError: the statistics are not one number for each latent channel.
        """
        mean, std = _statistic(vae, "latents_mean"), _statistic(vae, "latents_std")
        if mean is None or std is None:  # one without the other is not used by the pipelines
            mean, std = torch.tensor([float(vae.config.get("shift_factor") or 0.0)]), torch.ones(1)
        channels = next(
            (n for key in ("z_dim", "latent_channels") if (n := vae.config.get(key))), mean.numel()
        )
        if mean.shape != std.shape or mean.numel() not in (1, channels):
            raise ModelError(
                f"the latent statistics of {type(vae).__name__} are no list of {channels} numbers, one for each "
                "channel; such latents cannot be made."
            )
        scale = float(vae.config.get("scaling_factor") or 1.0)
        return cls(mean.view(1, -1, 1, 1, 1), scale / std.view(1, -1, 1, 1, 1))

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, C, T, H, W) to fp32 of the same shape."""
        return (x.float() - self.centre.to(x.device)) * self.gain.to(x.device)


class Encoder:
    """The VAE and the text encoders of one pipeline, on the device where they lie.

    Args:
        pipeline: a diffusers video pipeline.
        device: where its VAE and text encoders are.

    Raises:
        ModelError: it has no VAE, or one whose latents cannot be normalised.
    """

    def __init__(self, pipeline: Any, device: str | torch.device = "cpu") -> None:
        if getattr(pipeline, "vae", None) is None or not hasattr(pipeline, "encode_prompt"):
            raise ModelError(
                f"a {type(pipeline).__name__} has no VAE or no encode_prompt; give a text-to-video pipeline."
            )
        self.pipeline, self.device = pipeline, torch.device(device)
        self.model: ModelDescription = describe_pipeline(pipeline)
        self.normalise = Normalisation.of(pipeline.vae)
        adapter = self.model.adapter
        # The passes over a whole clip exist in both directions or not at all.
        self._whole = adapter is not None and adapter.whole_clip_decoder(pipeline.vae) is not None

    @torch.no_grad()
    def latents(self, video: Tensor) -> Tensor:
        """uint8 clips (B, T, H, W, 3) to normalised bf16 latents (B, C, n, h, w): means of the posterior."""
        vae = self.pipeline.vae
        pixels = to_model(video.to(self.device)).to(vae.dtype)
        if self._whole and pixels[:, 0].numel() * _width(vae) * vae.dtype.itemsize <= WHOLE_CLIP_BYTES:
            moments = encode_moments(vae, pixels)
            mean = moments[:, : moments.shape[1] // 2]
        else:
            found = vae.encode(pixels)
            mean = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
        return self.normalise(mean).bfloat16()

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """By field: `text` bf16 (B, L, D); where the pipeline has them `text_mask` uint8 (B, L), `pooled` bf16 (B, D).

        A second text encoder's are `text_2` and `text_mask_2`.
        """
        accepted = inspect.signature(type(self.pipeline).encode_prompt).parameters
        call = {
            "prompt": list(prompts),
            "do_classifier_free_guidance": False,
            "num_videos_per_prompt": 1,
            "max_sequence_length": self.model.workload().text,
            "device": self.device,
        }
        found = self.pipeline.encode_prompt(**{k: v for k, v in call.items() if k in accepted})
        parts = found if isinstance(found, (tuple, list)) else (found,)
        out: dict[str, Tensor] = {}
        for part in parts:
            if not isinstance(part, Tensor) or len(part) != len(prompts):
                continue  # what the unconditional branch would have needed
            if part.ndim == 3:
                out["text_2" if "text" in out else "text"] = part.bfloat16()
            elif name := _mask_of(part, out):
                out[name] = part.to(torch.uint8)
            else:
                out["pooled"] = part.bfloat16()
        if "text" not in out:
            raise ModelError(f"encode_prompt of {type(self.pipeline).__name__} gave no embeddings (B, L, D).")
        return out

    def identity(self) -> dict[str, str]:
        """Hashes of the parts that the data depend on: `transformer`, `vae`, `text`."""
        return identity_of(self.pipeline)


def identity_of(pipeline: Any) -> dict[str, str]:
    """Hashes of a pipeline's `transformer` (both experts), `vae` with its normalisation, and `text` encoders."""
    found = {"vae": "", "text": ""}
    if (vae := getattr(pipeline, "vae", None)) is not None:
        norm = Normalisation.of(vae)
        found["vae"] = _hash({"vae": vae}, norm.centre.numpy().tobytes() + norm.gain.numpy().tobytes())
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    encoders = {n: m for n in names if (m := getattr(pipeline, n, None)) is not None}
    if encoders:
        found["text"] = _hash(encoders)
    known = any(getattr(pipeline, e, None) is not None for e in EXPERTS)
    return {"transformer": model_hash(pipeline) if known else "", **found}


def pool(mask: Tensor, latents: Tensor) -> Tensor:
    """Object mask bool (B, T, H, W) at the size of latents (B, C, n, h, w): uint8, 1 where any pixel is an object's.

    A causal VAE's first latent frame stands for the first frame alone, each further one for an equal share of the rest.
    """
    n, h, w = latents.shape[2:]
    every = (mask.shape[1] - 1) // (n - 1) if n > 1 else 1
    padded = F.pad(mask.float(), (0, 0, 0, 0, every - 1, 0))
    kernel = (every, mask.shape[2] // h, mask.shape[3] // w)
    return F.max_pool3d(padded[:, None], kernel)[:, 0].to(torch.uint8)


def _statistic(vae: Any, name: str) -> Tensor | None:
    value = vae.config.get(name)
    if value is None:
        value = vae._buffers.get(name)  # some keep them as buffers
    return None if value is None else torch.as_tensor(value).detach().float().cpu().flatten()


def _width(vae: Any) -> int:
    """Channels of the encoder's widest activation, which it has at full resolution."""
    return cast(int, next(m.out_channels for m in vae.encoder.modules() if isinstance(m, nn.Conv3d)))


def _mask_of(part: Tensor, known: Mapping[str, Tensor]) -> str:
    """The name of a mask over the tokens of the embeddings before it; empty where `part` is something else."""
    last = "text_2" if "text_2" in known else "text"
    fits = part.ndim == 2 and last in known and part.shape == known[last].shape[:2]
    if not fits or not bool(((part == 0) | (part == 1)).all()):
        return ""
    return last.replace("text", "text_mask")


def _hash(modules: Mapping[str, nn.Module], more: bytes = b"") -> str:
    """Sixteen hex digits of names, shapes and a few values, rounded to bf16 so that copies in fp32 and bf16 agree."""
    digest = hashlib.sha256(more)
    for name, module in modules.items():
        tensors = {k: v for k, v in module.state_dict().items() if v.is_floating_point() and v.numel()}
        names = sorted(tensors)
        digest.update(f"{name} {[(k, tuple(tensors[k].shape)) for k in names]}".encode())
        for i in dict.fromkeys(np.linspace(0, len(names) - 1, min(_TENSORS, len(names))).round().astype(int)):
            flat = tensors[names[i]].detach().reshape(-1)
            values = flat[:: max(1, flat.numel() // _VALUES)][:_VALUES].bfloat16().float().cpu()
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]

"""Whole-clip decoding: the VAE's decoder in one pass over the clip instead of one pass per latent frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

from vivace.core.footprint import Footprint
from vivace.core.shapes import Workload
from vivace.kernels.api import Choice
from vivace.models.adapter import ModelDescription, Need
from vivace.techniques.base import Card, Cite, Paradigm, Stage, Target, Technique, exclusive, knob

NAME = "whole_clip_decode"
_USUAL = {
    "patch_size": None,
    "base_dim": 96,
    "decoder_base_dim": None,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
"""What a configuration that does not say it means."""
LIVE_TENSORS = 4
"""Full-resolution activations that live at the same time in a decoder's last stage, as a bound on memory."""


@dataclass(frozen=True, kw_only=True)
class WholeClipDecode(Technique):
    """A causal convolution fed chunk by chunk with cached frames equals one convolution over the whole clip.

    Fewer, larger kernels; the same picture to rounding. Clips whose activations would pass `max_gib`, and VAEs with
    tiling or slicing switched on, are decoded in chunks as usual, and the receipt says so.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.COMPRESSION,
        summary="Decodes the clip in one pass instead of one pass per latent frame; the same frames to rounding.",
        objective="seconds of VAE decoding",
        stage=Stage.KERNELS,
        claims=(exclusive("vae.decode"),),
        needs=(Need.WHOLE_CLIP_DECODE,),
        fidelity=1e-3,
        cite=Cite(
            title="Wan: Open and Advanced Large-Scale Video Generative Models, section 4.1 (the chunked VAE)",
            arxiv="2503.20314",
            code="https://github.com/Wan-Video/Wan2.1",
            differs="one causal pass with the padding applied once; the paper's cache of past frames is not needed",
        ),
    )

    max_gib: float = knob(4.0, low=0.0, high=1024.0, identity=0.0)
    """Memory bound in GiB for the activations of one pass; larger clips are decoded in chunks."""

    def apply(self, target: Target) -> None:
        vae = target.pipeline.vae
        decode = target.adapter.whole_clip_decoder(vae) if target.adapter is not None else None
        if decode is None:
            return  # nothing is edited, which the session reports as an error

        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            def decode_clip(z: Any, return_dict: bool = True) -> Any:
                if (reason := self.refusal(vae, z)) is not None:
                    target.report(NAME, "chunked_clips", z.shape[0])
                    target.chosen(Choice("vae_decode", "chunked", reason, old))
                    return old(z, return_dict=return_dict)
                target.report(NAME, "clips", z.shape[0])
                target.chosen(Choice("vae_decode", "whole_clip", "fits into max_gib", decode))
                sample = decode(z)
                return _decoder_output(sample) if return_dict else (sample,)

            return decode_clip

        target.edit.wrap(vae, make, "decode")

    def memory(self, model: ModelDescription, workload: Workload, base: Footprint) -> Footprint:
        assert model.adapter is not None
        latents = (workload.batch, 0, *model.adapter.latent(model, workload))
        config = SimpleNamespace(**_USUAL | dict(model.configs.get("vae", {})))
        fits = "whole" in base.decodes and self.gib(config, latents, base.size) <= self.max_gib
        return replace(base, decode="whole") if fits else base

    def refusal(self, vae: Any, z: Any) -> str | None:
        """Why latents z (B, C, t, h, w) are decoded in chunks, or None."""
        if vae.use_tiling or vae.use_slicing:
            return "tiling or slicing is switched on"
        if hasattr(vae, "_hf_hook"):
            return "the VAE is offloaded"
        gib = self.gib(vae.config, z.shape, z.element_size())
        return f"one pass would take about {gib:.1f} GiB" if gib > self.max_gib else None

    @staticmethod
    def gib(config: Any, shape: tuple[int, ...], element_size: int) -> float:
        """GiB of the activations of one pass over latents of `shape`: a bound from the last stage."""
        batch, _, t, h, w = shape
        patch = config.patch_size or 1
        frames, scale = (t - 1) * config.scale_factor_temporal + 1, config.scale_factor_spatial // patch
        width = config.decoder_base_dim or config.base_dim
        return LIVE_TENSORS * batch * frames * h * w * scale**2 * width * element_size / 2**30


def _decoder_output(sample: Any) -> Any:
    from diffusers.models.autoencoders.vae import DecoderOutput

    return DecoderOutput(sample=sample)

"""Fast decoding: the VAE's decoder in pieces as large as memory allows, in other numbers, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from vivace.core.footprint import Footprint
from vivace.core.shapes import Workload
from vivace.kernels.api import Choice
from vivace.models.adapter import ModelDescription
from vivace.models.vae_decode import (
    CAUSAL,
    COMPILE,
    DTYPES,
    FORMATS,
    FUSED,
    DecodeOptions,
    VaeDecoder,
    around,
    missing,
)
from vivace.techniques.base import Card, Cite, Paradigm, Problem, Stage, Target, Technique, exclusive, knob

NAME = "fast_decode"


@dataclass(frozen=True, kw_only=True)
class FastDecode(Technique):
    """The same frames to the rounding of `dtype`, whatever the pieces are.

    For `AutoencoderKLWan` a piece is some samples, some latent frames (the causal convolutions' last frames are carried
    over) and, where one frame is still too large, a tile with all positions around it that its pixels depend on. Other
    VAEs of diffusers (CogVideoX, LTX-Video, HunyuanVideo) are decoded by their own code with converted weights and
    compiled blocks. The user's VAE is never changed; converted weights are a copy of the decoder.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.COMPRESSION,
        summary="Decodes in exact pieces that fit into memory, in 16 bits or compiled if asked for; the same frames.",
        objective="seconds and memory of VAE decoding",
        stage=Stage.KERNELS,
        claims=(exclusive("vae.decode"),),
        fidelity=1e-3,
        cite=Cite(
            title="Wan: Open and Advanced Large-Scale Video Generative Models, section 4.1 (the feature cache)",
            arxiv="2503.20314",
            code="https://github.com/Wan-Video/Wan2.1",
            differs="pieces of any length instead of one latent frame, tiles that are exact instead of blended",
        ),
    )

    dtype: str = knob("own", choices=DTYPES)
    """Of weights and activations: the model's own, or 16 bits."""
    channels_last: str = knob("auto", choices=FORMATS)
    """Memory format channels_last_3d; auto: on GPUs."""
    compile: str = knob("off", choices=COMPILE)
    """Mode of torch.compile for the blocks that repeat; the first clip of a shape pays for it."""
    fused: str = knob("auto", choices=FUSED)
    """Norm, SiLU, biases and sums in joined passes between convolutions; auto: on GPUs, where nothing is compiled."""
    chunk: int = knob(0, low=0, high=1024)
    """Latent frames of a piece; 0: as many as fit into max_gib."""
    tile: int = knob(0, low=0, high=4096)
    """Latent positions of a tile's side; 0: tiles only where one frame does not fit into max_gib."""
    slicing: bool = False
    """One sample of a batch at a time, also where more would fit."""
    max_gib: float = knob(4.0, low=0.0, high=1024.0)
    """Memory bound in GiB for the activations of a piece."""

    @classmethod
    def examples(cls, workdir: Any, pipeline: Any) -> tuple[Self, ...]:
        return (cls(chunk=1, tile=3), cls(slicing=True, channels_last="on"), cls(fused="on"))

    def options(self) -> DecodeOptions:
        """The settings as the decoder takes them."""
        return DecodeOptions(
            dtype=self.dtype,
            channels_last=self.channels_last,
            compile=self.compile,
            fused=self.fused,
            chunk=self.chunk,
            tile=self.tile,
            slicing=self.slicing,
            max_gib=self.max_gib,
        )

    def missing(self, model: ModelDescription) -> str:
        return missing(model.components.get("vae", ""))

    def check(self, model: ModelDescription) -> list[Problem]:
        kind = model.components.get("vae", "")
        if self.missing(model):
            return []
        problems = []
        if self.fused == "on":
            against = {
                f"only {', '.join(CAUSAL)} can be decoded with fused passes, not {kind}": kind not in CAUSAL,
                "fused passes take channels_last_3d": self.channels_last == "off",
                "fused passes are not compiled": self.compile != "off",
            }
            problems += [
                self.problem("settings", f"{why}; leave fused at auto.")
                for why, holds in against.items()
                if holds
            ]
        if kind in CAUSAL:
            return problems
        if self.chunk or self.tile:
            message = f"only {', '.join(CAUSAL)} can be decoded in exact pieces, not {kind}; leave chunk and tile at 0."
            problems.append(self.problem("pieces", message))
        if self.dtype == "own" and self.channels_last == "off" and self.compile == "off" and not self.slicing:
            message = f"nothing is left to change in {kind}; set dtype, channels_last, compile or slicing."
            problems.append(self.problem("settings", message))
        return problems

    def memory(self, model: ModelDescription, workload: Workload, base: Footprint) -> Footprint:
        """The decoding in these pieces is run on the meta device, where nothing is computed, and counted."""
        if model.adapter is None or "vae" not in model.configs or self.missing(model):
            return base
        import torch

        from vivace.core.live_bytes import LiveBytes
        from vivace.models.vae_decode import bare

        kind = torch.float32 if base.size == 4 else torch.bfloat16
        vae = bare(model.components["vae"], model.configs["vae"], kind)
        channels = int(model.configs["vae"].get("z_dim") or model.configs["vae"]["latent_channels"])
        shape = (workload.batch, channels, *model.adapter.latent(model, workload))
        # Neither fused passes nor compiled blocks can be run there; they take no more. Both 16-bit types are as wide,
        # and only float16 is looked at for values that are not finite.
        dtype = "bfloat16" if self.dtype == "float16" else self.dtype
        decoder = VaeDecoder(vae, replace(self.options(), compile="off", fused="off", dtype=dtype))
        more: dict[str, Any] = {}
        if model.configs["vae"].get("timestep_conditioning"):
            more["temb"] = torch.zeros(workload.batch, dtype=kind, device="meta")
        with torch.no_grad(), LiveBytes() as live:
            decoder(torch.empty(shape, dtype=kind, device="meta"), **more)
        return replace(base, decodes={**base.decodes, NAME: live.peak}, decode=NAME)

    def apply(self, target: Target) -> None:
        vae = getattr(target.pipeline, "vae", None)
        if vae is None or missing(type(vae).__name__):
            return  # nothing is edited, which the session reports as an error
        decoder = VaeDecoder(vae, self.options())

        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            def run(z: Any, arguments: dict[str, Any]) -> Any:
                reason = decoder.aside(z)
                if reason is None:
                    try:
                        sample = decoder(z, **arguments)
                    except FloatingPointError as error:
                        reason = str(error)
                    else:
                        cut = decoder.pieces(z)
                        target.report(NAME, "clips", z.shape[0])
                        joined = decoder.rows()
                        told = str(cut) if joined is None else f"{cut}; passes joined by {joined.name}"
                        target.chosen(Choice("vae_decode", _name(self, cut.tile, joined), told, decoder))
                        return sample
                target.report(NAME, "plain_clips", z.shape[0])
                target.chosen(Choice("vae_decode", "plain", reason, old))
                return None

            return around(old, run)

        target.edit.wrap(vae, make, "decode")


def _name(settings: FastDecode, tile: int, joined: Choice | None) -> str:
    """What was chosen, e.g. `fast+bfloat16+compiled`."""
    parts = ["fast", "" if settings.dtype == "own" else settings.dtype, "" if joined is None else "fused"]
    parts += ["compiled" if settings.compile != "off" else "", "tiled" if tile else ""]
    return "+".join(p for p in parts if p)

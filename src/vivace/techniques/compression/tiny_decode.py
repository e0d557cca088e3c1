"""Tiny decoder: a small distilled network decodes in the place of the VAE's decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.core.errors import ConfigError, WeightsError
from vivace.kernels.api import Choice
from vivace.models.adapter import ModelDescription
from vivace.models.vae_decode import COMPILE, DecodeOptions, around, busy, compiler
from vivace.techniques.base import Card, Cite, Paradigm, Problem, Stage, Target, Technique, exclusive, knob

NAME = "tiny_decode"


@dataclass(frozen=True, kw_only=True)
class TinyDecode(Technique):
    """Decode by a file that `python -m vivace.training.decoder` wrote for this VAE.

    The picture is that of the small network: near the VAE's own, not equal. The VAE stays as it is, and encodes as
    before. A file that was distilled from a VAE of another class, configuration or latent statistics is refused.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.COMPRESSION,
        summary="Decodes by a small causal network distilled from the VAE's decoder.",
        objective="seconds and memory of VAE decoding",
        stage=Stage.KERNELS,
        claims=(exclusive("vae.decode"),),
        training="required",
        cite=Cite(
            title="Turbo-VAED: Fast and Stable Transfer of Video-VAEs to Mobile Devices",
            arxiv="2508.09136",
            code="https://github.com/hustvl/Turbo-VAED",
            differs="space and time are separate kernels, blocks remember one frame as TAEHV's do, and pixels alone "
            "are distilled",
        ),
    )

    path: str = ""
    """A .safetensors file, or the name of a packaged one."""
    compile: str = knob("off", choices=COMPILE)
    """Mode of torch.compile for its blocks; the first clip of a shape pays for it."""
    chunk: int = knob(0, low=0, high=1024)
    """Latent frames at a time, which bounds memory; 0: the whole clip."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        import torch

        from vivace.models import tiny_decoder

        vae = pipeline.vae
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            decoder = tiny_decoder.build(type(vae).__name__, vae.config, width=8, depth=1)
        file = tiny_decoder.save(workdir / "tiny.safetensors", decoder, type(vae).__name__, vae.config)
        return (cls(path=str(file)), cls(path=str(file), chunk=1))

    def missing(self, model: ModelDescription) -> str:
        return "" if "vae" in model.components else f"{model.name} has no VAE to decode for."

    def check(self, model: ModelDescription) -> list[Problem]:
        if self.missing(model):
            return []
        kind, config = model.components["vae"], model.defaults.get("vae", {})
        try:
            self._header(kind, config)
        except WeightsError as error:
            return [self.problem("file", str(error))]
        except ConfigError as error:
            return [self.problem("vae", str(error))]
        return []

    def _header(self, kind: str, config: Any) -> Path:
        """The file, if it was made for this VAE.

        Raises:
            WeightsError: there is none, or it is damaged.
            ConfigError: it belongs to another VAE.
        """
        from vivace.models import tiny_decoder

        file = tiny_decoder.find(self.path)
        said = tiny_decoder.header(file)
        if said.vae_class != kind:
            raise ConfigError(f"{file} was distilled from {said.vae_class}, and this model has {kind}.")
        if said.vae != tiny_decoder.fingerprint(kind, config):
            raise ConfigError(
                f"{file} was distilled from a {kind} of another configuration or other latent statistics; "
                "train one for this VAE: python -m vivace.training.decoder."
            )
        return file

    def apply(self, target: Target) -> None:
        vae = getattr(target.pipeline, "vae", None)
        if vae is None:
            return  # nothing is edited, which the session reports as an error
        from vivace.models import tiny_decoder

        decoder = tiny_decoder.load(self._header(type(vae).__name__, vae.config))
        decoder.requires_grad_(False)
        if (compiled := compiler(DecodeOptions(compile=self.compile))) is not None:
            decoder.compile_blocks(compiled)

        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            def run(z: Any, arguments: dict[str, Any]) -> Any:
                if (reason := busy(vae, z)) is not None:
                    target.report(NAME, "plain_clips", z.shape[0])
                    target.chosen(Choice("vae_decode", "plain", reason, old))
                    return None
                decoder.to(z.device, z.dtype)
                target.report(NAME, "clips", z.shape[0])
                target.chosen(Choice("vae_decode", "tiny", f"asked for by name: {self.path}", decoder.decode))
                return decoder.decode(z, self.chunk)

            return around(old, run)

        target.edit.wrap(vae, make, "decode")

"""Efficient-vDiT's attention: every frame sees itself and a few reference frames: linear in the frames."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.techniques.attention.searched import SearchedSparse, example_file
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive, knob

PATTERNS = ("full", *(f"frames:{k}" for k in (12, 8, 6, 4, 3, 2, 1)))
"""What a search tries for every layer: the paper's masks for clips of 8 and 24 latent frames."""


@dataclass(frozen=True, kw_only=True)
class EfficientVDiT(SearchedSparse):
    """Frames on the diagonal of the attention map, and k reference frames for all (Efficient-vDiT, arXiv 2502.06155).

    Attention maps between frames repeat themselves, tile by tile, so a few frames stand for all. Layers bear it
    unequally: a mask file of `PATTERNS` gives each its own k. Text stays dense both ways.
    """

    abstract: ClassVar[bool] = False
    names: ClassVar[tuple[str, ...]] = ("full", "frames")
    by_layer: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        name="efficient_vdit",
        paradigm=Paradigm.ATTENTION,
        summary="Every frame sees itself and k reference frames; attention grows linearly with the clip's length.",
        objective="attention time per step, most in long clips",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        calibration="optional",
        cite=Cite(
            title="Efficient-vDiT: Efficient Video Diffusion Transformers With Attention Tile",
            arxiv="2502.06155",
            differs="the masks alone, without the original's consistency distillation and knowledge distillation, "
            "which give back what the masks cost; reference frames are spread evenly over the clip (our reading), see "
            "everything and are seen by all, as the paper's sparsities ask for; layers are chosen by the mean error of "
            "their heads' outputs",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.4,
    )

    references: int = knob(2, low=1, high=32)
    """Reference frames (latent) of all layers, without a file; the paper's example has 2 in a clip of 8."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        found = example_file(workdir, pipeline, ("full", "frames:2", "frames:1"))
        return (cls(references=1), cls(references=1, dense_steps=2), cls(file=found, density=0.6))

    def uniform(self) -> str:
        return f"frames:{self.references}"

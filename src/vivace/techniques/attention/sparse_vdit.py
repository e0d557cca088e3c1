"""Sparse-vDiT: every head has one of a handful of fixed patterns, found once for a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.core.errors import ConfigError
from vivace.techniques.attention.head_patterns import parse
from vivace.techniques.attention.searched import SearchedSparse, example_file
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive

PATTERNS = ("full", "multi_diagonal:0.2", "multi_diagonal:0.05", "diagonal:0.1", "stripe:2", "skip")
"""What a search tries for every head."""


@dataclass(frozen=True, kw_only=True)
class SparseVDiT(SearchedSparse):
    """Full, diagonal, several diagonals, stripes, or (almost) nothing, head by head (Sparse-vDiT, arXiv 2506.03065).

    Which head has which is a property of the model and hardly of the prompt, so it is measured once:

        search_masks(pipeline, prompts, PATTERNS).save("masks.json")        (vivace.plans.mask_searching)

    and given as `file`. Without a file all heads have `pattern`. Text stays dense both ways.
    """

    abstract: ClassVar[bool] = False
    names: ClassVar[tuple[str, ...]] = ("full", "diagonal", "multi_diagonal", "stripe", "skip")
    card: ClassVar[Card] = Card(
        name="sparse_vdit",
        paradigm=Paradigm.ATTENTION,
        summary="Each head has one of five fixed patterns, chosen by its error in exact runs.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        calibration="optional",
        cite=Cite(
            title="Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion Transformers",
            arxiv="2506.03065",
            code="https://github.com/Peyton-Chen/Sparse-vDiT",
            differs="one block-sparse kernel runs all heads of a layer with lists of their own, where the original has "
            "a kernel for each pattern; heads are chosen by the error of their own output on sampled queries, under a "
            "threshold or a budget of pairs, and not by a cost model of a GPU; a skipped head still sees its own "
            "block; stripes are whole key frames; widths and the pattern without a file are ours",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.4,
    )

    pattern: str = "multi_diagonal:0.1"
    """Of all heads, without a file: full, skip, diagonal:W, multi_diagonal:W (W a share) or stripe:K (K frames)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if parse(self.pattern)[0] not in self.names:
            raise ConfigError(
                f"sparse_vdit: pattern must be one of {', '.join(self.names)}, not {self.pattern!r}."
            )

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        found = example_file(
            workdir, pipeline, ("full", "diagonal:0.3", "multi_diagonal:0.3", "stripe:1", "skip")
        )
        return (
            cls(file=found, threshold=0.15),
            cls(),
            cls(pattern="stripe:1", dense_steps=2),
            cls(pattern="diagonal:0.2"),
            cls(file=found, density=0.4),
        )

    def uniform(self) -> str:
        return self.pattern

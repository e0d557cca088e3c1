"""Static methods whose patterns may come from a search: one pattern for all heads, or a mask file's choice for each."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vivace.calibration.artifact import key_of
from vivace.core.errors import ConfigError, PlanError
from vivace.core.shapes import TokenGrid
from vivace.kernels.block_sparse_attention.spec import BlockMap
from vivace.models.adapter import ModelDescription
from vivace.techniques.attention.head_patterns import head_map, parse
from vivace.techniques.attention.headwise import HeadwiseSparse
from vivace.techniques.attention.mask_file import MaskFile, choose, unfit
from vivace.techniques.base import Problem, Target, knob


@dataclass(frozen=True, kw_only=True)
class SearchedSparse(HeadwiseSparse):
    """Base of the methods that take a mask file (`vivace.plans.mask_searching`). A subclass gives `uniform`.

    A file is valid for one family and one set of weights. Its patterns are shares of a clip, so it serves other shapes
    and steps too.
    """

    abstract: ClassVar[bool] = True
    names: ClassVar[tuple[str, ...]] = ()
    """Patterns that a file may hold."""
    by_layer: ClassVar[bool] = False
    """Whether all heads of a layer get one pattern, by their mean error."""

    file: str = ""
    """A mask file; every head gets the pattern that suits it. Without one all heads share one pattern."""
    threshold: float = knob(0.1, low=0.0, high=1.0, monotone="attention_pairs")
    """With a file: each head's sparsest pattern of at most this relative error of its output is taken."""
    density: float = knob(0.0, low=0.0, high=1.0)
    """With a file, above 0, instead of the threshold: mean share of pairs that all heads together may visit."""

    def uniform(self) -> str:
        """The pattern of all heads where there is no file."""
        raise TypeError(f"{type(self).__name__} does not say which pattern it has")

    def block_map(self, grid: TokenGrid) -> BlockMap:
        return head_map(grid, self.uniform(), self.block)

    @property
    def per_site(self) -> bool:
        return bool(self.file)

    def maps(self, grid: TokenGrid) -> tuple[BlockMap, ...]:
        return tuple(head_map(grid, p, self.block) for p in _loaded(*stamp(self.file)).patterns)

    def assigned(self, expert: str, layer: int, heads: int) -> tuple[int, ...]:
        chosen = _chosen(*stamp(self.file), self.threshold, self.density, self.by_layer)
        return chosen[expert, layer]

    def check(self, model: ModelDescription) -> list[Problem]:
        if wrong := self._complaint(model):
            return [self.problem("calibration", wrong)]
        return super().check(model)

    def _complaint(self, model: ModelDescription) -> str:
        if not self.file:
            return ""
        try:
            found = _loaded(*stamp(self.file))
            foreign = [p for p in found.patterns if parse(p)[0] not in self.names]
        except ConfigError as error:
            return str(error)
        if foreign:
            return f"{self.file} holds the pattern {foreign[0]}; make a file of {', '.join(self.names)}."
        return unfit(found.key, found.shape(), self.file, model)

    def apply(self, target: Target) -> None:
        if self.file:
            # The weights are known now.
            refuse_other_weights(self, _loaded(*stamp(self.file)).key.model_hash, target)
        super().apply(target)


def refuse_other_weights(technique: HeadwiseSparse, made_for: str, target: Target) -> None:
    """Raises:
    PlanError: a file was made for other weights than those of a live pipeline.
    """
    if made_for and target.model_hash and made_for != target.model_hash:
        sentence = f"its file was made for other weights of {target.model.name}; make one for these."
        raise PlanError([technique.problem("calibration", sentence)])


def example_file(folder: Path, pipeline: Any, patterns: tuple[str, ...]) -> str:
    """A mask file for a small pipeline with made-up errors, so that heads and layers differ: for contract checks.

    Args:
        folder: where it goes.
        pipeline: a live pipeline.
        patterns: in order of falling density; the error made up for each grows along them.
    """
    from vivace.models.describe import describe_pipeline

    model = describe_pipeline(pipeline)
    small = TokenGrid(3, 4, 4)
    errors = {
        e.name: [
            [[0.04 * i * (1 + (layer + head) % 3) for i in range(len(patterns))] for head in range(e.heads)]
            for layer in range(e.depth)
        ]
        for e in model.experts
    }
    made = MaskFile(
        key=replace(key_of(model, pipeline, model.workload()), model_hash=""),
        patterns=patterns,
        densities=tuple(head_map(small, p, 64).density for p in patterns),
        block=64,
        errors=errors,
        prompts=0,
        prompts_sha256="",
        seed=0,
        vivace="",
    )
    return str(made.save(folder / "masks.json"))


def stamp(path: str) -> tuple[str, int, int]:
    """A path with what tells one content of the file from another."""
    try:
        found = Path(path).stat()
    except OSError:
        return path, 0, 0
    return path, found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=8)
def _loaded(path: str, changed: int, size: int) -> MaskFile:
    return MaskFile.load(path)


@functools.lru_cache(maxsize=32)
def _chosen(
    path: str, changed: int, size: int, threshold: float, density: float, by_layer: bool
) -> dict[tuple[str, int], tuple[int, ...]]:
    """(expert, layer) -> a pattern for every head."""
    file = _loaded(path, changed, size)
    places = [(e, i, layer) for e, layers in file.errors.items() for i, layer in enumerate(layers)]
    rows = [np.mean(layer, axis=0)[None] if by_layer else np.array(layer) for _, _, layer in places]
    picked = choose(np.concatenate(rows), file.densities, threshold, density)
    parts = np.split(picked, np.cumsum([len(r) for r in rows])[:-1])
    return {
        (e, i): tuple(int(n) for n in np.broadcast_to(part, len(layer)))
        for (e, i, layer), part in zip(places, parts, strict=True)
    }

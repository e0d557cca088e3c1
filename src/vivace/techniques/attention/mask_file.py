"""The file of a mask search, and the choice that is made from it.

The file holds errors, of every candidate pattern at every head. `choose` turns them into an assignment, so that one
file serves any threshold or density. `mask_search` measures them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from vivace.calibration.artifact import Key, content
from vivace.core.errors import ConfigError
from vivace.models.adapter import ModelDescription

FORMAT, VERSION = "vivace-masks", 1
COMMAND = "`vivace calibrate --technique NAME` or vivace.plans.mask_searching.search_masks(pipeline, prompts, patterns)"


@dataclass(frozen=True, kw_only=True)
class MaskFile:
    """Errors of patterns, head by head.

    Attributes:
        key: of the exact runs; family and weights bind, shape and steps are told.
        patterns: candidates (`vivace.techniques.attention.head_patterns`).
        densities: share of pairs that each visits at the key's shape.
        block: most tokens of a block.
        errors: expert -> [layer][head][pattern], |out - dense| / |dense| over sampled queries, mean over steps,
            branches and prompts.
        prompts, prompts_sha256, seed: what it was measured on.
        vivace: version that made it.
    """

    key: Key
    patterns: tuple[str, ...]
    densities: tuple[float, ...]
    block: int
    errors: Mapping[str, Sequence[Sequence[Sequence[float]]]]
    prompts: int
    prompts_sha256: str
    seed: int
    vivace: str

    def __post_init__(self) -> None:
        n = len(self.patterns)
        if not n or len(self.densities) != n:
            raise ValueError(f"{n} patterns need as many densities, not {len(self.densities)}")
        rows = [head for layers in self.errors.values() for layer in layers for head in layer]
        if not rows or any(len(head) != n for head in rows):
            raise ValueError(f"every head needs {n} errors")
        if not np.isfinite(np.array(rows, dtype=np.float64)).all():
            raise ValueError("an error is no number")

    def save(self, path: str | Path) -> Path:
        """Write the file; folders are made."""
        data = asdict(self)
        data["errors"] = {
            expert: [[[float(f"{e:.5g}") for e in head] for head in layer] for layer in layers]
            for expert, layers in self.errors.items()
        }
        return write(path, {"format": FORMAT, "version": VERSION, **data})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            ConfigError: there is no such file, or it is something else; the sentence says what to do.
        """
        data = read(path, "mask file", FORMAT, VERSION, COMMAND)
        try:
            values = {k: v for k, v in data.items() if k not in ("format", "version")}
            values["key"] = Key(**values["key"])
            values["patterns"], values["densities"] = tuple(values["patterns"]), tuple(values["densities"])
            return cls(**values)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged ({error}); make it again with {COMMAND}.") from None

    def shape(self) -> dict[str, list[int]]:
        """Expert -> number of heads of every layer."""
        return {expert: [len(layer) for layer in layers] for expert, layers in self.errors.items()}


def write(path: str | Path, data: Mapping[str, Any]) -> Path:
    """One of our JSON files; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
    return path


def read(path: str | Path, what: str, form: str, version: int, command: str) -> dict[str, Any]:
    """As `vivace.calibration.artifact.content`, for a file that a call of Python makes.

    Raises:
        ConfigError: there is no such file, or it is something else; the sentence says what to do.
    """
    if not Path(path).exists():
        raise ConfigError(f"there is no {what} {path}; make it with {command}.save({str(path)!r}).")
    return content(path, what, form, version, command)


def unfit(key: Key, shape: Mapping[str, Sequence[int]], path: str, model: ModelDescription) -> str:
    """Why a file made for `key`, with `shape` heads by expert and layer, cannot serve a model; empty when it can."""
    if key.family != model.family:
        return f"the file {path} was made for the family {key.family}, and {model.name} is of {model.family}."
    if model.weights and key.model_hash and key.model_hash != model.weights:
        return f"the file {path} was made for other weights of {model.name}; make one for these."
    for expert in model.experts:
        heads = shape.get(expert.name)
        if heads is None or len(heads) != expert.depth or any(n != expert.heads for n in heads):
            return (
                f"the file {path} is not for {expert.depth} layers of {expert.heads} heads in {expert.name}, which "
                f"{model.name} has; make one for it."
            )
    return ""


def choose(
    errors: np.ndarray, densities: Sequence[float], threshold: float = 0.0, density: float = 0.0
) -> np.ndarray:
    """A pattern for every head.

    Args:
        errors: float (heads, patterns).
        densities: share of pairs of each pattern.
        threshold: with `density` 0: each head gets its sparsest pattern of at most this error, and the pattern of least
            error where there is none.
        density: above 0: mean density that the heads together may have. They start at their least errors and move to
            sparser patterns, the least error per saved pair first, until the budget is met (or nothing is left).

    Returns:
        int64 (heads,), numbers of patterns.
    """
    errors, share = np.asarray(errors, dtype=np.float64), np.asarray(densities, dtype=np.float64)
    if density <= 0.0:
        # Of equally sparse patterns the one of less error.
        order = np.lexsort((errors, np.broadcast_to(share, errors.shape)), axis=-1)
        fits = np.take_along_axis(errors, order, 1) <= threshold
        first = np.take_along_axis(order, fits.argmax(1)[:, None], 1)[:, 0]
        return np.where(fits.any(1), first, _least(errors, share))
    now = _least(errors, share)
    moves: list[tuple[float, int, int, int]] = []
    for head, start in enumerate(now):
        at, step = int(start), 0
        while (next_ := _cheapest(errors[head], share, at)) is not None:
            rate = (errors[head, next_] - errors[head, at]) / (share[at] - share[next_])
            moves.append((rate, head, step, next_))
            at, step = next_, step + 1
    total = float(share[now].sum())
    # A head's rates rise from move to move, so sorting keeps their order.
    for _, head, _, pattern in sorted(moves):
        if total <= density * len(now) + 1e-12:
            break
        total += share[pattern] - share[now[head]]
        now[head] = pattern
    return now


def _least(errors: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The pattern of least error of every head; the sparsest of equals."""
    return np.lexsort((np.broadcast_to(share, errors.shape), errors), axis=-1)[:, 0]


def _cheapest(errors: np.ndarray, share: np.ndarray, at: int) -> int | None:
    """The sparser pattern with least error per saved pair, the sparsest of equals; None where none is sparser."""
    sparser = np.flatnonzero(share < share[at] - 1e-12)
    if not sparser.size:
        return None
    rate = (errors[sparser] - errors[at]) / (share[at] - share[sparser])
    return int(sparser[np.lexsort((share[sparser], rate))[0]])

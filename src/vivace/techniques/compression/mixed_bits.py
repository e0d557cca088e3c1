"""Which layer gets which number format: measured errors, a choice under a budget, and the file that is read back.

`BitErrors` holds how far the network's output moves when one unit (a linear layer, or all of a role in a block) is
quantised in one way and everything else is exact; `vivace.plans.quant_searching` measures it. Errors of units are taken
as independent, so that squares add up. `BitErrors.choose` gives each unit a candidate, under a budget of bits, bytes or
loss; the answer is a `MixedBits` file, which `quantized_linear(mixed=FILE)` reads.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from vivace.core.errors import ConfigError
from vivace.kernels.quant_linear.spec import Recipe
from vivace.models.adapter import ModelDescription

FORMAT, VERSION = "vivace-mixed-bits", 1
ERRORS_FORMAT = "vivace-bit-errors"
MAKER = "vivace.plans.quant_searching"
SETTINGS = ("weights", "activations", "group")
"""What a file says of a layer; rotation, smoothing and branch are the technique's."""


@dataclass(frozen=True, kw_only=True)
class MixedBits:
    """An assignment of formats.

    Attributes:
        family, model_hash: of the model it was measured on; an empty hash fits any weights.
        layers: address of a linear -> `weights`, `activations`, `group`; None for a layer that stays as it is. Layers
            that are not named get the technique's own settings.
        told: what was predicted for it (`error`, `bits`, `bytes`), for people.
    """

    family: str
    model_hash: str
    layers: Mapping[str, Mapping[str, Any] | None]
    told: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site, settings in self.layers.items():
            if settings is not None:
                if set(settings) - set(SETTINGS):
                    raise ValueError(f"{site} has settings beside {', '.join(SETTINGS)}")
                Recipe(**settings)

    def recipe(self, site: str, usual: Recipe) -> Recipe | None:
        """How a layer is quantised; None for not at all. `usual`: the technique's own recipe."""
        if site not in self.layers:
            return usual
        settings = self.layers[site]
        if settings is None:
            return None
        values: dict[str, Any] = usual.to_dict() | {"group": 0} | dict(settings)
        return Recipe(**values)

    def save(self, path: str | Path) -> Path:
        """Write the file; folders are made."""
        return _write(path, {"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            ConfigError: there is no such file, or it is something else; the sentence says what to do.
        """
        return cls(**_read(path, "mixed-bits file", FORMAT, cls))

    def unfit(self, path: str, model: ModelDescription) -> str:
        """Why the file cannot serve a model; empty when it can."""
        if self.family != model.family:
            return f"{path} was made for the family {self.family}, and {model.name} is of {model.family}."
        blocks = tuple(f"{site}." for e in model.experts for site in e.block_sites)
        strange = next((s for s in self.layers if not s.startswith(blocks)), None)
        if strange is not None:
            return f"{path} names the layer {strange}, which {model.name} does not have; make a file for it."
        return ""


@dataclass(frozen=True, kw_only=True)
class BitErrors:
    """Measured errors.

    Attributes:
        family, model_hash: of the model.
        units: name -> addresses of its linears.
        sizes: weights of each unit.
        candidates: what was tried, `Recipe.to_dict()`.
        bytes: [unit][candidate], codes and scales.
        full_bytes: of each unit as it was.
        calls: (expert, step, number of steps) of the recorded evaluations.
        errors: [unit][candidate][call], |out - exact| / |exact| of the transformer's output; None for a call of another
            expert.
    """

    family: str
    model_hash: str
    units: Mapping[str, Sequence[str]]
    sizes: Sequence[int]
    candidates: Sequence[Mapping[str, Any]]
    bytes: Sequence[Sequence[int]]
    full_bytes: Sequence[int]
    calls: Sequence[tuple[str, int, int]]
    errors: Sequence[Sequence[Sequence[float | None]]]

    def __post_init__(self) -> None:
        shape = (len(self.units), len(self.candidates), len(self.calls))
        if self.table.shape != shape or not all(shape) or len(self.sizes) != shape[0]:
            raise ValueError(f"errors of shape {self.table.shape} and not {shape}")

    @property
    def table(self) -> np.ndarray:
        """Errors (units, candidates, calls); NaN for a call of another expert."""
        return np.array(self.errors, dtype=np.float64)

    def mean(self, start: float = 0.0, stop: float = 1.0) -> np.ndarray:
        """Root mean square over the calls of a range of the trajectory: (units, candidates).

        Args:
            start, stop: shares of the steps; a step i of n counts where start <= i / n < stop (or stop is 1).

        Raises:
            ConfigError: no recorded call of some unit lies there.
        """
        at = np.array([step / steps for _, step, steps in self.calls])
        table = self.table[:, :, (at >= start) & ((at < stop) | (stop >= 1.0))]
        seen = np.isfinite(table)
        if not seen.any(-1).all():
            raise ConfigError(
                f"no call was recorded from {start:g} to {stop:g} of the steps for every layer."
            )
        return np.sqrt(np.where(seen, table, 0.0).__pow__(2).sum(-1) / seen.sum(-1))

    def choose(
        self,
        *,
        bits: float | None = None,
        nbytes: float | None = None,
        loss: float | None = None,
        keep: bool = True,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> MixedBits:
        """The least predicted error within a budget, or the fewest bytes within a loss. Give one of the three.

        Args:
            bits: average bits of a weight, scales included.
            nbytes: bytes of all units.
            loss: relative error of the output, sqrt of the units' summed squares.
            keep: whether a unit may also stay as it is.
            start, stop: range of steps whose errors count.

        Raises:
            ConfigError: not one budget is given, or it cannot be met; the sentence says what can.
        """
        if sum(v is not None for v in (bits, nbytes, loss)) != 1:
            raise ConfigError("a choice needs one budget: bits, nbytes or loss.")
        errors, sizes = self.mean(start, stop), np.array(self.bytes, dtype=np.float64)
        if keep:
            errors = np.concatenate([errors, np.zeros((len(errors), 1))], 1)
            sizes = np.concatenate([sizes, np.array(self.full_bytes, dtype=np.float64)[:, None]], 1)
        total = float(sum(self.sizes))
        budget = bits * total / 8.0 if bits is not None else nbytes
        chosen = allocate(errors, sizes, budget=budget, loss=loss)
        rows = np.arange(len(chosen))
        layers: dict[str, Mapping[str, Any] | None] = {}
        for sites, number in zip(self.units.values(), chosen, strict=True):
            settings = None
            if number < len(self.candidates):
                settings = {k: self.candidates[number][k] for k in SETTINGS}
            layers |= dict.fromkeys(sites, settings)
        used = float(sizes[rows, chosen].sum())
        told = {
            "error": float(np.sqrt((errors[rows, chosen] ** 2).sum())),
            "bits": 8.0 * used / total,
            "bytes": used,
        }
        return MixedBits(family=self.family, model_hash=self.model_hash, layers=layers, told=told)

    def save(self, path: str | Path) -> Path:
        """Write the file; folders are made."""
        return _write(path, {"format": ERRORS_FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file; raises ConfigError as `MixedBits.load`."""
        data = _read(path, "file of bit errors", ERRORS_FORMAT, cls)
        data["calls"] = [tuple(c) for c in data["calls"]]
        return cls(**data)


def allocate(
    errors: np.ndarray, sizes: np.ndarray, *, budget: float | None = None, loss: float | None = None
) -> np.ndarray:
    """A candidate for each unit: int64 (units,).

    Every unit begins at its least error and moves along the convex hull of (size, squared error), least error per saved
    byte first: until `budget` is met, or as long as the root of the summed squares stays within `loss`. What is left of
    a budget then buys back the moves that fit, largest error first. Moves along a hull are optimal up to one unit (the
    knapsack's relaxation).

    Args:
        errors, sizes: (units, candidates).
        budget: bytes.
        loss: relative error.

    Raises:
        ConfigError: the smallest candidates together exceed the budget, or the best ones the loss.
    """
    squares = np.asarray(errors, dtype=np.float64) ** 2
    sizes = np.asarray(sizes, dtype=np.float64)
    hulls = [_hull(e, s) for e, s in zip(squares, sizes, strict=True)]
    place = [0] * len(hulls)
    moves = []
    for unit, hull in enumerate(hulls):
        for i, (a, b) in enumerate(itertools.pairwise(hull)):
            saved, lost = sizes[unit, a] - sizes[unit, b], squares[unit, b] - squares[unit, a]
            moves.append((lost / saved, unit, i + 1, lost, saved))
    used = sum(sizes[u, h[0]] for u, h in enumerate(hulls))
    error = sum(squares[u, h[0]] for u, h in enumerate(hulls))
    least = sum(sizes[u, h[-1]] for u, h in enumerate(hulls))
    if budget is not None and least > budget:
        raise ConfigError(
            f"the smallest formats take {least:.0f} bytes, more than the budget of {budget:.0f}."
        )
    if loss is not None and error > loss**2:
        raise ConfigError(f"the best formats already lose {error**0.5:.3g}, more than {loss:g}.")
    # Slopes grow along a hull, so a unit's moves come in their order.
    blocked: set[int] = set()
    for _, unit, to, lost, saved in sorted(moves):
        if budget is not None and used <= budget:
            break
        if unit in blocked:
            continue
        if loss is not None and error + lost > loss**2:
            blocked.add(unit)
            continue
        place[unit], used, error = to, used - saved, error + lost
    if budget is not None:
        back = sorted(((lost, unit, to, saved) for _, unit, to, lost, saved in moves), reverse=True)
        for lost, unit, to, saved in back:
            if place[unit] == to and used + saved <= budget and lost > 0:
                place[unit], used = to - 1, used + saved
    return np.array([hull[p] for hull, p in zip(hulls, place, strict=True)], dtype=np.int64)


def _hull(squares: np.ndarray, sizes: np.ndarray) -> list[int]:
    """Candidates of one unit on the lower convex hull, from the least error to the least size."""
    hull: list[int] = []
    for i in np.lexsort((sizes, squares)).tolist():
        if hull and sizes[i] >= sizes[hull[-1]]:
            continue  # neither better nor smaller
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            first = (squares[b] - squares[a]) * (sizes[b] - sizes[i])
            second = (squares[i] - squares[b]) * (sizes[a] - sizes[b])
            if first < second:
                break
            hull.pop()
        hull.append(i)
    return hull


def _write(path: str | Path, data: Mapping[str, Any]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _read(path: str | Path, what: str, form: str, cls: type) -> dict[str, Any]:
    """The table of a file, after its head has been checked and an object has been made of it."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no {what} {path}; make it with {MAKER}.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a {what} ({error}).") from None
    if not isinstance(data, dict) or data.get("format") != form or data.get("version") != VERSION:
        raise ConfigError(f"{path} is no {what} of version {VERSION}; make one with {MAKER}.")
    values = {k: v for k, v in data.items() if k not in ("format", "version")}
    try:
        cls(**values)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); make it again with {MAKER}.") from None
    return values

"""The fitted solver as a file: which steps of the exact run's grid are computed, the weights, and what it is valid for.

A solver says something about one set of weights and one trajectory; another shape or guidance scale bends the
trajectory a little, so those two are told and not refused (see `FittedSolver`).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from vivace.calibration.artifact import Key, content
from vivace.core.errors import ConfigError

FORMAT = "vivace-solver"
VERSION = 1
COMMAND = "vivace calibrate --solver STEPS"
BASES = {"guided": 1, "pair": 2}
"""Tensors that an evaluation adds, by basis."""
_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class SolverFile:
    """One fitted solver (`vivace.calibration.fitting`).

    Attributes:
        key: of the exact run it was fitted to; `key.steps` is its grid.
        nodes: computed steps of the grid, rising, 0 first.
        sigmas: (grid + 1,) noise levels of the exact run.
        basis: `guided` or `pair`: what an evaluation adds to the sums, its guided output, or the conditional and the
            unconditional one apart.
        own: steps at the beginning that the exact run's scheduler takes: each goes to the next of the grid.
        weights: for every other step, of the sample the first of them starts from and of all that was added so far.
        prompts, prompts_sha256, seed: what it was fitted on.
        error: relative error of the final latent on those prompts, geometric mean.
        vivace: version that made it.
    """

    key: Key
    nodes: tuple[int, ...]
    sigmas: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    basis: str = "guided"
    own: int = 0
    prompts: int
    prompts_sha256: str
    seed: int
    error: float
    vivace: str

    def __post_init__(self) -> None:
        n, k = self.key.steps, len(self.nodes)
        if len(self.sigmas) != n + 1:
            raise ValueError(f"a grid of {n} steps has {n + 1} noise levels, not {len(self.sigmas)}")
        if (
            not k
            or self.nodes[0] != 0
            or any(a >= b for a, b in zip(self.nodes, (*self.nodes[1:], n), strict=True))
        ):
            raise ValueError(f"computed steps must rise from 0 to below {n}")
        if self.basis not in BASES:
            raise ValueError(f"the basis is one of {', '.join(BASES)}, not {self.basis}")
        if not 0 <= self.own <= k or any(
            to != i + 1 for i, to in zip(range(self.own), (*self.nodes[1:], n), strict=False)
        ):
            raise ValueError(f"the scheduler cannot take {self.own} steps: they leave out some of the grid")
        each = BASES[self.basis]
        if [len(w) for w in self.weights] != [1 + each * (i + 1) for i in range(self.own, k)]:
            raise ValueError(
                f"{k - self.own} fitted steps need as many rows of weights: 1 + {each} for every evaluation so far"
            )
        if not all(math.isfinite(w) for row in (*self.weights, self.sigmas) for w in row):
            raise ValueError("a weight or noise level is no number")

    @property
    def steps(self) -> int:
        """Network evaluations of each branch."""
        return len(self.nodes)

    def increments(self) -> list[list[float]]:
        """Weights of what a fitted step adds to its sample: each row less the row before (the first begins at 1)."""
        out, before = [], [1.0] + [0.0] * BASES[self.basis] * self.own
        for row in self.weights:
            new = [0.0] * BASES[self.basis]
            out.append([w - b for w, b in zip(row, [*before, *new], strict=True)])
            before = list(row)
        return out

    def fits(self, sigmas: list[float]) -> bool:
        """Whether a scheduler's noise levels are those of the grid."""
        return len(sigmas) == len(self.sigmas) and all(
            abs(a - b) <= _TOLERANCE for a, b in zip(sigmas, self.sigmas, strict=True)
        )

    def save(self, path: str | Path) -> Path:
        """Write the file; folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        data["weights"] = [[float(f"{w:.7g}") for w in row] for row in self.weights]
        data["sigmas"] = [float(f"{s:.7g}") for s in self.sigmas]
        path.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            ConfigError: there is no such file, or it is no solver of this version; the sentence says what to do.
        """
        data = content(path, "fitted solver", FORMAT, VERSION, COMMAND)
        try:
            values = {k: v for k, v in data.items() if k not in ("format", "version")}
            values["key"] = Key(**values["key"])
            values["own"] = int(values.get("own", 0))
            values["nodes"] = tuple(int(v) for v in values["nodes"])
            values["sigmas"] = tuple(float(v) for v in values["sigmas"])
            values["weights"] = tuple(tuple(float(w) for w in row) for row in values["weights"])
            return cls(**values)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged ({error}); make it again with `{COMMAND}`.") from None

"""What a metric is: a card that states its convention, and one function over decoded clips.

A metric knows clips and prompts; it never knows a plan or how a clip was made. Clips are `(B, T, H, W, 3)` tensors,
RGB, uint8 in [0, 255] or floating point in [0, 1], before any codec. A metric that cannot run here says why
(`missing`); it never answers with a zero.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.core.errors import UnavailableError
from vivace.core.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    import torch


class Scope(StrEnum):
    """What one measurement looks at."""

    SAMPLE = "sample"
    """One clip alone."""
    PAIR = "pair"
    """One clip beside the reference clip of the same prompt, seed and noise."""
    SET = "set"
    """All clips of a contender beside all clips of the reference."""
    LATENT = "latent"
    """The trajectory of latents beside the reference trajectory of the same noise."""


class Group(StrEnum):
    """Which question a metric answers; records and reports keep the three apart."""

    FIDELITY = "fidelity"
    """Is it the clip that the exact run would have made?  Not a statement about quality."""
    ABSOLUTE = "absolute"
    """Is it a good clip of this prompt, whatever the exact run made?"""
    DISTRIBUTION = "distribution"
    """Do the clips as a set look like the exact run's clips?"""


class Better(StrEnum):
    """Which way a value is better. `SAME`: any departure from the reference's value is a loss."""

    HIGHER = "higher"
    LOWER = "lower"
    SAME = "same"


@dataclass(frozen=True, kw_only=True)
class Series:
    """One column of numbers that a metric gives."""

    name: str
    better: Better
    about: str
    """What the number is, in one sentence."""
    unit: str = ""
    low: float | None = None
    high: float | None = None
    """Possible values, both ends included; None where there is no bound."""
    margin: float | None = None
    """Pre-stated non-inferiority margin in the series' unit, as a positive number; None: no claim is made."""
    binary: bool = False
    """Whether every value is 0 or 1 (McNemar's test applies)."""


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Weights that a metric rests on."""

    name: str
    sha256: str
    licence: str
    source: str


@dataclass(frozen=True, kw_only=True)
class MetricCard:
    """Everything one must know to compare two numbers of this metric."""

    name: str
    version: int
    title: str
    scope: Scope
    group: Group
    series: tuple[Series, ...]
    convention: str
    """The exact definition in words: colour space, range, window, pooling. Another convention is another version."""
    sees: tuple[str, ...] = ()
    """Kinds of damage it reacts to, by the names of `vivace.evaluation.damage`."""
    blind_to: tuple[str, ...] = ()
    """Kinds of damage it does not see, or even rewards; never report it alone."""
    packages: tuple[str, ...] = ()
    """Importable modules beyond the core."""
    backbone: Backbone | None = None
    cite: str = ""
    symmetric: bool = False
    """Whether swapping reference and candidate gives the same value."""

    def series_named(self, name: str) -> Series:
        """One of the card's series."""
        return next(s for s in self.series if s.name == name)


@dataclass(frozen=True)
class Context:
    """What a measurement may know beside the clips. `prompts` has B entries.

    `reference` is `(B, T, H, W, 3)` like the clips, for PAIR metrics. `trajectory` and `reference_trajectory` are for
    LATENT metrics.
    """

    prompts: tuple[str, ...] = ()
    fps: float = 8.0
    reference: torch.Tensor | None = None
    trajectory: Trajectory | None = None
    reference_trajectory: Trajectory | None = None


@dataclass(frozen=True)
class Trajectory:
    """Latents after every solver step: `sigmas` (S,), descending, and `latents` (S, B, ...) on the CPU."""

    sigmas: tuple[float, ...]
    latents: torch.Tensor


@dataclass(frozen=True)
class SetValue:
    """A set-level value with its 95 % interval (bootstrap over prompts) and, where it is tested, a permutation p."""

    value: float
    low: float
    high: float
    p: float | None = None
    n: int = 0
    note: str = ""


class Metric(ABC):
    """Base of all metrics. Subclasses give `card` and one of the three measuring methods, by their scope.

    Args:
        device: torch device that runs whatever networks or tensors the metric has.
    """

    card: ClassVar[MetricCard]

    def __init__(self, device: Any = "cpu") -> None:
        self.device = device

    @classmethod
    def registry_name(cls) -> str:
        """The name in files and on the command line."""
        return cls.card.name

    def missing(self) -> str:
        """Why this metric cannot run here, in a sentence that says what to do; empty when it can."""
        absent = [p for p in self.card.packages if importlib.util.find_spec(p.partition(".")[0]) is None]
        if absent:
            return f"{self.card.name} needs {', '.join(absent)}; pip install 'vivace[eval]'."
        return ""

    def require(self) -> None:
        """Raises:
        UnavailableError: the metric cannot run here.
        """
        if why := self.missing():
            raise UnavailableError(why)

    def measure(self, clips: torch.Tensor, context: Context) -> dict[str, list[float]]:
        """Values by series, B each. NaN: the question does not apply to that clip. SAMPLE, PAIR and LATENT scopes.

        Raises:
            FrameError: shape, type or range is wrong, or clips and reference differ in shape.
        """
        raise TypeError(f"{self.card.name} compares sets; use features and distance")

    def features(self, clips: torch.Tensor, context: Context) -> np.ndarray:
        """One row for each clip, float64 (B, D). SET scope. Row i depends on clip i alone, so shards can be joined.

        Raises:
            FrameError: shape, type or range is wrong.
        """
        raise TypeError(f"{self.card.name} measures clips one by one; use measure")

    def distance(
        self, reference: np.ndarray, candidate: np.ndarray, groups: Sequence[int], seed: int = 0
    ) -> dict[str, SetValue]:
        """Distance of two tables of features by series. SET scope.

        Args:
            reference, candidate: (N, D) features of paired clips, row i of both from the same prompt and seed.
            groups: N integers, equal for clips of one prompt: the bootstrap resamples groups.
            seed: of the bootstrap and the permutations.
        """
        raise TypeError(f"{self.card.name} measures clips one by one; use measure")


class PairMetric(Metric):
    """Base of PAIR metrics; `pair` gets both clips checked, float32 in [0, 1], on the metric's device."""

    @abstractmethod
    def pair(self, reference: torch.Tensor, clips: torch.Tensor) -> dict[str, list[float]]:
        """Values by series for two `(B, T, H, W, 3)` float32 tensors in [0, 1]."""

    def measure(self, clips: torch.Tensor, context: Context) -> dict[str, list[float]]:
        from vivace.core.errors import ConfigError
        from vivace.evaluation.frames import check_same_shape, unit_clips

        self.require()
        if context.reference is None:
            raise ConfigError(f"{self.card.name} compares pairs; give the reference clips.")
        first = unit_clips(context.reference, "reference clips", self.device)
        second = unit_clips(clips, "clips", self.device)
        check_same_shape(first, second)
        return self.pair(first, second)


class SampleMetric(Metric):
    """Base of SAMPLE metrics; `sample` gets clips checked, float32 in [0, 1], on the metric's device."""

    @abstractmethod
    def sample(self, clips: torch.Tensor, context: Context) -> dict[str, list[float]]:
        """Values by series for a `(B, T, H, W, 3)` float32 tensor in [0, 1]."""

    def measure(self, clips: torch.Tensor, context: Context) -> dict[str, list[float]]:
        from vivace.evaluation.frames import unit_clips

        self.require()
        return self.sample(unit_clips(clips, "clips", self.device), context)


class SetMetric(Metric):
    """Base of SET metrics; `embed` gets clips checked, float32 in [0, 1], on the metric's device."""

    @abstractmethod
    def embed(self, clips: torch.Tensor, context: Context) -> np.ndarray:
        """Features (B, D) of a `(B, T, H, W, 3)` float32 tensor in [0, 1]."""

    @abstractmethod
    def distance(
        self, reference: np.ndarray, candidate: np.ndarray, groups: Sequence[int], seed: int = 0
    ) -> dict[str, SetValue]: ...

    def features(self, clips: torch.Tensor, context: Context) -> np.ndarray:
        from vivace.evaluation.frames import unit_clips

        self.require()
        return self.embed(unit_clips(clips, "clips", self.device), context)


registry: Registry[Metric] = Registry(
    "metric", "vivace.evaluation.metrics", "vivace.evaluation.metrics.base:Metric", "vivace.metrics"
)


def cards(names: Sequence[str] = ()) -> Mapping[str, MetricCard]:
    """The cards of the named metrics, of all when none is named."""
    return {name: registry[name].card for name in (names or registry)}


__all__ = [
    "Backbone",
    "Better",
    "Context",
    "Group",
    "Metric",
    "MetricCard",
    "PairMetric",
    "SampleMetric",
    "Scope",
    "Series",
    "SetMetric",
    "SetValue",
    "Trajectory",
    "cards",
    "registry",
]

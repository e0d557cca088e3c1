"""What `check_metric` measures: rendered clips, their damage, trajectories; and how it compares values."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from vivace.evaluation.metrics.base import Better, Context, Metric, MetricCard, Scope, Series, Trajectory

Values = dict[str, list[float]]
BLURS = (0.8, 1.6, 3.2)
"""Standard deviations in pixels, rising."""
NOISES = (0.02, 0.05, 0.1)
"""Standard deviations, rising, for values in [0, 1]; beyond these a clip is nothing but noise to many networks."""


def rendered(
    count: int, frames: int, height: int, width: int, seed: int = 0
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Clips uint8 `(B, T, H, W, 3)` of the procedural world, and the captions that hold for them."""
    from vivace.world import caption, render, sample_scenes

    seeds = range(seed, seed + count)
    scenes = sample_scenes(seeds)
    clips = render(scenes, frames=frames, height=height, width=width).video
    return clips, tuple(caption(scene.attributes, s) for scene, s in zip(scenes, seeds, strict=True))


def blurred(clips: torch.Tensor, sigma: float) -> torch.Tensor:
    """Float clips in [0, 1], every frame blurred; borders repeated."""
    radius = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float32) / sigma).square())
    taps = taps / taps.sum()
    maps = unit(clips).permute(0, 1, 4, 2, 3)
    flat = F.pad(maps.reshape(-1, 1, *maps.shape[-2:]), (radius,) * 4, mode="replicate")
    flat = F.conv2d(F.conv2d(flat, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))
    return flat.reshape(maps.shape).permute(0, 1, 3, 4, 2).clamp(0, 1).contiguous()


def noisy(clips: torch.Tensor, sigma: float, seed: int = 0) -> torch.Tensor:
    """Float clips in [0, 1] with independent Gaussian noise."""
    generator = torch.Generator().manual_seed(seed)
    return (unit(clips) + sigma * torch.randn(clips.shape, generator=generator)).clamp(0, 1)


def unit(clips: torch.Tensor) -> torch.Tensor:
    """Float32 in [0, 1], by the division that the package uses."""
    return clips.float() / 255.0 if clips.dtype == torch.uint8 else clips.float()


@dataclass
class Material:
    """A metric class and what it is measured on.

    `clips` are uint8 `(B, T, H, W, 3)`, at least three; `prompts` are B.
    """

    metric: type[Metric]
    clips: torch.Tensor
    prompts: tuple[str, ...]
    device: Any = "cpu"
    tolerance: float = 1e-4
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def card(self) -> MetricCard:
        return self.metric.card

    @cached_property
    def one(self) -> Metric:
        """The instance that most checks use."""
        return self.metric(device=self.device)

    @cached_property
    def damaged(self) -> torch.Tensor:
        """The clips with mild noise, uint8: the candidate of most checks."""
        return (noisy(self.clips, 0.06, seed=5) * 255).round().to(torch.uint8)

    @cached_property
    def context(self) -> Context:
        exact, other = trajectories(len(self.clips))
        reference = self.clips if self.card.scope is Scope.PAIR else None
        paths = (exact, other) if self.card.scope is Scope.LATENT else (None, None)
        return Context(
            prompts=self.prompts, reference=reference, reference_trajectory=paths[0], trajectory=paths[1]
        )

    @cached_property
    def candidate(self) -> torch.Tensor:
        """What is measured in most checks: SAMPLE and SET metrics get the clean clips, for which prompts hold."""
        return self.damaged if self.card.scope is Scope.PAIR else self.clips

    @cached_property
    def base(self) -> Values:
        """Values of all clips together."""
        return self.run(self.candidate, self.context)

    def run(self, clips: torch.Tensor, context: Context, metric: Metric | None = None) -> Values:
        """Values by series; for a SET metric the columns of its features."""
        metric = metric or self.one
        if self.card.scope is not Scope.SET:
            return {k: [float(v) for v in column] for k, column in metric.measure(clips, context).items()}
        table = np.asarray(metric.features(clips, context))
        if table.ndim != 2 or len(table) != len(clips):
            raise ValueError(f"features has the shape {table.shape} for {len(clips)} clips")
        return {f"feature {i}": column for i, column in enumerate(table.T.tolist())}

    def rows(self, rows: Sequence[int]) -> tuple[torch.Tensor, Context]:
        """Some of the candidate's clips with what belongs to them."""
        index, context = torch.as_tensor(rows), self.context

        def cut(path: Trajectory | None) -> Trajectory | None:
            return None if path is None else replace(path, latents=path.latents[:, index])

        return self.candidate[index], replace(
            context,
            prompts=tuple(context.prompts[i] for i in rows),
            reference=None if context.reference is None else context.reference[index],
            trajectory=cut(context.trajectory),
            reference_trajectory=cut(context.reference_trajectory),
        )

    def close(self, one: Mapping[str, Sequence[float]], two: Mapping[str, Sequence[float]]) -> str:
        """Where two tables of values differ by more than the tolerance, relative to the column; empty: nowhere."""
        if set(one) != set(two):
            return f"the series differ: {sorted(set(one) ^ set(two))}"
        for name in one:
            a, b = np.asarray(one[name], float), np.asarray(two[name], float)
            if a.shape != b.shape:
                return f"{name} has {a.shape} values against {b.shape}"
            both = np.isfinite(a) & np.isfinite(b)
            odd = ~both & ~((a == b) | (np.isnan(a) & np.isnan(b)))
            scale = max([1e-3, *np.abs(a[both])])
            far = both & (np.abs(np.where(both, a - b, 0.0)) > self.tolerance * scale)
            if (odd | far).any():
                row = int(np.argmax(odd | far))
                return f"{name} of clip {row} is {a[row]:.6g} and {b[row]:.6g}"
        return ""


def trajectories(batch: int) -> tuple[Trajectory, Trajectory]:
    """Two trajectories of `batch` small latents from the same noise, of 6 and of 4 steps."""
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn((batch, 4, 3, 5, 6), generator=generator)
    goal = torch.randn((batch, 4, 3, 5, 6), generator=generator)
    drift = 0.1 * torch.randn((batch, 4, 3, 5, 6), generator=generator)

    def path(steps: int, error: torch.Tensor) -> Trajectory:
        sigmas = tuple(1 - (i + 1) / steps for i in range(steps))
        latents = torch.stack([s * noise + (1 - s) * (goal + error) for s in sigmas])
        return Trajectory(sigmas=sigmas, latents=latents)

    return path(6, torch.zeros_like(drift)), path(4, drift)


def badness(series: Series, values: Sequence[float], clean: Sequence[float] | None) -> float:
    """Mean over clips of how bad a value is: larger is worse. Without `clean` the best value is 0 badness apart."""
    pairs = [
        (v, c)
        for v, c in zip(values, clean if clean is not None else [0.0] * len(values), strict=True)
        if not (math.isnan(v) or math.isnan(c))
    ]
    if not pairs:
        return math.nan
    if series.better is Better.SAME:
        return float(np.mean([abs(v - c) for v, c in pairs]))
    sign = -1.0 if series.better is Better.HIGHER else 1.0
    return float(np.mean([sign * v for v, _ in pairs]))


def frozen_copy(context: Context) -> Context:
    """A deep copy, to tell later whether something was edited."""
    return copy.deepcopy(context)


def same_tensors(one: Any, two: Any) -> bool:
    """Whether two tensors, trajectories or contexts hold the same bits."""
    if isinstance(one, torch.Tensor) or isinstance(two, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, Trajectory) and isinstance(two, Trajectory):
        return one.sigmas == two.sigmas and torch.equal(one.latents, two.latents)
    if isinstance(one, Context) and isinstance(two, Context):
        return all(
            same_tensors(getattr(one, n), getattr(two, n))
            for n in ("prompts", "fps", "reference", "trajectory", "reference_trajectory")
        )
    return one == two


Check = Callable[[Material], Iterator[str]]
CHECKS: dict[str, tuple[Check, bool, frozenset[Scope]]] = {}
"""Checks by name, in order: the function, whether it measures clips, and the scopes it is for."""


def check(name: str, *scopes: Scope, measures: bool = True) -> Callable[[Check], Check]:
    """Registers a check: its name, the scopes it is for (all when none is named), and whether it measures clips."""

    def register(function: Check) -> Check:
        CHECKS[name] = (function, measures, frozenset(scopes or Scope))
        return function

    return register

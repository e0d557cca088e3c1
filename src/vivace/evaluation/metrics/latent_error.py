"""Distance of two trajectories of latents that began with the same noise.

Errors of caches and of low precision arise in the latents and grow from step to step. This metric sees them there and
needs no decoder. Runs with other step counts visit other noise levels, so the reference is interpolated.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from vivace.core.errors import ConfigError
from vivace.evaluation.frames import FrameError
from vivace.evaluation.metrics.base import (
    Better,
    Context,
    Group,
    Metric,
    MetricCard,
    Scope,
    Series,
    Trajectory,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ErrorCurve:
    """Errors after every step of the candidate: `sigmas` (S,), `rel_l2` and `cosine` (S, B) in float64."""

    sigmas: tuple[float, ...]
    rel_l2: torch.Tensor
    cosine: torch.Tensor


class LatentError(Metric):
    """Relative L2 distance and cosine of latents, step by step."""

    card: ClassVar[MetricCard] = MetricCard(
        name="latent_error",
        version=1,
        title="Error of the latents along the trajectory",
        scope=Scope.LATENT,
        group=Group.FIDELITY,
        series=(
            Series(
                name="latent_rel_l2",
                better=Better.LOWER,
                low=0.0,
                about="|candidate - exact| / |exact| after the last step.",
            ),
            Series(
                name="latent_rel_l2_max",
                better=Better.LOWER,
                low=0.0,
                about="The largest of that ratio over the candidate's steps.",
            ),
            Series(
                name="latent_cosine",
                better=Better.HIGHER,
                low=-1.0,
                high=1.0,
                about="Cosine of both latents after the last step.",
            ),
        ),
        convention="Latents after each solver step of one clip, flattened, in float64; the exact trajectory is "
        "interpolated linearly in sigma at the candidate's sigmas and held constant beyond its ends.",
        sees=(),
        blind_to=("everything that the decoder does", "quality of a clip that departs from the reference"),
        symmetric=False,
    )

    def measure(self, clips: torch.Tensor, context: Context) -> dict[str, list[float]]:
        """See `Metric.measure`; clips are not looked at.

        Raises:
            ConfigError: a trajectory is missing.
            FrameError: a trajectory has a wrong shape, or values that are not finite.
        """
        self.require()
        if context.trajectory is None or context.reference_trajectory is None:
            raise ConfigError("latent_error compares trajectories; record the latents of both runs.")
        curve = error_curve(context.reference_trajectory, context.trajectory)
        return {
            "latent_rel_l2": curve.rel_l2[-1].tolist(),
            "latent_rel_l2_max": curve.rel_l2.amax(dim=0).tolist(),
            "latent_cosine": curve.cosine[-1].tolist(),
        }

    def curve(self, context: Context) -> dict[str, list[list[float]]]:
        """Both errors after every step, a row for each clip, and the noise levels of the steps.

        Raises:
            ConfigError: a trajectory is missing.
            FrameError: a trajectory has a wrong shape, or values that are not finite.
        """
        if context.trajectory is None or context.reference_trajectory is None:
            raise ConfigError("latent_error compares trajectories; record the latents of both runs.")
        found = error_curve(context.reference_trajectory, context.trajectory)
        return {
            "sigma": [list(found.sigmas)],
            "latent_rel_l2": found.rel_l2.T.tolist(),
            "latent_cosine": found.cosine.T.tolist(),
        }


def error_curve(reference: Trajectory, candidate: Trajectory) -> ErrorCurve:
    """Errors at every step of the candidate.

    Args:
        reference, candidate: trajectories of the same B clips from the same noise; their step counts may differ.

    Raises:
        FrameError: a trajectory has a wrong shape or values that are not finite, or the clips differ in shape.
    """
    import torch

    _check(reference, "the reference trajectory")
    _check(candidate, "the trajectory")
    if reference.latents.shape[1:] != candidate.latents.shape[1:]:
        raise FrameError(
            f"the latents differ in shape, {tuple(reference.latents.shape[1:])} against "
            f"{tuple(candidate.latents.shape[1:])}; record the same clips at the same size."
        )
    lengths, cosines = [], []
    for step, sigma in enumerate(candidate.sigmas):
        exact = _at(reference, sigma).flatten(1)
        given = candidate.latents[step].double().flatten(1)
        norm, other = exact.norm(dim=1), given.norm(dim=1)
        difference = (given - exact).norm(dim=1)
        # Two latents that are both zero are equal; one alone is infinitely far off.
        lengths.append(torch.where(difference == 0, 0.0, difference / norm))
        product = (exact * given).sum(dim=1) / (norm * other)
        cosines.append(torch.where(difference == 0, 1.0, product).clamp(-1.0, 1.0))
    return ErrorCurve(tuple(candidate.sigmas), torch.stack(lengths), torch.stack(cosines))


def _check(trajectory: Trajectory, name: str) -> None:
    import torch

    sigmas, latents = trajectory.sigmas, trajectory.latents
    if latents.ndim < 3 or 0 in latents.shape or len(sigmas) != len(latents):
        raise FrameError(
            f"{name} must hold latents (S, B, ...) for S sigmas, got {tuple(latents.shape)} for {len(sigmas)}; "
            "record one for each step."
        )
    if not latents.is_floating_point() or not bool(torch.isfinite(latents).all()):
        raise FrameError(f"{name} holds values that are not finite numbers; find the step that broke.")
    if any(a <= b for a, b in pairwise(sigmas)):
        raise FrameError(f"the sigmas of {name} must fall from step to step; record them in order.")


def _at(trajectory: Trajectory, sigma: float) -> torch.Tensor:
    """Latents (B, ...) in float64, interpolated linearly at a noise level."""
    sigmas, latents = trajectory.sigmas, trajectory.latents
    after = next((i for i, s in enumerate(sigmas) if s <= sigma), len(sigmas) - 1)
    low = latents[after].double()
    if after == 0 or sigma <= sigmas[after]:
        return low
    share = (sigma - sigmas[after]) / (sigmas[after - 1] - sigmas[after])
    return low + share * (latents[after - 1].double() - low)

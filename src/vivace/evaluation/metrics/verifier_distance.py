"""Do the clips as a set show what the exact run's clips show?  Distances of the world verifier's features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from vivace.evaluation import two_sample
from vivace.evaluation.metrics.base import (
    Better,
    Context,
    Group,
    MetricCard,
    Scope,
    Series,
    SetMetric,
    SetValue,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from vivace.world.verifier import Verifier

SPREAD = 4.6
"""Root mean square of the features on clips of the world, rounded."""


class VerifierDistance(SetMetric):
    """Kernel and energy distance of the features by which the verifier names objects, colours and motions."""

    card = MetricCard(
        name="verifier_distance",
        version=1,
        title="World distance (kernel and energy, verifier)",
        scope=Scope.SET,
        group=Group.DISTRIBUTION,
        series=(
            Series(
                name="verifier_mmd",
                better=Better.LOWER,
                about="Unbiased squared kernel distance of the verifier's features; 0 when equal, can be below.",
            ),
            Series(
                name="verifier_energy",
                better=Better.LOWER,
                about="Energy distance of the verifier's features; 0 when equal, can be below.",
            ),
        ),
        convention=(
            "Features (192) of vivace.world.verifier on its own grid of 16 frames and 96 pixels, divided by "
            f"{SPREAD}; kernel (x.y/192 + 1)^3, and Euclidean distance / sqrt(192); {two_sample.PROCEDURE} "
            "For square clips of the procedural world alone."
        ),
        sees=("freeze", "shuffle", "there_and_back", "warp_jitter", "wrong_colour"),
        blind_to=("blur", "noise", "flicker", "reverse", "wrong_motion", "wrong_clip"),
        symmetric=True,
    )

    def missing(self) -> str:
        from vivace.world.verifier import WEIGHTS

        if not WEIGHTS.is_file():
            return (
                "the verifier's weights are missing; train them with python -m vivace.world.train_verifier."
            )
        return super().missing()

    @cached_property
    def verifier(self) -> Verifier:
        from vivace.world.verifier import Verifier

        return Verifier.load(device=self.device)

    def embed(self, clips: torch.Tensor, context: Context) -> np.ndarray:
        import torch

        # One by one: the sums of a convolution may be ordered otherwise in a larger batch.
        rows = [self.verifier.features(clip[None]) for clip in clips]
        return torch.cat(rows).double().cpu().numpy() / SPREAD

    def distance(
        self, reference: np.ndarray, candidate: np.ndarray, groups: Sequence[int], seed: int = 0
    ) -> dict[str, SetValue]:
        x, y, numbers = two_sample.paired_tables(reference, candidate, groups)
        width = x.shape[1] ** 0.5
        kernel = two_sample.pairs(x, y, two_sample.polynomial_kernel)
        energy = two_sample.pairs(x / width, y / width, two_sample.distance_kernel)
        return {
            "verifier_mmd": two_sample.compare_sets(kernel, numbers, seed),
            "verifier_energy": two_sample.compare_sets(energy, numbers, seed),
        }

"""Attribute accuracy: what a prompt of the embedded world states, looked up in the clip by the world's verifier."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.core.errors import WeightsError
from vivace.evaluation.metrics.base import (
    Backbone,
    Better,
    Context,
    Group,
    MetricCard,
    SampleMetric,
    Scope,
    Series,
)

if TYPE_CHECKING:
    import torch

    from vivace.world.verifier import Verifier

WEIGHTS = Path(__file__).parents[2] / "world" / "weights" / "verifier.safetensors"
ATTRIBUTES = ("object", "count", "colour", "size", "motion", "floor", "camera")
MARGIN = 0.02


def _series() -> tuple[Series, ...]:
    higher = {"better": Better.HIGHER, "low": 0.0, "high": 1.0}
    each = tuple(
        Series(
            name=f"attribute_{name}",
            binary=True,
            about=f"Whether the {name} is as the prompt states; empty where it states none.",
            **higher,
        )
        for name in ATTRIBUTES
    )
    mean = Series(
        name="attributes",
        margin=MARGIN,
        about="Share of the stated attributes that the verifier sees in the clip.",
        **higher,
    )
    every = Series(
        name="all_attributes",
        binary=True,
        about="Whether every stated attribute is seen.",
        **higher,
    )
    return (mean, every, *each)


def _backbone() -> Backbone:
    # Hashed here and not written down: weights trained anew are another backbone, whoever forgets to say so.
    known = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() if WEIGHTS.is_file() else ""
    return Backbone(
        name="verifier of the embedded world",
        sha256=known,
        licence="that of Vivace",
        source="vivace.world.verifier",
    )


class Attributes(SampleMetric):
    """Attribute accuracy per clip, with one binary column for each kind of attribute."""

    card: ClassVar[MetricCard] = MetricCard(
        name="attributes",
        version=1,
        title="Attribute accuracy",
        scope=Scope.SAMPLE,
        group=Group.ABSOLUTE,
        series=_series(),
        convention="What the prompt states of object, count, colour, size, motion, floor and camera, against the "
        "classes that the packaged verifier sees in 16 frames at 96 pixels; colour and size hold only if "
        "they are right for every object they are stated of; plain mean over the attributes that this "
        "prompt states.",
        sees=(
            "freeze",
            "shuffle",
            "reverse",
            "there_and_back",
            "wrong_motion",
            "wrong_clip",
            "wrong_colour",
        ),
        blind_to=(
            "stutter",
            "flicker",
            "blur",
            "noise",
            "colour_shift",
            "colour_drift",
            "warp_jitter",
        ),
        packages=("safetensors",),
        backbone=_backbone(),
    )

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__(device)
        self._verifier: Verifier | None = None

    def missing(self) -> str:
        if why := super().missing():
            return why
        try:
            self._load()
        except WeightsError as error:
            return str(error)
        return ""

    def sample(self, clips: torch.Tensor, context: Context) -> dict[str, list[float]]:
        """Raises:
        ShapeError: the clips are not square, their sides are not divisible by 16, or they are shorter than 9 frames.
        """
        from vivace.world import parse_prompt

        columns: dict[str, list[float]] = {s.name: [] for s in self.card.series}
        for seen, prompt in zip(self._load().verify(clips), _prompts(clips, context), strict=True):
            matches = seen.matches(parse_prompt(prompt))
            for name in ATTRIBUTES:
                columns[f"attribute_{name}"].append(float(matches[name]) if name in matches else math.nan)
            columns["attributes"].append(sum(matches.values()) / len(matches) if matches else math.nan)
            columns["all_attributes"].append(float(all(matches.values())) if matches else math.nan)
        return columns

    def _load(self) -> Verifier:
        if self._verifier is None:
            from vivace.world.verifier import Verifier

            self._verifier = Verifier.load(WEIGHTS, self.device)
        return self._verifier


def _prompts(clips: torch.Tensor, context: Context) -> tuple[str, ...]:
    from vivace.core.errors import ConfigError

    if len(context.prompts) != len(clips):
        raise ConfigError(
            f"attributes needs one prompt a clip, got {len(context.prompts)} for {len(clips)} clips."
        )
    return context.prompts

"""The contract of metrics: `check_metric` says in sentences what is wrong with one.

    assert check_metric(MyMetric) == []

Every check has a name, and each sentence begins with it. Where a metric cannot run here (`missing` gives a reason),
only its card and the way it refuses are checked.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from vivace.core.errors import ConfigError, UnknownNameError
from vivace.evaluation.metrics.base import Metric, MetricCard
from vivace.testing import metric_card_checks, metric_value_checks  # noqa: F401  they register their checks
from vivace.testing.metric_material import CHECKS, Material, rendered

_SHAPE = (4, 8, 48, 64)
"""Clips, frames, height, width of the default clips; sides that differ show swapped axes."""


def check_metric(
    metric: type[Metric],
    *,
    device: Any = "cpu",
    clips: torch.Tensor | None = None,
    prompts: Sequence[str] = (),
    only: Collection[str] = (),
    tolerance: float = 1e-4,
) -> list[str]:
    """What is wrong with a metric; empty when nothing is.

    Args:
        metric: the class; it must take `device` alone.
        device: where its networks run.
        clips: uint8 `(B, T, H, W, 3)`, B >= 3, with `prompts`, B of them; small renders, not square, when left out.
        only: names of checks (`metric_checks()`); all when empty.
        tolerance: largest difference of values that ought to be equal, relative to the series' values.

    Raises:
        UnknownNameError: no check has a name in `only`.
        ConfigError: there are fewer than three clips.
    """
    for name in only:
        if name not in CHECKS:
            raise UnknownNameError("check of metrics", name, CHECKS)
    if clips is None:
        clips, prompts = rendered(*_SHAPE)
    if len(clips) < 3 or len(prompts) not in (0, len(clips)):
        raise ConfigError("check_metric needs at least three clips, and one prompt for each.")
    if not isinstance(getattr(metric, "card", None), MetricCard):
        return ["card: the class has none."]
    case = Material(metric, clips, tuple(prompts) or ("",) * len(clips), device, tolerance)
    found: list[str] = []
    for name, (function, measures, scopes) in CHECKS.items():
        if (only and name not in only) or case.card.scope not in scopes:
            continue
        # A broken metric can raise anything, and the next check may still tell something.
        try:
            if not measures or not case.one.missing():
                found += [f"{name}: {sentence}" for sentence in function(case)]
        except Exception as error:
            found.append(f"{name}: raised {type(error).__name__} ({error}).")
    return found


def metric_checks() -> tuple[str, ...]:
    """Names of the checks, in order."""
    return tuple(CHECKS)

"""What of the prompt a clip of the embedded world shows, as the world's verifier sees it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vivace.core.errors import ShapeError, WeightsError

if TYPE_CHECKING:
    import numpy as np

    from vivace.cli.shared.run import Job
    from vivace.report.compare_page import AttributeCheck
    from vivace.world.attributes import Attributes
    from vivace.world.verifier import Prediction

NOTHING = "none"


def missing() -> str:
    """Why no clip can be checked here; empty when the verifier is there and intact."""
    from vivace.world.verifier import Verifier

    try:
        Verifier.load()
    except WeightsError as error:
        return str(error)
    return ""


def attribute_checks(job: Job, exact: np.ndarray, fast: np.ndarray) -> tuple[tuple[AttributeCheck, ...], str]:
    """Every attribute as wanted and as seen in both clips, uint8 (T, H, W, 3); or nothing, and the reason."""
    if not job.embedded:
        return (), "attributes are checked for the embedded model only, whose world is known"
    import torch

    from vivace.world import parse_prompt
    from vivace.world.verifier import Verifier

    try:
        seen = Verifier.load().verify(torch.stack([torch.from_numpy(clip) for clip in (exact, fast)]))
    except (WeightsError, ShapeError) as error:
        return (), str(error)
    return _checks(parse_prompt(job.request.prompt), *seen), ""


def _checks(wanted: Attributes, exact: Prediction, fast: Prediction) -> tuple[AttributeCheck, ...]:
    """One check per attribute of the verifier, in its own grouping, so that these counts are its accuracy."""
    from vivace.report.compare_page import AttributeCheck
    from vivace.world.verifier import ATTRIBUTES

    asked, shown = _wanted(wanted), [_seen(wanted, p) for p in (exact, fast)]
    return tuple(
        AttributeCheck(name=name, wanted=asked.get(name), exact=shown[0][name], fast=shown[1][name])
        for name in ATTRIBUTES
    )


def _wanted(wanted: Attributes) -> dict[str, str]:
    """What the prompt states, as text by attribute."""
    out = {n: value for n in ("motion", "floor", "camera") if (value := getattr(wanted, n)) is not None}
    if wanted.objects:
        out["object"] = _shapes(str(spec.shape) for spec in wanted.objects)
        out["count"] = str(wanted.count)
    for kind in ("colour", "size"):
        if said := [f"{value} {spec.shape}" for spec in wanted.objects if (value := getattr(spec, kind))]:
            out[kind] = ", ".join(said)
    return out


def _seen(wanted: Attributes, seen: Prediction) -> dict[str, str]:
    """What the verifier saw, as text that equals the wanted text when, and only when, it is right.

    Colours and sizes are told of the objects of which the prompt states one; of all where it states none.
    """
    out = {n: getattr(seen, n) for n in ("motion", "floor", "camera")}
    out |= {"object": _shapes(seen.objects), "count": str(seen.count)}
    for place, kind in enumerate(("colour", "size")):
        asked = [str(spec.shape) for spec in wanted.objects if getattr(spec, kind) is not None]
        told = [
            f"{seen.objects[shape][place]} {shape}" if shape in seen.objects else f"no {shape}"
            for shape in asked or sorted(seen.objects)
        ]
        out[kind] = ", ".join(told) or NOTHING
    return out


def _shapes(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names))) or NOTHING

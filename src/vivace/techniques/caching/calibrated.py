"""What signal-driven caches take from a calibration artefact: the file is read when a plan is checked or applied."""

from __future__ import annotations

from vivace.calibration.artifact import Calibration
from vivace.core.errors import ConfigError
from vivace.models.adapter import ModelDescription


def complaint(path: str, model: ModelDescription) -> str | None:
    """Why the calibration at `path` cannot serve a model; None when it can."""
    try:
        found = Calibration.load(path)
    except ConfigError as error:
        return str(error)
    if found.key.family != model.family:
        made_for = found.key.family
        return f"the calibration {path} was made for the family {made_for}, and {model.name} is of {model.family}."
    missing = [e.name for e in model.experts if "cond" not in found.curves.get(e.name, {})]
    if missing:
        return f"the calibration {path} holds no conditional curves of {', '.join(missing)}; make it for this model."
    return None


def polynomials(path: str) -> dict[str, tuple[float, ...]]:
    """Expert -> TeaCache's polynomial (highest power first), of the conditional branch.

    Raises:
        ConfigError: the file cannot be read.
    """
    found = Calibration.load(path)
    return {expert: tuple(c["cond"].tea_polynomial) for expert, c in found.curves.items() if "cond" in c}


def ratios(path: str) -> tuple[float, ...]:
    """MagCache's ratios |r_t| / |r_(t-1)| over all steps, of the conditional branch.

    Raises:
        ConfigError: the file cannot be read, or holds no conditional branch.
    """
    return tuple(Calibration.load(path).joined("cond", "residual_ratio"))

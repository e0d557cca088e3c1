"""The recipes by name; each is one page."""

from __future__ import annotations

from vivace.core.errors import ConfigError
from vivace.training.distillation.recipe import Recipe
from vivace.training.distillation.recipes.adversarial import Adversarial
from vivace.training.distillation.recipes.consistency import Consistency, DualConsistency, PhasedConsistency
from vivace.training.distillation.recipes.continuous import ContinuousConsistency, RegularisedConsistency
from vivace.training.distillation.recipes.dmd import (
    DistributionMatching,
    PhasedMatching,
    RewardedMatching,
    TrajectoryMatching,
)
from vivace.training.distillation.recipes.flow_map import AnyStep, MeanFlow
from vivace.training.distillation.recipes.regression import Guidance, PiecewiseFlow, Progressive, Reflow

RECIPES: dict[str, type[Recipe]] = {
    recipe.name: recipe
    for recipe in (
        Consistency,
        PhasedConsistency,
        DualConsistency,
        ContinuousConsistency,
        RegularisedConsistency,
        DistributionMatching,
        RewardedMatching,
        TrajectoryMatching,
        PhasedMatching,
        Adversarial,
        MeanFlow,
        AnyStep,
        Progressive,
        Guidance,
        Reflow,
        PiecewiseFlow,
    )
}


def find(name: str) -> type[Recipe]:
    """The recipe of a name.

    Raises:
        ConfigError: there is none; the sentence lists them.
    """
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe '{name}'; choose one of {', '.join(RECIPES)}.")
    return RECIPES[name]

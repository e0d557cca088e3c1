"""What a distillation would take: memory by part, floating-point operations and time of an update, before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from vivace.models.adapter import ModelDescription, Workload
from vivace.training.distillation.recipe import Recipe
from vivace.training.distillation.recipes.dmd import DistributionMatching

GIB = 1024**3
MFU = 0.35
"""Share of the peak that updates are expected to reach."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by part, and FLOPs of an update in one process.

    `forward_flops` is of one clip through the transformer. Activations count what one block keeps for its backward pass
    (all blocks without checkpointing), a multiple of its tokens.
    """

    parts: dict[str, float]
    flops: float
    forward_flops: float

    @property
    def bytes(self) -> float:
        """In all."""
        return sum(self.parts.values())

    def seconds(self, peak_flops: float) -> float:
        """Of an update on a device with so many FLOP/s."""
        return self.flops / (MFU * peak_flops)


def estimate(
    model: ModelDescription,
    recipe: Recipe,
    workload: Workload,
    *,
    parameters: float,
    blocks: int,
    width: int,
    ffn: int,
    tokens: int,
    batch: int,
    lora: int = 0,
    checkpointing: bool = False,
    low: int = 2,
) -> Estimate:
    """Memory and work of an update.

    Args:
        parameters: of the transformer. blocks, width, ffn: of it. tokens: of a clip.
        low: bytes of a value in the teacher and in activations.
    """
    learners = 1 + ("critic" in recipe.roles)
    trained = parameters if not lora else 2.0 * lora * blocks * (8 * 2 * width + 2 * (width + ffn)) / 2.0
    parts = {
        "teacher": low * parameters,
        "student and critic": learners * 4.0 * parameters,
        "gradients": learners * 4.0 * trained,
        "optimizers": learners * 8.0 * trained,
        "averaged weights": 4.0 * trained,
    }
    # Of a block: norms, queries, keys, values, attention's output, both feed-forward halves; by hand from the graph.
    block = low * tokens * batch * (16.0 * width + 2.0 * ffn)
    kept = low * tokens * batch * width * blocks if checkpointing else 0.0
    parts["activations"] = kept + block * (1 if checkpointing else blocks)
    forward = 2.0 * parameters * tokens + 4.0 * blocks * tokens**2 * width
    again = 1.0 if checkpointing else 0.0
    calls = _calls(recipe, again)
    return Estimate(parts, forward * batch * calls, forward)


def _calls(recipe: Recipe, again: float) -> float:
    """Forward passes of an update, a backward pass being two, on the mean over updates."""
    train = 3.0 + again
    teacher = 2.0
    if "critic" not in recipe.roles:
        return train + teacher
    ratio = float(getattr(recipe, "ratio", 1))
    simulated = (recipe.steps - 1) / 2.0
    judged = 2.0 if isinstance(recipe, DistributionMatching) and recipe.gan else 1.0
    critic = simulated + 1.0 + judged * train
    return critic + (simulated + train + teacher + 1.0 + (train if judged > 1.0 else 0.0)) / ratio

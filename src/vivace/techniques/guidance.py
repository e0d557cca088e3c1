"""What techniques share that leave out unconditional evaluations: running one branch of a fused pair, and the price.

Legend: c is the conditional prediction, u the unconditional one, d = c - u. All are (B, C, T, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vivace.core.context import COND
from vivace.core.shapes import Workload
from vivace.models.adapter import Guidance, ModelDescription, RootCall
from vivace.techniques.base import Estimate, Target

if TYPE_CHECKING:
    import torch

Run = Callable[[RootCall], "torch.Tensor"]


def conditional_half(target: Target, call: RootCall, run: Run) -> torch.Tensor:
    """c of a fused pair [u, c] (2B rows), from an evaluation of the second half alone."""
    with target.clock.narrowed(COND):
        return run(call.select(call.rows // 2, call.rows))


def difference(cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """d in float32, so that u = c - d loses nothing to bfloat16."""
    return cond.float() - uncond.float()


def unconditional(cond: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """u = c - d, in the type of c."""
    return (cond.float() - delta).to(cond.dtype)


def skipped(target: Target, name: str, amount: float = 1.0) -> None:
    """Tell the receipt that `amount` of the unconditional evaluation under way is not run."""
    target.report(name, "evaluations_skipped", amount)
    if (evaluation := target.clock.evaluation) is not None:
        evaluation.mark(name)


def without(
    model: ModelDescription, workload: Workload, base: Estimate, least: float, most: float
) -> Estimate:
    """The exact run's estimate `base` with a share of its unconditional evaluations, `least` to `most`, left out.

    Exact in FLOPs where both branches have texts of one length, which joint attention of separate calls need not have.
    """
    if base.nfe[0] < 2 * workload.steps:
        return base
    out = base.scaled(1.0 - most / 2, 1.0 - least / 2, fields=("nfe", "blocks_run"))
    grid, share = model.grid(workload), 0.5
    if model.guidance is Guidance.SEPARATE and grid is not None and grid.text:
        # A branch costs at least what its video tokens cost, and at most what it costs with all text tokens.
        share = 1.0 / (1.0 + (grid.tokens / grid.video) ** 2)
    return out.scaled(1.0 - most * (1.0 - share), 1.0 - least * share, fields=("attention_pairs", "flops"))

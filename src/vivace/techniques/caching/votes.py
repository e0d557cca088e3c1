"""Whose word counts: agreement over the ranks of a context-parallel group, and what a quantised network allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vivace.models.adapter import Expert

if TYPE_CHECKING:
    import torch


class Council:
    """One decision for all ranks that hold parts of the same sample.

    Each rank sees its own tokens, so its relative changes differ; without agreement some ranks would skip and others
    wait for them for ever. Ranks agree on the mean of their values.
    """

    def __init__(self, expert: Expert) -> None:
        self._module = expert.module

    @property
    def group(self) -> Any:
        """The process group over which tokens are split; None when they are not."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return None
        parallel = getattr(self._module, "_parallel_config", None)
        context = getattr(parallel, "context_parallel_config", None)
        mesh = getattr(context, "_flattened_mesh", None)
        return None if mesh is None else mesh.get_group()

    def agree(self, values: torch.Tensor) -> torch.Tensor:
        """The ranks' mean of `values` (n,)."""
        group = self.group
        return values if group is None else mean_over(values, group)


def mean_over(values: torch.Tensor, group: Any) -> torch.Tensor:
    """Mean of a tensor over the ranks of a process group."""
    import torch.distributed as dist

    total = values.clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


def quantised(expert: Expert) -> bool:
    """Whether linears of the network hold quantised weights or quantise their input."""
    import torch

    for site in expert.linears:
        module = site.module
        weight = getattr(module, "weight", None)
        if getattr(module, "counts_as_linear", False) or type(weight) not in (
            torch.Tensor,
            torch.nn.Parameter,
        ):
            return True
        if not weight.is_floating_point():  # type: ignore[union-attr]
            return True
    return False

"""Weights spread over processes (FSDP2), for models whose optimizer does not fit into one GPU.

`torch.distributed.fsdp.fully_shard` (FSDP: arXiv 2304.11277) replaces every parameter of a module by its part in this
process, a `DTensor`, gathers a block's weights just before the block runs, and averages gradients as the backward pass
leaves it. It is taken from torch itself, without Accelerate or Fabric around it: a distillation has one optimizer for
each role and takes turns, its checkpoints must say all and be taken up bit for bit, also by another number of shards,
and the loop is ours; a wrapper that owns loop, optimizer and checkpoint allows none of these.

Everything that leaves (checkpoints, student files) is whole tensors on the CPU, gathered one at a time, and everything
that comes back is cut in each process without communication. So sharded and plain runs have one format.

What cannot be: forward-mode derivatives, as they need the weights outside of the module's own call
(`derivative="difference"` can), and compiled blocks in one graph (they are compiled in pieces around the gathering).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vivace.core.errors import ConfigError
from vivace.tiny.train.common import Processes


def shard(module: nn.Module, processes: Processes, lists: Iterable[str] = ()) -> nn.Module:
    """Spread a module over all processes, in place: every block by itself, then the rest; returns it.

    Each process must have the same weights. Those that are on the CPU are moved to the device as they are spread, so
    that the whole never lies on one GPU. Compile blocks before.

    Args:
        module: a transformer, or something without blocks.
        processes: all of those that joined.
        lists: attributes that hold blocks.

    Raises:
        ConfigError: this process is alone.
    """
    if processes.world < 2:
        raise ConfigError("one process has nobody to share weights with; start more with torchrun.")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.world,))
    # Also the root is resharded after each call: its gathered weights would outlive a change of the parts, as when
    # averaged weights are put in for a validation.
    for name in lists:
        for block in getattr(module, name):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module


def sharded(module: nn.Module) -> bool:
    """Whether a module's parameters are spread."""
    return any(_is_part(p) for p in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory; the tensor itself where it is not spread."""
    return tensor._local_tensor if _is_part(tensor) else tensor.detach()  # pyright: ignore[reportAttributeAccessIssue]


def whole(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """A detached tensor in full; every process must ask.

    Args:
        tensor: spread or not.
        like: how it is spread, where the tensor is this process's part alone.
    """
    tensor = tensor.detach()
    if like is not None and _is_part(like) and not _is_part(tensor):
        from torch.distributed.tensor import DTensor

        at: Any = like
        tensor = DTensor.from_local(
            tensor, at.device_mesh, at.placements, run_check=False, shape=at.shape, stride=at.stride()
        )
    return tensor.full_tensor() if _is_part(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def cut(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as a parameter is: on its device, and spread where it is; each process takes its own part."""
    value = value.to(like.device)
    if not _is_part(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    at: Any = like
    return distribute_tensor(value, at.device_mesh, at.placements, src_data_rank=None)


def put(parameter: Tensor, value: Tensor) -> None:
    """Write a whole tensor into a parameter or its part, in place: who shares the memory sees it."""
    with torch.no_grad():
        local(parameter).copy_(local(cut(value, parameter)))


def clip(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale gradients down to a norm of at most `largest`, over all of them, spread or not; returns the norm before."""
    some = [p for p in parameters if p.grad is not None]
    groups = [[p for p in some if _is_part(p)], [p for p in some if not _is_part(p)]]
    norms = [whole(nn.utils.get_total_norm([p.grad for p in g if p.grad is not None])) for g in groups if g]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, largest, norm)
    return norm.detach()


def kept(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """As `whole`, for what is saved: of a spread tensor on the CPU, and nothing in processes that do not lead."""
    full = whole(tensor, like)
    if not (_is_part(tensor) or (like is not None and _is_part(like))):
        return full
    return full.cpu() if dist.get_rank() == 0 else full.new_empty(0)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict in full, on the CPU; all processes must ask, and only the leader gets it where spread."""
    found = {name: kept(value).to("cpu", copy=True) for name, value in module.state_dict().items()}
    return {} if sharded(module) and dist.get_rank() != 0 else found


def whole_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state dict in full; all processes must ask, and only the leader gets it where spread."""
    state = optimizer.state_dict()
    entries = {
        number: {k: kept(v) if isinstance(v, Tensor) else v for k, v in entry.items()}
        for number, entry in state["state"].items()
    }
    return state | {"state": entries}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Inverse of `whole_optimizer`; values that have a parameter's shape are cut as it is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {}
    for number, entry in state["state"].items():
        own = parameters[number]
        entries[number] = {
            k: cut(v, own) if isinstance(v, Tensor) and v.shape == own.shape and k != "step" else v
            for k, v in entry.items()
        }
    optimizer.load_state_dict(state | {"state": entries})


def _is_part(tensor: Any) -> bool:
    # Where nobody has loaded it, and that takes half a second, nothing can be spread.
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)

"""What is done to the weights of a distillation's networks: LoRA layers, copies that share, whole states in and out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vivace.models.student import low_rank
from vivace.training.distillation.sharding import local, put, whole_state

BASE, LORA = ".base_layer.", ".lora_"
"""In the names of peft's layers."""


def tied(module: Any) -> Any:
    """A copy of a module whose parameters are the module's own, without what is compiled."""
    parameters = dict(module.named_parameters())
    twin = copy.deepcopy(module, {id(p): p for p in parameters.values()})
    for part in twin.modules():
        part._compiled_call_impl = None
    return twin


def add_lora(module: Any, rank: int) -> None:
    """LoRA layers (arXiv 2106.09685) on all linear layers of the blocks; the rest is frozen. Starts without effect."""
    from peft import LoraConfig

    names = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and any(piece.isdigit() for piece in name.split("."))
    ]
    module.requires_grad_(False)
    module.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights=True))


def merged_state(module: Any) -> dict[str, Tensor]:
    """A network's whole state dict on the CPU, LoRA layers added into their weights, names as without them.

    Every process must ask where weights are spread; all but the leader then get nothing.
    """
    found = whole_state(module)
    if not found:
        return {}
    state = {k.replace(BASE, "."): v for k, v in found.items() if LORA not in k}
    for name, scale in _lora_layers(module).items():
        down, up = found[f"{name}{LORA}A.default.weight"], found[f"{name}{LORA}B.default.weight"]
        state[f"{name}.weight"] = state[f"{name}.weight"] + scale * (up @ down)
    return state


def wear(module: Any, tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Write whole tensors, with the names of `merged_state`, into a network; returns names that it does not have.

    LoRA layers are put back to no effect.
    """
    own = {k.replace(BASE, "."): v for k, v in module.state_dict().items() if LORA not in k}
    strange = set()
    for name, value in tensors:
        if name in own:
            put(own[name], value.to(own[name].dtype))
        else:
            strange.add(name)
    for name, parameter in module.named_parameters():
        if f"{LORA}B." in name:
            with torch.no_grad():
                local(parameter).zero_()
    return strange


def take_up(module: Any, student: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Move what a worn student adds to its base from the weights into the LoRA layers, as far as their rank reaches.

    The network computes what it did. What it then learns stays within the same rank, so that a file of that rank holds
    all of it; layers that start anew on top of the weights would need twice the rank.

    Args:
        module: has LoRA layers without effect and the student's weights.
        student, base: whole weights by name, as in `merged_state`.
    """
    own = dict(module.named_parameters())
    for name, scale in _lora_layers(module).items():
        if f"{name}.weight" not in base:
            continue
        weight = student[f"{name}.weight"].float()
        delta = weight - base[f"{name}.weight"].to(weight.device).float()
        if not delta.any():
            continue  # layers that start from zero need their random half
        a = own[f"{name}{LORA}A.default.weight"]
        up, down = low_rank(delta, a.shape[0])
        for target, value in (
            (a, down),
            (own[f"{name}{LORA}B.default.weight"], up / scale),
            (own[f"{name}{BASE}weight"], weight - up @ down),
        ):
            put(target, value.to(target.dtype))


def _lora_layers(module: Any) -> dict[str, float]:
    """Names of the linear layers with LoRA, and the factors of their products."""
    from peft.tuners.lora import Linear

    return {
        name: float(part.scaling["default"])
        for name, part in module.named_modules()
        if isinstance(part, Linear)
    }


def lower(module: Any) -> None:
    """Weights to bf16, but for those that the class keeps in float32, as diffusers loads them."""
    kept = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not any(k in name.split(".") for k in kept):
            tensor.data = tensor.data.bfloat16()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators start from a seed while the block lasts, and are then as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products without TF32 while the block lasts, whose ten bits leave nothing of a small difference."""
    kinds: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [kind.allow_tf32 for kind in kinds]
    try:
        for kind in kinds:
            kind.allow_tf32 = False
        yield
    finally:
        for kind, value in zip(kinds, before, strict=True):
            kind.allow_tf32 = value

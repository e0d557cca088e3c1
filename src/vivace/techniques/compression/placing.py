"""What the placement techniques share: the device that computes, components, and tensors that come back in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vivace.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
NO_DEVICE = (
    "weights wait in main memory, and this machine computes there too (no GPU is visible), so nothing would be saved; "
    "leave it out."
)


def accelerator(device: str) -> torch.device | None:
    """The device that computes: the named one, or this machine's GPU; None where there is none."""
    import torch

    if device == AUTO:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    return torch.device(device)


def device_complaint(device: str) -> str:
    """What is wrong with a device setting on this machine; empty for nothing."""
    import torch

    if device == AUTO:
        return "" if torch.cuda.is_available() else NO_DEVICE
    try:
        kind = torch.device(device).type
    except RuntimeError:
        return f"'{device}' is no device; write auto, or a name such as cuda:0."
    if kind == "cuda" and not torch.cuda.is_available():
        return f"there is no {device} on this machine; leave device at auto."
    return ""


def components(pipeline: Any) -> dict[str, Any]:
    """The pipeline's modules by name, in the order in which they run.

    Raises:
        ConfigError: somebody else has placed one of them already.
    """
    from torch import nn

    found = {k: v for k, v in pipeline.components.items() if isinstance(v, nn.Module)}
    for name, module in found.items():
        if by := _placed_by(module):
            raise ConfigError(
                f"{name} is placed by {by} already; undo that (pipeline.remove_all_hooks(), or load it again) "
                "or leave the placement technique out."
            )
    order = [n for n in (getattr(pipeline, "model_cpu_offload_seq", None) or "").split("->") if n in found]
    return {n: found[n] for n in (*order, *(n for n in found if n not in order))}


def _placed_by(module: Any) -> str:
    """Who has put hooks that move weights on a module or inside of it; empty for nobody."""
    for part in module.modules():
        if hasattr(part, "_hf_hook"):
            return "accelerate's hooks"
        registry = vars(part).get("_diffusers_hook")
        if registry is not None and any("offload" in name for name in registry.hooks):
            return "diffusers' group offloading"
    return "a device map" if getattr(module, "hf_device_map", None) else ""


def entries(name: str, module: Any) -> tuple[str, ...]:
    """Methods by which a pipeline enters a component."""
    return ("forward", *(m for m in ("encode", "decode") if name.startswith("vae") and hasattr(module, m)))


def putting_back(module: Any) -> Callable[[], None]:
    """A function that puts every tensor of a module back on the device where it is now, as the same object."""
    places = [(t, t.device) for t in (*module.parameters(), *module.buffers())]
    buffers = [(m._buffers, key, t) for m in module.modules() for key, t in m._buffers.items()]

    def put() -> None:
        for tensor, device in places:
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
        for home, key, tensor in buffers:
            home[key] = tensor

    return put


def blocks_of(module: Any) -> list[Any]:
    """The blocks of a component: the modules of its longest list; none for a component without one."""
    from torch import nn

    lists = [list(m) for m in module.modules() if isinstance(m, nn.ModuleList)]
    longest = max(lists, key=len, default=[])
    return longest if len(longest) > 1 else []


def owned(modules: list[Any], taken: set[int]) -> tuple[list[Any], list[Any]]:
    """Parameters and buffers held directly by modules, each once and not those in `taken`, which grows by them."""
    parameters, buffers = [], []
    for module in modules:
        for home, out in ((module._parameters, parameters), (module._buffers, buffers)):
            for tensor in home.values():
                if tensor is not None and tensor.numel() and id(tensor) not in taken:
                    taken.add(id(tensor))
                    out.append(tensor)
    return parameters, buffers


def tied(module: Any) -> list[Any]:
    """Parameters that several modules hold (a tied embedding): there is no one call before which they are needed."""
    seen: set[int] = set()
    out: dict[int, Any] = {}
    for part in module.modules():
        for tensor in part._parameters.values():
            if tensor is not None and id(tensor) in seen:
                out[id(tensor)] = tensor
            seen.add(id(tensor))
    return list(out.values())

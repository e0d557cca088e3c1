"""Saving a transformer with quantised linear layers, and building it again from the file.

    with accelerate(pipeline, Plan([QuantizedLinear(weights="int4", group=64)])):
        save_quantized(pipeline.transformer, "transformer-int4.safetensors")
    pipeline.transformer = load_quantized("transformer-int4.safetensors")

The file is safetensors: codes, scales, branches and what was not quantised, as they are, with the configuration and the
recipes in its head. Loading builds the model without storage, puts quantised layers in their places and then fills
tensor by tensor, so that weights in full precision are at no time in memory. Original weights that a session keeps for
full steps are not saved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vivace.core.errors import WeightsError
from vivace.kernels.api import AUTO, select
from vivace.kernels.quant_linear.spec import OP, Recipe, layer_class

FORMAT, VERSION = "vivace-quantized", "1"
_KEPT = ".original"


def save_quantized(transformer: Any, path: str | Path) -> Path:
    """Write a transformer some of whose linears are `QuantLinear`.

    Args:
        transformer: a diffusers model, with a `config`.
        path: the file; folders are made.

    Raises:
        WeightsError: no layer is quantised, or a tensor is not in memory.
    """
    from safetensors.torch import save_file

    from vivace.kernels.quant_linear.layer import QuantLinear

    layers = {
        name: {
            "recipe": module.recipe.to_dict(),
            "sizes": [module.in_features, module.out_features],
            "smoothed": module.smooth is not None,
            "branch": str(module.down.weight.dtype) if module.down is not None else "",
            "bias": module.bias is not None,
        }
        for name, module in transformer.named_modules()
        if isinstance(module, QuantLinear)
    }
    if not layers:
        raise WeightsError(
            f"{type(transformer).__name__} has no quantised layer; save it inside the session."
        )
    kept = {name + _KEPT for name in layers}
    tensors = {k: v.detach().contiguous() for k, v in transformer.state_dict().items() if k not in kept}
    if missing := next((k for k, v in tensors.items() if v.is_meta or not v.numel()), None):
        raise WeightsError(f"{missing} is not in memory (offloaded?), so it cannot be saved.")
    config = {k: v for k, v in dict(transformer.config).items() if k != "_name_or_path"}
    head = {
        "format": FORMAT,
        "version": VERSION,
        "class": type(transformer).__name__,
        "config": json.dumps(config),
        "layers": json.dumps(layers),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, head)
    return path


def load_quantized(path: str | Path, *, device: str = "cpu", backend: str = AUTO) -> Any:
    """The transformer of a file, in eval mode.

    Args:
        device: where its tensors go, one by one.
        backend: kernel by name (`vivace.kernels.quant_linear`), or `auto` for the first that fits each recipe there.

    Raises:
        WeightsError: the file is not there or something else, or lacks tensors; the sentence names what.
        ConfigError: the backend cannot run here.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise WeightsError(f"there is no file {path}; write one with save_quantized.")
    try:
        with safe_open(path, "pt", device=device) as reader:
            head = reader.metadata() or {}
            if head.get("format") != FORMAT or head.get("version") != VERSION:
                raise WeightsError(f"{path} holds no quantised transformer of version {VERSION}.")
            model = _empty(head, device, backend)
            for name in reader.keys():  # noqa: SIM118  # a reader, not a dictionary
                _put(model, name, reader.get_tensor(name), path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} cannot be read as a quantised transformer ({error}).") from None
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if lacking := next((name for name, t in tensors.items() if t.is_meta), None):
        raise WeightsError(f"{path} lacks {lacking}; it is incomplete.")
    # What is computed and not stored (positions, rotations) was made on the CPU.
    return model.to(device).eval()


def _empty(head: Mapping[str, str], device: str, backend: str) -> Any:
    """The model of a head, its parameters on the meta device, with quantised layers in their places."""
    import accelerate
    import diffusers
    import torch
    from diffusers.models.modeling_utils import no_init_weights

    with no_init_weights(), accelerate.init_empty_weights(include_buffers=False):
        model = getattr(diffusers, head["class"]).from_config(json.loads(head["config"]))
    for name, told in json.loads(head["layers"]).items():
        recipe, sizes = Recipe(**told["recipe"]), told["sizes"]
        kind = torch.device(device).type
        choice = select(OP, backend, device=kind, recipe=recipe, features=math.gcd(*sizes))
        branch = getattr(torch, told["branch"].removeprefix("torch.")) if told["branch"] else torch.bfloat16
        layer = layer_class(choice)(*sizes, recipe, branch=branch, smoothed=told["smoothed"])
        if told["bias"]:
            layer.bias = torch.nn.Parameter(torch.empty(sizes[1], device="meta"), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = layer
    return model


def _put(model: Any, name: str, tensor: Any, path: str | Path) -> None:
    """Give one parameter or buffer its tensor."""
    import torch

    parent, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(parent)
        there = module._parameters.get(leaf) if leaf in module._parameters else module._buffers[leaf]
    except (AttributeError, KeyError):
        raise WeightsError(f"{path} holds {name}, which its model does not have.") from None
    if there is None or there.shape != tensor.shape:
        raise WeightsError(
            f"{path} holds {name} of the shape {tuple(tensor.shape)}, which its model does not take."
        )
    # A copy, as the file's own memory is not aligned, and products of unaligned numbers may differ in the last digit.
    tensor = tensor.clone()
    if leaf in module._parameters:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor

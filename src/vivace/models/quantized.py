"""Saving a transformer with quantised linear layers, and building it again from the file.

    with accelerate(pipeline, Plan([QuantizedLinear(weights="int4", group=64)])):
        save_quantized(pipeline.transformer, "transformer-int4.safetensors")
    pipeline.transformer = load_quantized("transformer-int4.safetensors")

The file is safetensors: codes, scales, branches and what was not quantised, as they are, with the configuration and the
recipes in its head. Loading builds the model without storage, puts quantised layers in their places and then fills
tensor by tensor, so that weights in full precision are at no time in memory. Original weights that a session keeps for
full steps are not saved.

`TrainedLinears` is the smaller file of training aware of quantisation (`vivace.training.quantization`): the trained
layers alone, for the model that they were distilled from; `quantized_linear(trained=FILE)` puts them in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from vivace.core.errors import ConfigError, WeightsError
from vivace.kernels.api import AUTO, Choice, select
from vivace.kernels.quant_linear.spec import OP, Recipe, layer_class

if TYPE_CHECKING:
    import torch

FORMAT, VERSION = "vivace-quantized", "1"
TRAINED_FORMAT, TRAINED_VERSION = "vivace-trained-quantization", "1"
TRAINER = "python -m vivace.training.quantization"
_KEPT = ".original"
_PARTS = ("weight", "scale", "outer", "smooth", "down", "up", "bias")


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


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedLinears:
    """Quantised layers that were trained with their rounding in force.

    Attributes:
        family, model_hash: of the exact model; an empty hash fits any weights.
        recipe: of every layer.
        smooth: share of the activations' range that was moved into the weights.
        layers: address of a linear -> tensors of the layer: `weight` (codes), `scale`, and where there are any `outer`,
            `smooth` (float32, 1 / s), `down` and `up` (the branch, bf16), `bias` (float32).
        told: steps, losses and errors, for people.
    """

    family: str
    model_hash: str
    recipe: Recipe
    layers: Mapping[str, Mapping[str, torch.Tensor]]
    smooth: float = 0.0
    told: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write the file; folders are made."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "format": TRAINED_FORMAT,
            "version": TRAINED_VERSION,
            "family": self.family,
            "model_hash": self.model_hash,
            "recipe": json.dumps(self.recipe.to_dict()),
            "smooth": json.dumps(self.smooth),
            "told": json.dumps(self.told),
        }
        tensors = {f"{site}.{part}": t for site, parts in self.layers.items() for part, t in parts.items()}
        save_file(tensors, path, head)
        return path

    @classmethod
    def load(cls, path: str | Path, *, tensors: bool = True) -> Self:
        """Read a file; without `tensors` those on the meta device, for what can be said without them.

        Raises:
            ConfigError: there is no such file, or it is something else; the sentence says what to do.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise ConfigError(f"there is no file of trained quantised layers {path}; make it with {TRAINER}.")
        layers: dict[str, dict[str, torch.Tensor]] = {}
        try:
            with safe_open(path, "pt") as reader:
                head = reader.metadata() or {}
                if head.get("format") != TRAINED_FORMAT or head.get("version") != TRAINED_VERSION:
                    raise ConfigError(
                        f"{path} holds no trained quantised layers of version {TRAINED_VERSION}; "
                        f"make them with {TRAINER}."
                    )
                for name in reader.keys():  # noqa: SIM118  # a reader, not a dictionary
                    site, _, part = name.rpartition(".")
                    if part not in _PARTS:
                        raise ValueError(f"{name} is no part of a layer")
                    # A copy, as the file's own memory is not aligned.
                    value = reader.get_tensor(name)
                    layers.setdefault(site, {})[part] = value.clone() if tensors else value.to("meta")
            return cls(
                family=head["family"],
                model_hash=head["model_hash"],
                recipe=Recipe(**json.loads(head["recipe"])),
                smooth=json.loads(head["smooth"]),
                layers=layers,
                told=json.loads(head["told"]),
            )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} cannot be read as trained quantised layers ({error}).") from None

    def unfit(self, path: str, recipe: Recipe, smooth: float) -> str:
        """Why the file is not of a recipe; empty when it is."""
        mine = self.recipe.to_dict() | {"smooth": self.smooth}
        asked = recipe.to_dict() | {"smooth": smooth}
        wrong = [f"{name} {mine[name]} and not {asked[name]}" for name in mine if mine[name] != asked[name]]
        if not wrong:
            return ""
        return f"{path} was trained with {', '.join(wrong)}; give the settings that it was trained with."

    def unfit_sites(self, path: str, sites: Iterable[str]) -> str:
        """Why the file does not hold these layers and no others; empty when it does."""
        wanted = set(sites)
        if lacking := sorted(wanted - set(self.layers)):
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            return (
                f"{path} has no trained layer {lacking[0]}{more}; set roles and skip_blocks as in training."
            )
        if strange := sorted(set(self.layers) - wanted):
            return (
                f"{path} has a trained layer {strange[0]}, which is not to be quantised here; "
                "set roles and skip_blocks as in training."
            )
        return ""

    def layer(self, site: str, linear: Any, choice: Choice) -> Any:
        """The quantised layer in the place of `linear`, on its device; codes are those of the file.

        Raises:
            ConfigError: the tensors are not those of such a layer.
        """
        import torch

        parts, device = self.layers[site], linear.weight.device
        kind = linear.weight.dtype
        half = kind if kind in (torch.bfloat16, torch.float16) else torch.bfloat16
        new = layer_class(choice)(
            linear.in_features, linear.out_features, self.recipe, branch=half, smoothed="smooth" in parts
        )
        if new.rotation is not None:
            new.rotation.to(device)
        new.bias = linear.bias
        if "bias" in parts and linear.bias is not None:
            new.original_bias = linear.bias.detach()
        for part, value in parts.items():
            owner = getattr(new, part) if part in ("down", "up") else new
            name = "weight" if part in ("down", "up") else part
            there = getattr(owner, name, None)
            if there is None or there.shape != value.shape:
                raise ConfigError(
                    f"the trained {part} of {site} has the shape {tuple(value.shape)}, which the layer does not "
                    f"take; make the file again with {TRAINER}."
                )
            value = value.to(device)
            if part in ("bias", "down", "up"):
                value = value.to(there.dtype)
            if name in owner._parameters:
                owner._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[name] = value
        tensors = {**dict(new.named_parameters()), **dict(new.named_buffers())}
        if lacking := next((name for name, t in tensors.items() if t is not None and t.is_meta), None):
            raise ConfigError(
                f"the file of trained layers lacks {site}.{lacking}; make it again with {TRAINER}."
            )
        return new.train(linear.training)

"""The file of a pruned transformer: its weights in diffusers' naming, what was kept, and which model it came from.

One safetensors file. Its metadata hold the head as JSON. Matrices may be stored as int8 codes with a scale for every
output channel (`store="int8"`), which halves the file of bf16; they are expanded when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vivace.calibration.artifact import model_hash
from vivace.core.errors import ConfigError, WeightsError
from vivace.models.pruning import Kept

FORM, VERSION = "vivace pruned transformer", 1
STORES = ("bf16", "int8", "fp32")
COMMAND = "python -m vivace.training.pruning repair"
_SCALE = "::scale"
_LEVELS = 127
_TYPES = {"bf16": torch.bfloat16, "int8": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Head:
    """What a file says of itself.

    `base` is the hash of the whole transformer's weights (`base_hash`), `architecture` that of its configuration;
    `recipe` is free text and numbers of how it was made.
    """

    class_name: str
    architecture: str
    base: str
    kept: Kept
    recipe: Mapping[str, Any] = field(default_factory=dict)


def architecture(config: Mapping[str, Any]) -> str:
    """Sixteen hex digits of a transformer's configuration, without names and versions."""
    plain = {k: v for k, v in dict(config).items() if not k.startswith("_")}
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()[:16]


def base_hash(module: nn.Module) -> str:
    """Sixteen hex digits of a transformer's configuration and some of its weights; equal in fp32 and bf16."""
    return model_hash(SimpleNamespace(transformer=module))


def head_of(whole: nn.Module, kept: Kept, recipe: Mapping[str, Any]) -> Head:
    """The head of a file that was made from a live transformer."""
    config: Any = whole.config
    return Head(type(whole).__name__, architecture(config), base_hash(whole), kept, recipe)


def packaged() -> Path:
    """Where the pruned embedded model lies, when the package has one."""
    from vivace.tiny.load import WEIGHTS

    return WEIGHTS / "pruned.safetensors"


def find(path: str) -> Path:
    """The file at a path; the packaged one for no path.

    Raises:
        WeightsError: nothing is there; the sentence says how to make one.
    """
    file = Path(path).expanduser() if path else packaged()
    if file.is_file():
        return file
    if not path:
        raise WeightsError(
            f"no pruned model comes with the package; make one with `{COMMAND} --model tiny --out F` and give file: F."
        )
    raise WeightsError(f"there is no pruned model {file}; make one with `{COMMAND} --out {file}`.")


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes and fp32 scales (outputs,) of a weight (outputs, ...): symmetric, rounded to nearest."""
    flat = weight.detach().float().flatten(1)
    scale = flat.abs().amax(dim=1).clamp_min(1e-12) / _LEVELS
    codes = (flat / scale[:, None]).round().clamp(-_LEVELS, _LEVELS).to(torch.int8)
    return codes.view(weight.shape), scale


def save(path: Path, state: Mapping[str, Tensor], head: Head, store: str = "bf16") -> Path:
    """Write a pruned transformer's state dict; an interruption leaves an earlier file whole.

    Args:
        store: `bf16`, `fp32`, or `int8` (codes for the weights of two and more dimensions, bf16 for the rest).

    Raises:
        ConfigError: there is no such way to store them.
    """
    if store not in STORES:
        raise ConfigError(f"weights are stored as one of {', '.join(STORES)}, not {store!r}.")
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        value = value.detach().cpu()
        if not value.is_floating_point():
            tensors[name] = value.contiguous()
        elif store == "int8" and value.ndim >= 2 and name.endswith("weight"):
            codes, scale = quantised(value)
            tensors[name], tensors[name + _SCALE] = codes.contiguous(), scale
        else:
            tensors[name] = value.to(_TYPES[store]).contiguous()
    said = {
        "format": FORM,
        "version": VERSION,
        "class": head.class_name,
        "architecture": head.architecture,
        "base": head.base,
        "kept": head.kept.to_dict(),
        "recipe": dict(head.recipe),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    save_file(tensors, partial, metadata={"vivace": json.dumps(said)})
    partial.replace(path)
    return path


def read_head(file: Path) -> Head:
    """The head alone; no tensor is read.

    Raises:
        WeightsError: the file is damaged, of another kind, or of a newer version.
    """
    return _head(_opened(file)[0], file)


def load(file: Path) -> tuple[Head, dict[str, Tensor]]:
    """Head and state dict; int8 codes come back as fp32 weights.

    Raises:
        WeightsError: as `read_head`.
    """
    metadata, tensors = _opened(file, read=True)
    head = _head(metadata, file)
    scales = {k.removesuffix(_SCALE): v for k, v in tensors.items() if k.endswith(_SCALE)}
    state = {k: v for k, v in tensors.items() if not k.endswith(_SCALE)}
    for name, scale in scales.items():
        codes = state[name]
        state[name] = codes.float() * scale.view(-1, *[1] * (codes.ndim - 1))
    return head, state


def _opened(file: Path, read: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(str(file), framework="pt", device="cpu") as handle:
            tensors = {k: handle.get_tensor(k) for k in handle.keys()} if read else {}  # noqa: SIM118
            return handle.metadata() or {}, tensors
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{file} cannot be read as safetensors ({error}); make it again with `{COMMAND}`."
        ) from None


def _head(metadata: Mapping[str, str], file: Path) -> Head:
    try:
        said = json.loads(metadata.get("vivace", ""))
        if said["format"] != FORM:
            raise ValueError(said["format"])
    except (ValueError, KeyError, TypeError):
        raise WeightsError(f"{file} is no pruned model; make one with `{COMMAND}`.") from None
    if said.get("version") != VERSION:
        raise WeightsError(
            f"{file} has format {said.get('version')} and this Vivace reads {VERSION}; make it again with `{COMMAND}`."
        )
    try:
        kept = Kept.from_dict(said["kept"])
        return Head(said["class"], said["architecture"], said["base"], kept, said.get("recipe", {}))
    except (KeyError, ConfigError) as error:
        raise WeightsError(f"{file} is damaged ({error}); make it again with `{COMMAND}`.") from None

"""Largest magnitudes of every linear layer's input channels, which smoothing balances weights against.

`vivace.plans.quant_searching.record_maxima` watches an exact run and makes the file: safetensors, one float32 vector a
layer under the layer's address.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from vivace.core.errors import ConfigError
from vivace.models.adapter import ModelDescription

if TYPE_CHECKING:
    import torch

FORMAT, VERSION = "vivace-activation-maxima", "1"
MAKER = "vivace.plans.quant_searching.record_maxima(pipeline, prompts)"


@dataclass(frozen=True, kw_only=True, eq=False)
class ActivationMaxima:
    """What was seen.

    Attributes:
        family, model_hash: of the model; an empty hash fits any weights.
        layers: address of a linear -> float32 (in_features,).
    """

    family: str
    model_hash: str
    layers: Mapping[str, torch.Tensor]

    def save(self, path: str | Path) -> Path:
        """Write the file; folders are made."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {"format": FORMAT, "version": VERSION, "family": self.family, "model_hash": self.model_hash}
        save_file({k: v.float().contiguous() for k, v in self.layers.items()}, path, head)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            ConfigError: there is no such file, or it is something else; the sentence says what to do.
        """
        head, names = _head(path)
        from safetensors import safe_open

        with safe_open(path, "pt") as reader:
            layers = {name: reader.get_tensor(name) for name in names}
        return cls(family=head.get("family", ""), model_hash=head.get("model_hash", ""), layers=layers)


def unfit(path: str, model: ModelDescription) -> str:
    """Why a file cannot serve a model; empty when it can. Reads the head only.

    Raises:
        ConfigError: as `ActivationMaxima.load`.
    """
    head, names = _head(path)
    if head.get("family") != model.family:
        return f"{path} was made for the family {head.get('family')}, and {model.name} is of {model.family}."
    blocks = tuple(f"{site}." for e in model.experts for site in e.block_sites)
    strange = next((n for n in names if not n.startswith(blocks)), None)
    if strange is not None:
        return f"{path} names the layer {strange}, which {model.name} does not have; make a file for it."
    return ""


def _head(path: str | Path) -> tuple[dict[str, str], list[str]]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ConfigError(f"there is no file of activation maxima {path}; make it with {MAKER}.")
    try:
        with safe_open(path, "pt") as reader:
            head, names = reader.metadata() or {}, list(reader.keys())
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as activation maxima ({error}).") from None
    if head.get("format") != FORMAT or head.get("version") != VERSION:
        raise ConfigError(f"{path} holds no activation maxima of version {VERSION}; make them with {MAKER}.")
    return head, names

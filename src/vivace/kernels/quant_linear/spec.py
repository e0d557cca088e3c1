"""Quantised linear layers: the operation, its recipe and its implementations.

    y = D(Q_a(x')) D(Q_w(W' - L R))^T + (x' R^T) L^T + b           x' = (x / s) H,  W' = W diag(s) H

Q_w and Q_a are number formats (`formats`), D reads them back. s is a smoothing vector over input channels
(SmoothQuant, arXiv 2211.10438), H an orthonormal block Hadamard matrix with signs (QuaRot, arXiv 2404.00456), L R a
branch of low rank in 16 bits (SVDQuant, arXiv 2411.05007). Each of the three is left out when not asked for; without
rounding they change nothing, as x' W'^T = x W^T.

Scales of activations belong to a token or to a block of one, never to a batch, so a sample's result does not depend on
its company. NVFP4 and FP8 kernels of vendors usually scale activations by one number a tensor; here it is one a token.

An implementation is a function `quantise(linear, recipe, smooth=None) -> QuantLinear` (`layer`) that leaves `linear`
alone. torchao is not among them: its integer range (-128 to 127) and its scales are not those of `formats`, so that
saved codes would mean something else; the operation `int8_linear` offers it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vivace.kernels.api import Candidate, Choice, register

OP = "quant_linear"
WEIGHTS = ("int8", "int4", "fp8", "nvfp4", "mxfp8", "mxfp4")
ACTIVATIONS = ("none", "int8", "int4", "fp8", "nvfp4", "mxfp8")
INTEGERS = ("int8", "int4")
GROUPS = (0, 32, 64, 128)
"""Weights that share a scale along the input channels; 0 for a whole row (formats with blocks of their own: 0)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one layer is quantised.

    Attributes:
        weights: format of the weights, one of `WEIGHTS`.
        activations: format of the activations, one of `ACTIVATIONS`; `none` keeps them as they are.
        group: one of `GROUPS`; other than 0 for integer weights only.
        rotate: whether input channels are rotated by a block Hadamard matrix.
        low_rank: rank of the 16-bit branch, 0 for none; a layer gets at most half of its smaller side.

    Raises:
        ValueError: a name or a combination that does not exist.
    """

    weights: str = "int8"
    activations: str = "none"
    group: int = 0
    rotate: bool = False
    low_rank: int = 0

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS or self.activations not in ACTIVATIONS or self.group not in GROUPS:
            raise ValueError(
                f"there is no recipe of {self.weights}, {self.activations} and group {self.group}"
            )
        if self.group and self.weights not in INTEGERS:
            raise ValueError(f"{self.weights} has blocks of its own; groups are for {' and '.join(INTEGERS)}")
        if self.low_rank < 0:
            raise ValueError(f"a rank is 0 or more, not {self.low_rank}")

    @property
    def integer(self) -> bool:
        """Whether both sides are integers, so that the product is one of integers."""
        return self.weights in INTEGERS and self.activations in INTEGERS

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `Recipe(**data)` is the inverse."""
        return asdict(self)


def emulated(choice: Choice, recipe: Recipe) -> bool:
    """Whether a choice only imitates the rounding of its formats, so that its time says nothing about them."""
    return choice.name == "reference" and recipe.activations != "none"


def layer_class(choice: Choice) -> Callable[..., Any]:
    """The class of a chosen implementation's layers, for building one that is filled later (`layer.QuantLinear`)."""
    import importlib

    return importlib.import_module(f"vivace.kernels.{OP}.{choice.name}").LAYER


def _load(module: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        import importlib

        return importlib.import_module(f"vivace.kernels.{OP}.{module}").quantise

    return load


def _recipe(context: Mapping[str, Any]) -> Recipe:
    return context.get("recipe") or Recipe()


def _refuse_int_mm(context: Mapping[str, Any]) -> str | None:
    if not _recipe(context).integer:
        return "an integer product needs integer weights and activations (int8 or int4)"
    if context.get("device", "cpu") == "cuda":
        if context.get("features", 8) % 8:
            return "torch._int_mm on a GPU needs layer sizes that are multiples of 8"
    elif context.get("device", "cpu") != "cpu":
        return f"torch._int_mm is not known to run on {context['device']}"
    return None


def _refuse_scaled_mm(context: Mapping[str, Any]) -> str | None:
    recipe, device = _recipe(context), context.get("device", "cpu")
    if (recipe.weights, recipe.activations) != ("fp8", "fp8"):
        return "torch._scaled_mm takes fp8 weights and fp8 activations"
    if context.get("features", 16) % 16:
        return "torch._scaled_mm needs layer sizes that are multiples of 16"
    if device == "cuda":
        import torch

        if torch.cuda.get_device_capability() < (8, 9):
            return "fp8 products need a GPU of compute capability 8.9 or more"
    elif device != "cpu":
        return f"torch._scaled_mm is not known to run on {device}"
    return None


def _avoid_scaled_mm(context: Mapping[str, Any]) -> str | None:
    return None if context.get("device", "cpu") == "cuda" else "a CPU multiplies fp8 in software"


def _never(context: Mapping[str, Any]) -> str | None:
    return None


register(OP, Candidate("int_mm", _refuse_int_mm, _load("int_mm")))
register(OP, Candidate("scaled_mm", _refuse_scaled_mm, _load("scaled_mm"), _avoid_scaled_mm))
register(OP, Candidate("reference", _never, _load("reference")))

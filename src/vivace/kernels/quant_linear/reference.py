"""Rounds as the formats say and multiplies what comes out.

With activations in a format the product is emulated, in float32. With activations left alone it is the real thing, and
what a library without a fused kernel does: weights are unpacked for every call, which saves memory and costs time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vivace.kernels.quant_linear import formats
from vivace.kernels.quant_linear.layer import QuantLinear
from vivace.kernels.quant_linear.spec import Recipe


class ReferenceLinear(QuantLinear):
    """See `spec`; every recipe, every device."""

    backend = "reference"

    def product(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        weight = formats.dequantise(self.codes)
        if self.recipe.activations == "none":
            return F.linear(x.to(dtype), weight.to(dtype))
        return F.linear(formats.rounded(x, self.recipe.activations), weight)


LAYER = ReferenceLinear


def quantise(linear: nn.Linear, recipe: Recipe, smooth: torch.Tensor | None = None) -> QuantLinear:
    """See `spec`."""
    return ReferenceLinear.from_linear(linear, recipe, smooth)

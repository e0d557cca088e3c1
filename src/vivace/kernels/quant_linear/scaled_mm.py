"""FP8 products on `torch._scaled_mm`, one scale a token and one an output channel."""

from __future__ import annotations

import torch
from torch import nn

from vivace.kernels.quant_linear import formats
from vivace.kernels.quant_linear.layer import QuantLinear
from vivace.kernels.quant_linear.spec import Recipe


class ScaledMatmulLinear(QuantLinear):
    """See `spec`; weights and activations fp8.

    A product that is asked for in bfloat16 is scaled inside. Such a kernel gives no other type, so for the others the
    bare product of codes comes out in float32 and is scaled after.
    """

    backend = "scaled_mm"

    def product(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        codes = formats.quantise(x, "fp8")
        a, b, steps = codes.values, self.weight.t(), self.scale.t()
        if dtype == torch.bfloat16:
            return torch._scaled_mm(a, b, scale_a=codes.scale, scale_b=steps.contiguous(), out_dtype=dtype)
        one = torch.ones((), device=x.device)
        return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.float32) * codes.scale * steps


LAYER = ScaledMatmulLinear


def quantise(linear: nn.Linear, recipe: Recipe, smooth: torch.Tensor | None = None) -> QuantLinear:
    """See `spec`.

    Raises:
        ValueError: a recipe that is not fp8 on both sides.
    """
    if (recipe.weights, recipe.activations) != ("fp8", "fp8"):
        raise ValueError("the scaled product needs fp8 weights and activations.")
    return ScaledMatmulLinear.from_linear(linear, recipe, smooth)

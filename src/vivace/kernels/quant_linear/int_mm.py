"""Integer products on `torch._int_mm`: int8 as it is, int4 unpacked to int8 for each call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vivace.kernels.quant_linear import formats
from vivace.kernels.quant_linear.layer import QuantLinear
from vivace.kernels.quant_linear.spec import Recipe

ROWS = 256
"""Tokens converted and multiplied at a time on a CPU: their integers stay in its cache."""
LEAST = 17
"""Fewest rows that a GPU's integer product takes."""


class IntMatmulLinear(QuantLinear):
    """See `spec`; integer weights and activations. Sums over a group of weights are exact, in int32 (GPUs: float32)."""

    backend = "int_mm"

    def product(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        weight = formats.as_int8(self.weight, self.recipe.weights)
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return self._rows(x, weight)
        out = torch.empty(x.shape[0], self.out_features)
        for rows, place in zip(x.split(ROWS), out.split(ROWS), strict=True):
            place.copy_(self._rows(rows, weight))
        return out

    def _rows(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(M, K) and int8 (N, padded K) to float32 (M, N)."""
        codes, scale = formats.integers(x, self.recipe.activations)
        rows, extra = codes.shape[0], weight.shape[1] - codes.shape[1]
        short = max(0, LEAST - rows) if codes.device.type == "cuda" else 0
        if extra or short:
            codes = F.pad(codes, (0, extra, 0, short))
        steps = self.scale.float()
        groups = steps.shape[1]
        if groups == 1:
            out = torch._int_mm(codes, weight.t()) * steps[:, 0]
        elif codes.device.type == "cuda":
            # One product instead of one a group: float32 adds up what fewer bits could not, and rounding is what
            # adding up the groups' sums costs too.
            values = (weight.float().view(*steps.shape, -1) * steps[..., None]).flatten(1)
            out = codes.float() @ values.t()
        else:
            out = torch.zeros(codes.shape[0], weight.shape[0])
            width = weight.shape[1] // groups
            parts = zip(codes.split(width, 1), weight.split(width, 1), steps.unbind(1), strict=True)
            for c, w, step in parts:
                out = torch.addcmul(out, torch._int_mm(c.contiguous(), w.t().contiguous()).float(), step)
        return out[:rows] * scale


LAYER = IntMatmulLinear


def quantise(linear: nn.Linear, recipe: Recipe, smooth: torch.Tensor | None = None) -> QuantLinear:
    """See `spec`.

    Raises:
        ValueError: a recipe with values that are no integers.
    """
    if not recipe.integer:
        raise ValueError("the integer product needs int8 or int4 weights and activations.")
    return IntMatmulLinear.from_linear(linear, recipe, smooth)
